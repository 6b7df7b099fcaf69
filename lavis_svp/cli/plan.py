"""``lavis-svp plan``: parameters, operations, memory and time of a training run, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from lavis_svp.cli.common import add_old_flag, command_parser, user_errors
from lavis_svp.common.paths import write_file


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of ``lavis-svp plan``."""
    parser = command_parser(
        "plan",
        "Estimate parameters, operations, memory and time of a training run, without weights, data or GPUs.",
        "lavis-svp plan --model-type refcoco_vicuna7b --gpu a100-80g --num-gpus 8",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cfg-path", metavar="YAML", help="a project YAML, as for training")
    source.add_argument("--model-type", help="a type of svp_ris, under GLaMM's recipe on RefCOCO, RefCOCO+, RefCOCOg")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="values that replace the YAML's")
    add("--gpu", default="a100-80g", help="kind of GPU: a100-40g, a100-80g, h100-80g ... (default: %(default)s)")
    add("--num-gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")
    add("--zero", type=int, choices=range(4), help="ZeRO stage instead of the YAML's")
    add("--images", type=int, help="training images, where the data sets' sizes are unknown")
    add_old_flag(parser, "--pictures", "images", int)
    add("--tokens", type=int, help="superpixels per image (default: 40, the paper's mean)")
    add("--prompts", type=int, help="point prompts per image, for superpixels 'sam'")
    add("--expression-words", type=int, help="words of an expression (default: 5)")
    add("--utilisation", "--mfu", type=float, help="share of the GPU's peak that a step reaches (default: 0.35)")
    add("--many", type=int, help="expressions per image in the columns for many expressions (default: 8)")
    add("--json", metavar="FILE", help="also write every number to this file")
    add("--markdown", action="store_true", help="print Markdown instead of tables for a terminal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; ``argv`` are the words after it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model_type and args.options:
        parser.error("--options goes with --cfg-path")
    with user_errors():
        _plan(args)
    return 0


def _plan(args: argparse.Namespace) -> None:
    from rich.console import Console

    from lavis_svp.plan.estimate import Assumptions, make_plan
    from lavis_svp.plan.report import markdown, show
    from lavis_svp.plan.settings import from_model_type, from_project, get_gpu

    gpu = get_gpu(args.gpu)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)}
    assumptions = Assumptions(**{name: value for name, value in values.items() if value is not None})
    if args.model_type:
        options, training = from_model_type(args.model_type)
    else:
        options, training = from_project(args.cfg_path, args.options)
    if args.zero is not None:
        zero_options = {**training.zero_options, "stage": args.zero}
        training = dataclasses.replace(training, zero=args.zero, zero_options=zero_options)
    if args.images is not None:
        training = dataclasses.replace(training, images=args.images, data="--images")
    plan = make_plan(options, training, gpu, args.num_gpus, assumptions)
    if args.json:
        write_file(args.json, json.dumps(plan.as_json(), indent=1) + "\n")
    if args.markdown:
        print(markdown(plan))
    else:
        show(plan, Console())
