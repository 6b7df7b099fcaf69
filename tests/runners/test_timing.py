"""Seconds by section, with and without waiting for the device."""

from __future__ import annotations

import time

import pytest
import torch

from lavis_svp.runners.timing import StepTimer, build_timer, peak_memory

CPU = torch.device("cpu")


def test_sections_add_up_and_start_over():
    timer = StepTimer()
    for _ in range(3):
        with timer.section("data"):
            time.sleep(0.01)
    with timer.section("forward"):
        pass
    seconds = timer.take()
    assert list(seconds) == ["data", "forward"]
    assert seconds["data"] >= 0.03 and seconds["forward"] < 0.01
    assert timer.take() == {}


def test_a_section_that_fails_is_counted_and_fails():
    timer = StepTimer()
    with pytest.raises(KeyError), timer.section("forward"):
        raise KeyError
    assert "forward" in timer.take()


def test_the_device_is_waited_for_within_the_section():
    timer = StepTimer(lambda: time.sleep(0.02))
    with timer.section("forward"):
        pass
    assert timer.take()["forward"] >= 0.02


@pytest.mark.parametrize("synchronise", [True, False])
def test_a_cpu_needs_no_waiting(synchronise):
    with build_timer(CPU, synchronise).section("forward"):
        pass


def test_memory_is_this_processs_peak():
    before = peak_memory(CPU)
    block = bytearray(300_000_000)
    block[::4096] = b"1" * len(block[::4096])
    assert 0.01 < before < peak_memory(CPU)
