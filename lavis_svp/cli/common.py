"""What the sub-commands share: the look of their help, LAVIS's options, and errors without a traceback."""

from __future__ import annotations

import argparse
import sys
import warnings
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
    run: Callable[[argparse.Namespace], int | None] | None,
    summary: str,
    example: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add a command to ``parser.add_subparsers()``, such as ``draw`` of ``lavis-svp superpixels``.

    ``summary`` is its help, without capital and full stop; ``run`` is what its parsed arguments hold as ``run``, None
    for a command with commands of its own.
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


class _OldFlag(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        warnings.warn(f"{option} is now {new}; the old name works in this release only.", FutureWarning, 2)
        setattr(namespace, self.dest, values)


def add_old_flag(parser: argparse.ArgumentParser, old: str, dest: str, kind: Callable[[str], Any]) -> None:
    """Accept ``old``, a flag of release 0.1, for the option ``dest``: hidden from the help, with a FutureWarning."""
    hidden: Any = argparse.SUPPRESS
    parser.add_argument(old, dest=dest, type=kind, action=_OldFlag, default=hidden, help=hidden)


def add_project_options(parser: argparse.ArgumentParser, required: bool = True, paths: Any = None) -> None:
    """Add LAVIS's ``--cfg-path`` (to the group ``paths``, if there is one) and ``--options``, for a project YAML."""
    text = "the project YAML, with the roots model, datasets and run"
    (paths or parser).add_argument("--cfg-path", required=required and not paths, metavar="YAML", help=text)
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
