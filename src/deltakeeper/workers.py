"""Work on tensors side by side, results in order, memory bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MEMORY = 512 << 20
"""Bytes that tensors under way may take together; one tensor alone may take more."""


def map_in_order(
    work: Callable[[T], R], items: Iterable[T], *, cost: Callable[[T], int], workers: int, memory: int = MEMORY
) -> Iterator[R]:
    """Results of `work`, in the order of `items`, made by threads.

    Args:
        work: what to do with an item; it should spend its time where the interpreter is released.
        items: what to work on.
        cost: bytes that an item takes while it is worked on or waits for its turn.
        workers: number of threads; 1 works in the calling thread.
        memory: a further item is begun only while the costs of those under way stay below this.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    running: deque[tuple[Future[R], int]] = deque()
    spent = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                price = cost(item)
                while running and (len(running) > workers or spent + price > memory):
                    done, freed = running.popleft()
                    yield done.result()
                    spent -= freed
                running.append((pool.submit(work, item), price))
                spent += price
            while running:
                yield running.popleft()[0].result()
        finally:
            for future, _ in running:
                future.cancel()


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Give torch one thread for a while and yield how many it had: workers side by side must not share its pool.

    OpenMP threads that wait for a core spin, and stall every operation.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
