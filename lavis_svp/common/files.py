"""Read files that nobody vouches for: regular ones only, JSON and YAML in bounded depth, and errors of one line.

:class:`BadFileError` is what every reader of this package raises for a file that it cannot use. SECURITY.md
says what is trusted and what is not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from omegaconf import OmegaConf

from lavis_svp.common.paths import write_file

MAX_YAML_BYTES = 10_000_000
MAX_YAML_DEPTH = 32
MAX_YAML_NODES = 1_000_000  # with every alias written out, which a few lines of aliases can double and double again
MAX_QUOTED = 200  # characters of an underlying error in a message

_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")  # a NUL, and what would break the line of a message
_OF_CONTENT = (None, errno.EINVAL)  # of the OSErrors that damaged bytes cause: Pillow's; those of mmap in torch
_NO_SUM = "0" * 64
_SUM = re.compile(rb'^\{\s*"sha256": "([0-9a-f]{64})"')


class BadFileError(ValueError):
    """A file that cannot be used: damaged, of another format, refused as unsafe, or with impossible content."""


class BrokenFileError(BadFileError):
    """What is stored of one image is damaged: its file, its annotations, its superpixels or its features."""


def one_line(error: BaseException | str) -> str:
    """An underlying error as a part of a one-line message: its kind and its text, without line breaks, shortened."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]} ..."


def shown(value: Any) -> str:
    """A value as a part of a one-line message: short, however deep or long it is."""
    try:
        return one_line(reprlib.repr(value))
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------ regular files


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file to read its bytes, never one that has no end or that blocks, as FIFOs and devices do.

    Raises:
        FileNotFoundError: there is no such file.
        BadFileError: it is a folder, a FIFO, a socket or a device.
        OSError: it cannot be opened, e.g. for lack of permission.
    """
    # O_NONBLOCK: opening a FIFO would wait for its writer; it does nothing to regular files
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (ValueError, IsADirectoryError) as error:  # a NUL in the name
        raise BadFileError(f"{str(path)!r} cannot be opened ({one_line(error)}).") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise BadFileError(f"{path} is {kind}, no regular file. Give the path of a file.")
    return os.fdopen(handle, "rb")


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """The bytes of a regular file; see :func:`open_regular`.

    Args:
        path: the file.
        max_bytes: larger files are a BadFileError; None = any size.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise BadFileError(f"{path} has {size:,} bytes; a file of its kind has at most {max_bytes:,}.")
        return file.read()


def is_outside(path: Path, folder: Path) -> bool:
    """Whether a path that is written as one in ``folder`` leads out of it, by "..", by its root or by a link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def relative_name(name: str, where: str = "") -> str:
    """Return a file name out of a file if it stays, as it is written, within the folder that it is relative to.

    Raises:
        BadFileError: the name is empty, absolute, has ".." or control characters; the message begins with ``where``.
    """
    path = PurePosixPath(name)
    prefix = f"{where}: " if where else ""
    if not path.parts or _CONTROL.search(name):
        raise BadFileError(f"{prefix}{name!r} cannot name a file")
    if path.is_absolute() or ".." in path.parts:
        raise BadFileError(f"{prefix}{name!r} leads out of its folder; give paths relative to it")
    return name


# -------------------------------------------------------------------------------------------------- JSON, YAML


@contextmanager
def file_errors(where: object, mend: str = "", kind: type[BadFileError] = BadFileError) -> Iterator[None]:
    """Turn whatever a damaged file drives its reader into a one-line :class:`BadFileError` that names the file.

    Args:
        where: the file, and the place in it; as text.
        mend: what to do, a sentence.
        kind: of the error; a BadFileError of another kind becomes one of this, with its message.

    Missing files, lacking permissions, failing disks and full memory stay the errors that they are.
    """
    try:
        yield
    except (kind, FileNotFoundError, PermissionError, MemoryError):
        raise
    except BadFileError as error:
        raise kind(str(error)) from error
    except Exception as error:  # a reader of damaged bytes may raise nearly anything
        if isinstance(error, OSError) and error.errno not in _OF_CONTENT:
            raise
        raise kind(f"{where} is damaged or of another kind ({one_line(error)}). {mend}".rstrip()) from error


def parse_json(content: bytes | str, where: str | Path, mend: str = "Fetch or make it again.") -> Any:
    """Parse JSON in UTF-8.

    Raises:
        BadFileError: not JSON, not UTF-8, or nested too deep; names ``where``, and says ``mend``.
    """
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadFileError(f"{where} is truncated or not JSON ({one_line(error)}). {mend}") from error


def read_json(path: str | Path, mend: str = "Fetch or make it again.") -> Any:
    """Read a JSON file; errors are those of :func:`open_regular` and :func:`parse_json`."""
    return parse_json(read_regular(path), path, mend)


def write_checked_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON with sorted keys, whole or not at all, with the sha256 of the file's bytes in it.

    The entry "sha256" comes first and is computed with zeros in its own place. :func:`read_checked_json` compares it.
    """
    body = json.dumps(content, sort_keys=True, ensure_ascii=False)
    blank = f'{{"sha256": "{_NO_SUM}"{", " if content else ""}{body[1:]}'.encode()
    write_file(path, blank.replace(_NO_SUM.encode(), hashlib.sha256(blank).hexdigest().encode(), 1))


def read_checked_json(path: str | Path, mend: str = "Fetch or make it again.") -> Any:
    """Read JSON and compare the sum that :func:`write_checked_json` put into it; older files have none.

    Raises:
        FileNotFoundError, OSError: see :func:`open_regular`.
        BadFileError: not JSON, or another content than was written.
    """
    raw = read_regular(path)
    content = parse_json(raw, path, mend)
    stated = content.pop("sha256", None) if isinstance(content, dict) else None
    if stated is None:
        return content
    found = _SUM.match(raw)
    if found is None or hashlib.sha256(raw.replace(found[1], _NO_SUM.encode(), 1)).hexdigest() != stated:
        raise BadFileError(f"{path} is not what was written: its content does not match the sha256 in it. {mend}")
    return content


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file into an OmegaConf container (or a plain value where its root is none).

    Raises:
        FileNotFoundError, OSError: see :func:`open_regular`.
        BadFileError: not YAML, a tag that would make objects, nested too deep, or too large with its aliases.
    """
    raw = read_regular(path, MAX_YAML_BYTES)
    try:
        text = raw.decode("utf-8")
        check_yaml(text)
        return OmegaConf.create(text)
    except Exception as error:  # PyYAML's, OmegaConf's, and for odd roots an AssertionError
        raise BadFileError(f"{path} is not YAML that can be used: {one_line(error)}.") from error


def check_yaml(text: str) -> None:
    """Refuse YAML that would exhaust the memory or the stack, before anything builds it.

    Raises:
        ValueError: nested deeper than ``MAX_YAML_DEPTH``, or over ``MAX_YAML_NODES`` values with its aliases.
        yaml.YAMLError: not YAML.
    """
    sizes: dict[str, int] = {}  # of the anchors' nodes, everything in them included
    open_nodes: list[tuple[str | None, int]] = []
    before = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, before))
            before = 0
            if len(open_nodes) > MAX_YAML_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, outer = open_nodes.pop()
            size, before = before + 1, outer
            if anchor:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                sizes[event.anchor] = 1
        before += size
        if before > MAX_YAML_NODES:
            raise ValueError(f"it has over {MAX_YAML_NODES:,} values, its aliases written out")
