"""``lavis-svp evaluate``: score a checkpoint, or the weights that a configuration names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_svp.cli.common import add_project_options, command_parser, process_group, user_errors
from lavis_svp.cli.launcher import add_launch_options, run_in_processes


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = command_parser(
        "evaluate",
        "Evaluate run.test_splits, or run.valid_splits if there are none, whatever was evaluated before.\n\n"
        "The checkpoint holds the trained weights, the zoo the frozen ones. Without --checkpoint, the newest one in\n"
        "run.output_dir counts; if there is none, the model as its configuration loads it (model.finetuned: for\n"
        "svp_ris / tiny the shipped weights). Without --cfg-path, the checkpoint says which model, data sets and\n"
        "task; data is then where it usually is, or where --options say, and results go to the checkpoint's folder.",
        "lavis-svp evaluate --cfg-path projects/svp/eval/refshapes_seg_tiny.yaml\n"
        "  lavis-svp evaluate --checkpoint output/svp/refshapes_tiny --nproc 2",
    )
    add_project_options(parser, required=False)
    parser.add_argument("--checkpoint", metavar="FILE", help="a checkpoint, or a folder of which the newest is taken")
    add_launch_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate in this process, or in several; ``argv`` are the words after the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(words)
    if not args.cfg_path and not args.checkpoint:
        parser.error("give --cfg-path, --checkpoint, or both")
    with user_errors():
        run_in_processes("evaluate", words, args)
        from lavis_svp.runners.project import SETUP_ERRORS, config_to_evaluate, runner_with_weights

        checkpoint, config = config_to_evaluate(args.cfg_path, args.checkpoint, args.options)
    with process_group(), user_errors(SETUP_ERRORS):
        runner = runner_with_weights(config, checkpoint)
        runner.evaluate(skip_reload=True)
