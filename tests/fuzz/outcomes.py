"""What an input is, and what becomes of it: the outcomes of the tables, and how an error is judged."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import random
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTCOMES = {
    "same": "the result is that of the intact input",
    "clear": "refused by a documented error of one line that names the file (or the key, or the image)",
    "other": "taken with another content, which nothing in the format can tell",
    "bare": "refused in one line that does not name the file",
    "trace": "another exception than the documented ones, or a message of several lines",
    "silent": "taken with another content although a checksum or a rule of the format tells",
    "hang": "not done in time",
    "crash": "the process died, or ran into its memory limit",
    "ran": "code, a program or a connection was started, or a file outside of the sandbox was touched",
}
GOOD = ("same", "clear", "other")

PACKAGE = "lavis_svp"


@dataclass
class Case:
    """One input.

    Args:
        label: what it is, in words.
        read: puts the input in its place, has the package read it, and returns what it then holds.
        names: a clear error names one of them; empty = any message of one line will do.
        must_refuse: taking it at all is ``silent``.
        expected: what it must give if it is taken; None = what the target's intact input gives.
    """

    label: str
    read: Callable[[], Any]
    names: Sequence[str] = ()
    must_refuse: bool = False
    expected: Any = None


@dataclass
class Target:
    """One reader with one way to damage its input, as a row of the table.

    Args:
        name: of the row.
        inputs: how many of a full run are its own; lists of given inputs end earlier.
        case: makes input ``number`` with a random generator of its own; None = the list has ended.
        intact: reads the intact input; what it returns is what ``same`` means. None = nothing is intact.
        summed: the format has a checksum, so other content is ``silent``.
        api: errors are those of functions that are called with objects, not of files: a ValueError or TypeError that
            the package itself raises is documented.
        seconds: after which an input hangs.
        gigabytes: that an input may take beyond what the process has.
    """

    name: str
    inputs: int
    case: Callable[[random.Random, int], Case | None]
    intact: Callable[[], Any] | None = None
    summed: bool = False
    api: bool = False
    seconds: float = 20.0
    gigabytes: float = 3.0


@dataclass
class Result:
    """What became of one input."""

    number: int
    label: str
    outcome: str
    error: str = ""
    place: str = ""
    seconds: float = 0.0
    peak: float = field(default=0.0)  # gigabytes of the process

    def line(self) -> str:
        """One line for people."""
        parts = [f"#{self.number}", self.outcome, self.label, self.error, self.place and f"at {self.place}"]
        return " | ".join(part for part in parts if part)


def warm_up() -> None:
    """Import what judging needs: a child with little memory left cannot."""
    documented(ValueError(), api=True)
    import torch  # noqa: F401  (for fingerprints)


def documented(error: BaseException, api: bool) -> bool:
    """Whether an error is of the kinds that readers of files raise, or that functions raise themselves."""
    from lavis_svp.common.checkpoints import ShardedCheckpointError, WrongCheckpointError
    from lavis_svp.common.files import BadFileError
    from lavis_svp.common.options import SetupError
    from lavis_svp.common.registry import UnknownNameError

    kinds = (BadFileError, SetupError, UnknownNameError, WrongCheckpointError, ShardedCheckpointError, OSError)
    if isinstance(error, kinds):
        return True
    return api and isinstance(error, ValueError | TypeError) and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost instruction is a ``raise`` of the package's own."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or f"/{PACKAGE}/" not in step.tb_frame.f_code.co_filename:
        return False
    return dis.opname[step.tb_frame.f_code.co_code[step.tb_lasti]] == "RAISE_VARARGS"


def judge_error(error: BaseException, case: Case, api: bool) -> str:
    """The outcome of an input that was refused."""
    if isinstance(error, MemoryError):
        return "crash"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not documented(error, api) or "\n" in text.strip():
        return "trace"
    return "clear" if not case.names or any(name in text for name in case.names) else "bare"


def place_of(error: BaseException) -> str:
    """The innermost line of the package that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"/{PACKAGE}/" in frame.filename]
    return f"{own[-1].filename.rpartition(f'/{PACKAGE}/')[2]}:{own[-1].lineno}" if own else ""


def fingerprint(content: Any) -> str:
    """Hash anything that a reader may return: plain values, arrays, tensors, dataclasses, and mappings of these."""
    total = hashlib.sha256()
    _add(total, content)
    return total.hexdigest()[:20]


def _add(total: Any, item: Any) -> None:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        total.update(type(item).__name__.encode())
        _add(total, {one.name: getattr(item, one.name) for one in dataclasses.fields(item)})
    elif isinstance(item, Mapping):
        total.update(b"{%d" % len(item))
        for key in sorted(item, key=repr):
            _add(total, key)
            _add(total, item[key])
    elif isinstance(item, int):
        total.update(f"{type(item).__name__}{item:x};".encode())  # decimals of long numbers are refused
    elif isinstance(item, str | bytes | float | Path) or item is None:
        total.update(f"{type(item).__name__}{item!r};".encode("utf-8", "surrogatepass"))
    elif isinstance(item, Sequence):
        total.update(b"[%d" % len(item))
        for one in item:
            _add(total, one)
    elif isinstance(item, Set):
        _add(total, sorted(item, key=repr))
    elif hasattr(item, "detach"):  # a tensor
        import torch

        array = item.detach().cpu() if item.device.type != "meta" else torch.zeros(0)
        array = (array.to_dense() if array.layout != torch.strided else array).contiguous()
        total.update(f"{array.dtype}{tuple(array.shape)}".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(item, "dtype") and hasattr(item, "tobytes"):  # an array
        total.update(f"{item.dtype}{item.shape}".encode())
        total.update(item.tobytes())
    else:
        raise TypeError(f"A reader's result holds a {type(item).__name__}, which fingerprint() does not know.")
