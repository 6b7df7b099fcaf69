"""``lavis-svp train``: train a model as a project YAML says, then evaluate it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_svp.cli.common import add_project_options, command_parser, process_group, user_errors
from lavis_svp.cli.launcher import add_launch_options, run_in_processes


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = command_parser(
        "train",
        "Train a model as a LAVIS project YAML says, then evaluate it. The same command, given again after an\n"
        "interruption, goes on where it stopped.",
        "lavis-svp train --cfg-path projects/svp/train/refshapes_tiny.yaml --options run.seed=43\n"
        "  lavis-svp train --nproc 8 --stages projects/svp/train/stage1_vicuna7b.yaml "
        "projects/svp/train/stage2_vicuna7b.yaml",
    )
    add_project_options(parser)
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="YAML",
        help="in place of --cfg-path: train these in turn, each from the weights of the one before",
    )
    add_launch_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process, in several, or in stages.

    Args:
        argv: the words after the command; None reads the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--stages" for word in words) and not {"-h", "--help"} & set(words):
        from lavis_svp.cli import stages

        stages.main(words)
        return
    args = build_parser().parse_args(words)
    with user_errors():
        run_in_processes("train", words, args)
        from lavis_svp.runners.project import build_config, build_runner, read_project

        config = build_config(read_project(args.cfg_path, args.options))
    with process_group():
        build_runner(config).train()


if __name__ == "__main__":
    main()
