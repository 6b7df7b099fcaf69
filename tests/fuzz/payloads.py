"""Pickles that would run something if anything unpickled them: every call makes the sandbox's canary."""

from __future__ import annotations

import builtins
import functools
import operator
import os
import pickle
import pty
import runpy
import shutil
import subprocess
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROTOCOLS = range(6)
DEEP = 100_000


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class StateCall:
    """Pickles as a call whose result then gets a state."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path, (self.canary,), {"touch": Call(os.mkdir, self.canary)}


def calls(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling makes the canary, by the function that they call."""
    place = str(canary)
    code = f"open({place!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{place}'"),
        "os.mkdir": Call(os.mkdir, place),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", place]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", place]),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.open": Call(builtins.open, place, "w"),
        "builtins.getattr": Call(builtins.getattr, Call(__import__, "os"), "system"),
        "functools.partial": Call(functools.partial, os.mkdir, place),
        "functools.reduce": Call(functools.reduce, os.mkdir, [place, 0o777]),
        "operator.methodcaller": Call(operator.methodcaller("touch"), Path(place)),
        "runpy": Call(runpy.run_path, place),
        "pty.spawn": Call(pty.spawn, ["touch", place]),
        "shutil.copyfile": Call(shutil.copyfile, "/etc/hostname", place),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, place), 2)),
        "a state": StateCall(place),
    }


def raw(canary: Path) -> dict[str, bytes]:
    """Pickles written by hand: every opcode that looks something up, and those that take memory or the stack."""
    place = str(canary).encode()
    text = b"U" + bytes([len(place)]) + place if len(place) < 256 else b"V" + place + b"\n"
    return {
        "GLOBAL, REDUCE": b"cposix\nmkdir\n(" + text + b"tR.",
        "GLOBAL of os": b"cos\nmkdir\n(" + text + b"tR.",
        "INST": b"(" + text + b"iposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02cposix\nmkdir\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cposix\nmkdir\n" + text + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text + b"\x85R.",
        "BUILD": b"cbuiltins\nset\n(tR}U\x01ai\x01sb.".replace(b"i\x01", b"I1\n"),
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\xff\xff\xff\x7f.",
        "PERSID": b"Pposix.mkdir\n.",
        "BINPERSID": text + b"Q.",
        "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0eset.__class__.x\x93.",
        "codecs": b"c_codecs\nencode\n(V" + place + b"\nVrot13\ntR.",
        "codecs, another encoding": b"c_codecs\nencode\n(Vabc\nVzlib\ntR.",
        "set as a call of a list": b"c__builtin__\nset\n(]tR.",
        "MARKs without end": b"(" * DEEP + b".",
        "lists without end": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        "tuples without end": b"N" + b"\x85" * DEEP + b".",
        "a text of 2^62": b"\x8d" + (2**62).to_bytes(8, "little") + b"x.",
        "bytes of 2^31": b"\x80\x03B" + (2**31 - 1).to_bytes(4, "little") + b"x.",
        "a frame of 2^62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        "LONG4 of 2^31": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"\x01.",
        "a LONG of 10^6 digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "a memo of 2^31": b"]r" + (2**31 - 1).to_bytes(4, "little") + b".",
        "doubling": b"]q\x00" + b"".join(b"(h\x00h\x00h\x00h\x00lq\x00" for _ in range(40)) + b".",
        "a list in itself": b"]q\x00h\x00a.",
        "nothing": b".",
        "STOP missing": b"]",
        "protocol 255": b"\x80\xff].",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "READONLY_BUFFER": b"\x80\x05\x97\x98.",
        "BYTEARRAY8": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",
    }


def wrapped(payload: Any) -> dict[str, Any]:
    """A payload in the places where a file of references may hold it."""
    reference = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [{"sent": payload}]}
    return {"alone": payload, "in a list": [payload], "in a reference": [reference]}
