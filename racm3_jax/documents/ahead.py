"""Reads ahead: threads make the next items while one is used."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while one is used."""
    with _threads(1) as pool:

        def start() -> concurrent.futures.Future[list[Item]]:
            return pool.submit(lambda: list(itertools.islice(items, 1)))

        ahead = start()
        while item := ahead.result():
            ahead = start()
            yield item[0]


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`function` of each item, in order, in a thread for each core.

    Twice as many items as there are threads are taken ahead of their use.

    Args:
      function: called in several threads at a time.
      items: taken in the thread that uses the results.

    Raises:
      Exception: of `function`, where its result would be.
    """
    num_threads = count_cores()
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with _threads(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _threads(number: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """A pool that its end does not wait for.

    A generator that was not used up ends where it is collected: in any thread, perhaps
    in one that is just starting, which could wait for itself.
    """
    pool = concurrent.futures.ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
