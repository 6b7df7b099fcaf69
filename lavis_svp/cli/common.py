"""What the sub-commands share: the look of their help, LAVIS's options, and errors without a traceback."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lavis_svp.common.registry import UnknownNameError

USER_ERRORS: tuple[type[Exception], ...] = (ValueError, UnknownNameError, OSError, ImportError)
"""What a wrong YAML, option or path raises; any other KeyError is a bug and keeps its traceback."""


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


def add_device_option(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add ``--device``, a name for ``common.devices.checked_device``; without a default, ``run.device`` counts."""
    text = "where the model runs: auto (CUDA where there is one), cpu, cuda, cuda:1 or mps"
    usual = "run.device" if default is None else default
    parser.add_argument("--device", default=default, help=f"{text} (default: {usual})")


def at_least_one(text: str) -> int:
    """Parse an option's whole number from 1 on; argparse puts the option's name before the message."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got '{text}'")
    return int(text)


def add_max_image_pixels(parser: argparse.ArgumentParser, of_datasets: bool = False) -> None:
    """Add ``--max-image-pixels``; with ``of_datasets`` it is None where it is not given, and their own limit counts."""
    from lavis_svp.common.images import MAX_IMAGE_PIXELS  # imports numpy, which other commands do not need

    usual = f"that of the YAML's data sets, or {MAX_IMAGE_PIXELS}" if of_datasets else MAX_IMAGE_PIXELS
    text = f"height times width of the largest image that is read (default: {usual})"
    default = None if of_datasets else MAX_IMAGE_PIXELS
    parser.add_argument("--max-image-pixels", type=at_least_one, default=default, metavar="N", help=text)


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """End the command with one line and exit code 2 if the block raises an error that the user's input causes.

    Args:
        kinds: of errors that are such. Where a block does more than read the input, those of
            :data:`lavis_svp.runners.project.SETUP_ERRORS`: a ValueError is then more likely a bug.
    """
    try:
        yield
    except kinds as error:
        text = str(error).encode(errors="backslashreplace").decode()  # a broken name in an argument cannot be printed
        print(f"error: {text}", file=sys.stderr)
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
