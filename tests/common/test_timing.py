from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lavis_svp.common.timing import Stopwatch


class Slow(nn.Module):
    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x if self.inner is None else self.inner(x)


def test_a_part_inside_another_counts_for_itself_alone():
    inner = Slow(0.05)
    outer, watch = Slow(0.02, inner), Stopwatch()
    with watch.modules({"outer": outer, "inner": inner, "absent": None}), watch.part("rest"):
        time.sleep(0.03)
        outer(torch.zeros(1))
    assert watch.seconds == pytest.approx({"outer": 0.02, "inner": 0.05, "rest": 0.03}, abs=0.015)
    assert watch.text().startswith(f"{watch.total:.2f} s: rest ")
    outer(torch.zeros(1))  # the hooks are gone
    assert watch.total == pytest.approx(0.1, abs=0.04)


def test_parts_add_up_over_calls():
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("a"):
            time.sleep(0.02)
    assert watch.seconds["a"] == pytest.approx(0.04, abs=0.02)
