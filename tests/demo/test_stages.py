"""A call in a thread, and its progress reports."""

from __future__ import annotations

import threading

import pytest

from racm3_jax.demo.stages import run_in_stages


def test_reports_come_before_the_result():
    def work(on_progress):
        on_progress(1)
        on_progress(2)
        return "done"

    assert list(run_in_stages(work)) == [1, 2, "done"]


def test_errors_in_the_thread_are_raised_in_the_caller():
    def work(on_progress):
        on_progress(1)
        raise ValueError("does not fit")

    stages = run_in_stages(work)
    assert next(stages) == 1
    with pytest.raises(ValueError, match="does not fit"):
        next(stages)


def test_abandoned_work_ends_at_its_next_report():
    closed, ended = threading.Event(), threading.Event()
    seen = []

    def work(on_progress):
        try:
            on_progress(1)
            closed.wait(10)
            on_progress(2)
            seen.append("went on")
        finally:
            ended.set()

    stages = run_in_stages(work)
    assert next(stages) == 1
    stages.close()  # pyright: ignore[reportAttributeAccessIssue]
    closed.set()
    assert ended.wait(10) and not seen
