"""Where the time of a prediction goes: seconds by part, measured by hooks on modules and by named stretches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lavis_svp.common.devices import wait_for


class Stopwatch:
    """Adds up seconds by part; a part that runs inside another one counts for itself alone.

    Args:
        device: which is waited for at the borders of parts, so that its work is counted where it was asked for.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._last = time.perf_counter()

    def _turn(self) -> None:
        """Give the time since the last border to the innermost part that runs."""
        wait_for(self.device)
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    @contextlib.contextmanager
    def modules(self, parts: Mapping[str, nn.Module | None]) -> Iterator[None]:
        """Count what runs in the forward of modules under their names; None stands for a module that is not there."""
        handles: list[Any] = []

        def before(name: str) -> Any:
            def start(*_: Any) -> None:
                self._turn()
                self._running.append(name)

            return start

        def after(*_: Any) -> None:
            self._turn()
            self._running.pop()

        for name, module in parts.items():
            if module is not None:
                handles.append(module.register_forward_pre_hook(before(name)))
                handles.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def total(self) -> float:
        """All seconds that were counted."""
        return sum(self.seconds.values())

    def text(self) -> str:
        """The split, such as "1.04 s: SAM 0.41, image classifier 0.21, …", in the order in which parts began."""
        return f"{self.total:.2f} s: " + ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items())
