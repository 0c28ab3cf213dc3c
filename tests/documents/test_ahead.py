"""Items that threads make ahead of their use."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from racm3_jax.documents import ahead
from racm3_jax.documents.ahead import count_cores, map_ahead, run_ahead


@pytest.fixture(autouse=True)
def _three_cores(monkeypatch):
    monkeypatch.setattr(ahead, "count_cores", lambda: 3)


def test_results_come_in_order_whatever_takes_long():
    def wait_and_double(n):
        time.sleep(0.003 * (n % 3))
        return 2 * n

    assert list(map_ahead(wait_and_double, range(20))) == list(range(0, 40, 2))
    assert list(map_ahead(wait_and_double, [])) == []


def test_a_thread_for_each_core_works_at_the_same_time():
    all_there = threading.Barrier(3, timeout=20)
    assert list(map_ahead(lambda n: all_there.wait() >= 0, range(3))) == [True] * 3


def test_few_items_are_taken_ahead_and_none_after_the_last_use():
    taken = itertools.count()
    results = map_ahead(lambda n: n, taken)
    assert next(results) == 0
    assert next(results) == 1
    results.close()
    assert next(taken) <= 8 + 1  # twice the threads ahead, and those that were used


def test_an_error_comes_where_its_result_would_be():
    results = map_ahead(lambda n: 12 // (2 - n), range(9))
    assert [next(results), next(results)] == [6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_of_the_items_comes_too():
    def items():
        yield 1
        raise OSError("no more")

    for read in (lambda x: map_ahead(str, x), run_ahead):
        with pytest.raises(OSError, match="no more"):
            list(read(items()))


def test_the_next_item_is_made_while_one_is_used():
    is_made = threading.Event()

    def items():
        yield 1
        is_made.set()
        yield 2

    results = run_ahead(items())
    assert next(results) == 1
    assert is_made.wait(timeout=20)
    assert list(results) == [2]


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(
        ahead.os, "sched_getaffinity", lambda pid: {4, 7}, raising=False
    )
    assert count_cores() == 2
    monkeypatch.delattr(ahead.os, "sched_getaffinity")
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 5)
    assert count_cores() == 5


def test_ending_early_does_not_wait_for_what_runs():
    can_end, has_begun = threading.Event(), threading.Event()

    def wait(n):
        if n:
            has_begun.set()
            assert can_end.wait(timeout=20)
        return n

    def items():
        yield 0
        yield wait(1)

    for results in (map_ahead(wait, range(9)), run_ahead(items())):
        assert next(results) == 0
        assert has_begun.wait(timeout=20)
        results.close()  # type: ignore[attr-defined]
    can_end.set()
