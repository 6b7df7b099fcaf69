"""What the sub-commands share: the look of their help, LAVIS's options, and errors without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

USER_ERRORS = (ValueError, KeyError, OSError, ImportError)
"""What a wrong YAML, option or path raises."""


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """Build the parser of a sub-command.

    Args:
        command: its words after ``lavis-svp``, such as "train".
        description: what it does, in a sentence or two.
        example: one or more complete command lines, shown below the options.
    """
    return argparse.ArgumentParser(
        prog=f"lavis-svp {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    example: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add a command to ``parser.add_subparsers()``, such as ``draw`` of ``lavis-svp superpixels``.

    ``summary`` is its help, without capital and full stop; ``run`` is what its parsed arguments hold as ``run``.
    """
    parser = commands.add_parser(
        name,
        parents=parents,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  lavis-svp {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_project_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add LAVIS's ``--cfg-path`` and ``--options``, for a sub-command that reads a project YAML."""
    parser.add_argument(
        "--cfg-path", required=required, metavar="YAML", help="the project YAML, with the roots model, datasets and run"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="values that replace the YAML's, such as run.max_iters=100 model.model_type=tiny",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers add it


@contextmanager
def user_errors() -> Iterator[None]:
    """End the command with one line and exit code 2 if the block raises an error that the user's input causes."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def process_group() -> Iterator[None]:
    """Leave torch's process group, if the block has joined one, at its end."""
    from torch import distributed

    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
