"""``lavis-svp export``: get weights out of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lavis_svp.cli.common import (
    add_command,
    add_device_option,
    add_old_flag,
    add_project_options,
    command_parser,
    user_errors,
)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp export``."""
    parser = command_parser(
        "export",
        "Get weights out of a training run.",
        "lavis-svp export merge --checkpoint output/svp/stage2_vicuna7b --out exported",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    text = "merge LoRA into the language model, and write a Hugging Face folder and svp.safetensors"
    example = "export merge --checkpoint output/svp/stage2_vicuna7b --out exported --dtype bfloat16"
    merge = add_command(commands, "merge", _merge, text, example)
    merge.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, or a folder: its newest")
    merge.add_argument("--out", required=True, type=Path, help="the folder to write; it must not exist")
    add_project_options(merge, required=False)
    add_device_option(merge)
    text = "precision of the language model's files (default: %(default)s)"
    merge.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32", help=text)
    merge.add_argument("--shard-size", default="5GB", help="size limit of its weight files (default: %(default)s)")
    text = "make the weights file that comes with the package"
    example = "export shipped output/svp/refshapes_tiny weights.safetensors"
    shipped = add_command(commands, "shipped", _ship, text, example)
    shipped.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder: its newest")
    text = "file to write (default: the package's own of the model's type)"
    shipped.add_argument("out", type=Path, nargs="?", help=text)
    shipped.add_argument(
        "--command", dest="trained_by", help="the training command to record (default: the one in the run's summary)"
    )
    shipped.add_argument("--no-target", type=Path, metavar="JSON", help="result of `lavis-svp probe no-target`")
    text = "a text file with the words of the training (default: those of the run's annotations)"
    shipped.add_argument("--vocabulary", type=Path, metavar="FILE", help=text)
    add_old_flag(shipped, "--presence", "no_target", Path)
    add_device_option(shipped)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` are the words after it."""
    args = build_parser().parse_args(argv)
    with user_errors():
        args.run(args)
    return 0


def _merge(args: argparse.Namespace) -> None:
    from lavis_svp.export.merge import merge

    files = {"dtype": args.dtype, "shard_size": args.shard_size}
    merge(args.checkpoint, args.out, args.cfg_path, args.options, **files, device=args.device)


def _ship(args: argparse.Namespace) -> None:
    from lavis_svp.export.shipped import ship

    ship(args.checkpoint, args.out, args.trained_by, args.no_target, args.device, args.vocabulary)
