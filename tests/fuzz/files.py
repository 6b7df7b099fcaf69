"""The files of a target: kept as they were, changed for one input, and put back for the next; and lists of inputs."""

from __future__ import annotations

import functools
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.outcomes import Case, Target

Change = bytes | Callable[[Path], None] | None
"""What a file becomes: these bytes, what the function makes there (a link, a FIFO), or nothing."""


class Files:
    """A folder whose files one input after another changes.

    Args:
        folder: with the intact files in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.intact = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        self._changed: set[str] = set()
        self._process: int | None = None

    def path(self, name: str) -> Path:
        return self.folder / name

    def place(self, changes: Mapping[str, Change]) -> None:
        """Put back what the last input changed, and make the changes of this one."""
        if os.getpid() != self._process or not changes:  # a child that died may have left anything
            self._process = os.getpid()
            present = (path for path in self.folder.rglob("*") if path.is_symlink() or not path.is_dir())
            self._changed = {*self.intact, *self._changed, *(str(path.relative_to(self.folder)) for path in present)}
        for name in sorted(self._changed - set(changes)):
            self._write(name, self.intact.get(name))
        self._changed = set(changes)
        for name, change in changes.items():
            self._write(name, change)

    def _write(self, name: str, change: Change) -> None:
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        if change is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(change):
            change(path)
        else:
            path.write_bytes(change)

    def damaged(
        self,
        name: str,
        read: Callable[[], Any],
        damage: Callable[[bytes, random.Random], tuple[bytes, str]],
        names: Sequence[str] | None = None,
    ) -> Callable[[random.Random, int], Case]:
        """Cases in which one file is damaged; a clear error names it."""

        def case(rng: random.Random, number: int) -> Case:
            content, label = damage(self.intact[name], rng)

            def put_and_read() -> Any:
                self.place({name: content})
                return read()

            return Case(label, put_and_read, names if names is not None else (Path(name).name,))

        return case

    def case(
        self, label: str, changes: Mapping[str, Change], read: Callable[[], Any], names: Sequence[str], **more: Any
    ) -> Case:
        """A given case."""

        def put_and_read() -> Any:
            self.place(changes)
            return read()

        return Case(label, put_and_read, names, **more)


def listed(name: str, cases: Sequence[Case], **options: Any) -> Target:
    """A target of given cases."""
    return Target(name, len(cases), lambda rng, number: cases[number] if number < len(cases) else None, **options)


def odd_places(outside: Path) -> dict[str, Change]:
    """What a name may turn out to be: (what, how it is made at a path)."""
    return {
        "a FIFO": os.mkfifo,
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/full": lambda path: path.symlink_to("/dev/full"),
        "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
        "a folder": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a dangling link": lambda path: path.symlink_to("nowhere"),
        "a link out of the folder": lambda path: path.symlink_to(outside),
        "nothing": None,
        "an empty file": b"",
        "an unreadable file": lambda path: (path.write_bytes(b"x"), path.chmod(0))[0],
    }


def warnings_are_errors(read: Callable[[], Any]) -> Callable[[], Any]:
    """The reader, which raises what it warns of: what is passed over is refused, and the warning names it."""

    @functools.wraps(read)
    def strict() -> Any:
        from lavis_svp.common.files import BadFileError

        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            content = read()
        finally:
            logging.getLogger().removeHandler(handler)
        if said:
            raise BadFileError(" ".join(said))
        return content

    return strict
