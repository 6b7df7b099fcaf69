"""Runs inputs in child processes with limits of memory and time, and notices whatever starts, leads or dies there.

The process that prepared a target forks; the child goes through many inputs and reports each by a line. If it dies or
does not answer, the input that it was at is a crash or a hang, and another child goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.fuzz.outcomes import Case, Result, Target, fingerprint, judge_error, place_of, warm_up

STARTS = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn",
    "subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto", "urllib.Request", "webbrowser.open",
)  # fmt: skip
"""Audit events that no reader of a file has a use for; they are refused and count as ``ran``."""
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.chmod", "os.chown")
"""Audit events whose first argument is a path; outside of the sandbox they count as ``ran``."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GIGABYTE = 2**30
CANARY = "canary"
LONGEST = 300  # characters of an error in the report
FAULT = 99  # the child's exit code where the fuzzer itself fails
Job = tuple[Target, range]
"""A target and the numbers of its inputs."""
MEMORY_PAGES = "/proc/self/statm"


class Sandbox:
    """A folder in which inputs lie; what is written elsewhere is noticed.

    Args:
        folder: is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def canary(self) -> Path:
        """A file that only a harmful input makes."""
        return self.folder / CANARY

    def run(self, jobs: Sequence[Job], seed: int) -> Iterator[tuple[Target, Result]]:
        """Go through some inputs of some targets, each with a random generator of (seed, target, number)."""
        warm_up()
        left = [(target, numbers) for target, numbers in jobs if len(numbers)]
        while left:
            target, numbers = left[0]
            for target, result in self._in_child(list(left), seed):
                yield target, result
                while left[0][0] is not target:
                    left.pop(0)
                numbers = range(result.number + 1, left[0][1].stop)
                left[0] = (target, numbers)
            if self._ended:
                return
            if not numbers:
                left.pop(0)

    def _in_child(self, jobs: Sequence[Job], seed: int) -> Iterator[tuple[Target, Result]]:
        """Results until the child is done, or until it dies or hangs, which is the last result."""
        self._ended = False
        readable, writable = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(readable)
            self._be_child(jobs, seed, writable)
        os.close(writable)
        target, number, label, buffer = jobs[0][0], jobs[0][1].start, "", b""
        try:
            while True:
                ready, _, _ = select.select([readable], [], [], target.seconds)
                chunk = os.read(readable, 1 << 16) if ready else b""
                if not chunk:
                    os.kill(child, signal.SIGKILL)
                    status = os.waitpid(child, 0)[1]
                    child = 0
                    if os.waitstatus_to_exitcode(status) == FAULT:
                        raise RuntimeError(f"The fuzzer itself failed in '{target.name}', input {number}; see above.")
                    end = f"the process ended with {_end(status)}" if ready else f"not done after {target.seconds:g} s"
                    yield target, Result(number, label, "crash" if ready else "hang", end)
                    return
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    entry = json.loads(line)
                    if entry.get("ended"):
                        self._ended = True
                        return
                    target = jobs[entry.pop("job")][0]
                    number, label = entry["number"], entry["label"]
                    if "outcome" in entry:
                        yield target, Result(**entry)
                        number += 1
        finally:
            os.close(readable)
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _be_child(self, jobs: Sequence[Job], seed: int, pipe: int) -> NoReturn:
        """What the child does; it never returns."""
        code, terminal = FAULT, os.dup(2)
        try:
            self._confine()
            for job, (target, numbers) in enumerate(jobs):
                self._work(target, seed, numbers, lambda entry, job=job: _send(pipe, {"job": job, **entry}))
            _send(pipe, {"ended": True})
            code = 0
        except BaseException:  # a fault of this program, not of a reader
            os.write(terminal, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _confine(self) -> None:
        """Silence this process, and watch what it starts."""
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        os.chdir(self.folder)
        self._seen: list[str] = []
        sys.addaudithook(self._watch)

    def _watch(self, event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS:
            self._seen.append(f"{event}{str(args)[:80]}")
            raise PermissionError(f"The sandbox refuses {event}.")
        if event in ("os.link", "os.symlink", "os.rename"):
            self._check_path(event, args[1])  # the new name
        elif event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            self._check_path(event, args[0])

    def _check_path(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a handle
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith((f"{self.folder}{os.sep}", "/dev/null", "/dev/shm/torch_", "/dev/tty")):
            self._seen.append(f"{event} {place}")
            raise PermissionError(f"The sandbox refuses {event} of {place}.")

    def _work(self, target: Target, seed: int, numbers: range, send: Callable[[dict[str, Any]], None]) -> None:
        """Go through the inputs of one target."""
        expected = None if target.intact is None else fingerprint(target.intact())
        self._seen.clear()  # what is imported and compiled at the first use
        pages = int(Path(MEMORY_PAGES).read_text().split()[0])
        limit = pages * resource.getpagesize() + int(target.gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for number in numbers:
            case = target.case(random.Random(f"{seed} {target.name} {number}"), number)
            if case is None:
                break
            send({"number": number, "label": case.label})
            send(dataclasses.asdict(self._one(target, case, number, expected)))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _one(self, target: Target, case: Case, number: int, expected: str | None) -> Result:
        result = Result(number, case.label, "clear")
        started = time.perf_counter()
        try:
            content = fingerprint(case.read())
        except Exception as error:
            result.outcome = judge_error(error, case, target.api)
            text = f"{type(error).__name__}: {error}".replace(f"{self.folder}{os.sep}", "")
            result.error, result.place = text[:LONGEST], place_of(error)
        else:
            wanted = expected if case.expected is None else fingerprint(case.expected)
            if case.must_refuse:
                result.outcome, result.error = "silent", "it was taken"
            elif content == wanted:
                result.outcome = "same"
            else:
                result.outcome = "silent" if target.summed or case.expected is not None else "other"
        result.seconds = round(time.perf_counter() - started, 3)
        result.peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        if self._seen or self.canary.exists():
            result.outcome, result.error = "ran", f"{', '.join(self._seen) or 'the canary is there'}; {result.error}"
            self._seen.clear()
            self.canary.unlink(missing_ok=True)
        return result


def _send(pipe: int, entry: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(entry).encode() + b"\n")


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"code {code}"
