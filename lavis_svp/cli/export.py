"""``lavis-svp export``: get weights out of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lavis_svp.cli.common import add_project_options, command_parser, user_errors


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp export``."""
    parser = command_parser(
        "export",
        "Get weights out of a training run.",
        "lavis-svp export merge --checkpoint output/svp/stage2_vicuna7b --out exported",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    merge = commands.add_parser("merge", help="merge LoRA, write a Hugging Face folder and svp.safetensors")
    merge.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, or a folder: its newest")
    merge.add_argument("--out", required=True, type=Path, help="the folder to write; it must not exist")
    add_project_options(merge, required=False)
    text = "precision of the language model's files (default: %(default)s)"
    merge.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32", help=text)
    merge.add_argument("--shard-size", default="5GB", help="size limit of its weight files (default: %(default)s)")
    merge.set_defaults(run=_merge)
    shipped = commands.add_parser("shipped", help="make the weights file that comes with the package")
    shipped.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder: its newest")
    shipped.add_argument("out", type=Path, nargs="?", help="file to write (default: the package's own)")
    shipped.add_argument("--command", dest="trained_by", help="command of the training (default: of the run's summary)")
    text = "result of `lavis-svp probe no-target`"
    shipped.add_argument("--no-target", "--presence", type=Path, metavar="JSON", help=text)
    shipped.set_defaults(run=_ship)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` are the words after it."""
    args = build_parser().parse_args(argv)
    with user_errors():
        args.run(args)
    return 0


def _merge(args: argparse.Namespace) -> None:
    from lavis_svp.export.merge import merge

    merge(args.checkpoint, args.out, args.cfg_path, args.options, dtype=args.dtype, shard_size=args.shard_size)


def _ship(args: argparse.Namespace) -> None:
    from lavis_svp.export.shipped import ship

    ship(args.checkpoint, args.out, args.trained_by, args.no_target)
