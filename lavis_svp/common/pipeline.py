"""Reading, computing and writing at the same time: threads read ahead and write behind while one thread computes.

It suits a GPU, which one process keeps busy; Pillow, OpenCV and the file system work without Python's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
C = TypeVar("C")

READERS = 8  # threads that read, decode and resize images
WRITERS = 2
READ_AHEAD, WRITE_AHEAD = 32, 4  # items, and batches, that wait in memory


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], limit: int) -> Iterator[R]:
    """The results of a function for the items, in order; the pool works at most ``limit`` items ahead."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_compute_write(
    items: Iterable[T],
    read: Callable[[T], S],
    compute: Callable[[list[S]], list[C]],
    write: Callable[[C], R],
    batch_size: int,
) -> Iterator[R]:
    """Take items through three stages that overlap; gives what ``write`` returns for each, in order.

    What is computed when an error ends the work is written all the same.

    Args:
        items: one after the other.
        read: of one item, in several threads.
        compute: of up to ``batch_size`` items, in the caller's thread alone; it returns as many results.
        write: of one result, in several threads.
        batch_size: items that are computed together.

    Raises:
        Exception: the first that one of the functions raises.
    """
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
        sources = ahead(readers, read, items, READ_AHEAD)

        def batches() -> Iterator[list[C]]:
            while batch := list(islice(sources, batch_size)):
                yield compute(batch)

        def write_all(batch: list[C]) -> list[R]:
            return [write(one) for one in batch]

        for results in ahead(writers, write_all, batches(), WRITE_AHEAD):
            yield from results
