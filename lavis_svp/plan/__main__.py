"""``python -m lavis_svp.plan --cfg-path FILE.yaml [--options ...]``: what a run will take, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lavis_svp import launch

DEFAULT_GPU, DEFAULT_COUNT = "a100-80g", 8


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_svp.plan",
        description="Parameters, operations, memory and time of a training run, without weights, data or GPUs.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cfg-path", help="a project YAML, as for training")
    source.add_argument("--model-type", help="a type of svp_ris, under GLaMM's recipe on RefCOCO, RefCOCO+, RefCOCOg")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the YAML")
    parser.add_argument(
        "--gpu", default=DEFAULT_GPU, help="kind of GPU: a100-40g, a100-80g, h100-80g ... (default: %(default)s)"
    )
    parser.add_argument("--num-gpus", type=int, default=DEFAULT_COUNT, help="how many (default: %(default)s)")
    parser.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage instead of the YAML's")
    parser.add_argument("--images", type=int, help="training images, where the data sets' sizes are not known")
    parser.add_argument("--tokens", type=int, help="superpixels an image (default: 40, the paper's mean)")
    parser.add_argument("--prompts", type=int, help="point prompts an image for the superpixels")
    parser.add_argument("--expression-words", type=int, help="words of an expression (default: 5)")
    parser.add_argument("--utilisation", "--mfu", type=float, help="share of the peak that is reached (default: 0.35)")
    parser.add_argument("--many", type=int, help="expressions an image in the lines for many (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write every number there, too")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of tables for a terminal")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: the words after the command; by default those of the command line.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.model_type and args.options:
        parser.error("--options goes with --cfg-path")
    launch.configure(lambda: _plan(args))


def _plan(args: argparse.Namespace) -> None:
    from rich.console import Console

    import lavis_svp.runners  # noqa: F401  (LAVIS first, so that a missing one is said at once)
    from lavis_svp.plan.estimate import Assumptions, make_plan
    from lavis_svp.plan.gpus import get_gpu
    from lavis_svp.plan.report import markdown, show
    from lavis_svp.plan.settings import from_model_type, from_project

    gpu = get_gpu(args.gpu)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)}
    assumptions = Assumptions(**{name: value for name, value in given.items() if value is not None})
    if args.model_type:
        options, training = from_model_type(args.model_type)
    else:
        options, training = from_project(args.cfg_path, args.options)
    if args.zero is not None:
        training = dataclasses.replace(
            training, zero=args.zero, zero_options={**training.zero_options, "stage": args.zero}
        )
    if args.images is not None:
        training = dataclasses.replace(training, images=args.images, data="--images")
    plan = make_plan(options, training, gpu, args.num_gpus, assumptions)
    if args.json:
        _write(Path(args.json), json.dumps(plan.as_json(), indent=1) + "\n")
    if args.markdown:
        print(markdown(plan))
    else:
        show(plan, Console())


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
