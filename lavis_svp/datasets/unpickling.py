"""Reading a pickle of plain data without ever running what it asks for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


class UnsafePickleError(ValueError):
    """The pickle wants to import something; nothing of it was imported or run."""


def load_plain_pickle(path: str | Path) -> Any:
    """Load a pickle that may hold lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None only.

    RefCOCO's ``refs(*).p`` come from Python 2: their byte strings are read as Latin-1 text.

    Args:
        path: the pickle file.

    Raises:
        UnsafePickleError: the pickle names a class or function; the message says which. It is not run.
        ValueError: the file is truncated or is not a pickle.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, path).load()
        except UnsafePickleError:
            raise
        # Damaged pickles raise nearly anything: the opcodes then index and call at random.
        except Exception as error:
            raise ValueError(
                f"{path} is truncated or not a pickle ({type(error).__name__}: {error}). Download it again."
            ) from error


def _bytes_of_latin1(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes into old pickle protocols as a call of ``_codecs.encode(text, 'latin1')``."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"The pickle asks for the text encoding '{encoding}'; plain data needs latin1 only.")
    return text.encode("latin1")


_PLAIN_CALLS = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _bytes_of_latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global but those that plain containers and bytes need."""

    def __init__(self, file: Any, path: str | Path) -> None:
        super().__init__(file, fix_imports=True, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in _PLAIN_CALLS:
            raise UnsafePickleError(
                f"{self._path} wants to import {module}.{name}, which a file of references has no use for. "
                "It was not run. Do not open this file with pickle; get it from a source you trust."
            )
        return _PLAIN_CALLS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self._path} refers to an outside object ({pid!r}); a file of references does not.")
