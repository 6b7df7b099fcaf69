"""Reading, computing and writing at once: order, overlap, and what is left when something fails."""

from __future__ import annotations

import threading

import pytest

from lavis_svp.common.pipeline import READ_AHEAD, read_compute_write


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_come_in_order_and_batches_are_full(batch_size: int) -> None:
    sizes = []

    def compute(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        return [10 * one for one in batch]

    results = list(read_compute_write(range(7), lambda one: one + 1, compute, str, batch_size))
    assert results == [str(10 * (one + 1)) for one in range(7)]
    assert sizes == ([1] * 7 if batch_size == 1 else [3, 3, 1])


def test_the_stages_overlap() -> None:
    """The first batch waits until later items have been read, the last until the first was written."""
    read, written = threading.Semaphore(0), threading.Semaphore(0)
    calls = []

    def compute(batch: list[int]) -> list[int]:
        calls.append(batch)
        waits_for, count = (read, 4) if len(calls) == 1 else (written, 1)
        assert all(waits_for.acquire(timeout=20) for _ in range(count))
        return batch

    def write(one: int) -> int:
        written.release()
        return one

    def load(one: int) -> int:
        read.release()
        return one

    assert list(read_compute_write(range(6), load, compute, write, 2)) == list(range(6))


def test_reading_stays_a_few_items_ahead() -> None:
    drawn = []
    items = (drawn.append(one) or one for one in range(1000))
    results = read_compute_write(items, int, list, int, 2)
    assert next(results) == 0 and len(drawn) < 2 * READ_AHEAD
    results.close()


def test_an_error_ends_the_work_and_what_was_computed_is_written() -> None:
    written = []

    def compute(batch: list[int]) -> list[int]:
        if batch[0] == 2:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        list(read_compute_write(range(100), int, compute, written.append, 1))
    assert sorted(written) == [0, 1]
