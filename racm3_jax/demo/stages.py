"""Turns a call with progress reports into an iterator for the page."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class _Abandoned(Exception):
    """The iterator was closed."""


def run_in_stages(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """Runs `work(on_progress)` in a thread; yields its reports, then its result.

    If the iterator is closed early, the work ends at its next report. Its exceptions
    are raised here.
    """
    reports: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    abandoned, done = threading.Event(), object()

    def on_progress(report: Any) -> None:
        if abandoned.is_set():
            raise _Abandoned
        reports.put((report, None))

    def run() -> None:
        try:
            reports.put((work(on_progress), None))
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001, for the thread that follows
            reports.put((done, error))
        else:
            reports.put((done, None))

    # A daemon: Ctrl-C does not wait for a generation.
    threading.Thread(target=run, name="decode", daemon=True).start()
    try:
        while True:
            report, error = reports.get()
            if error is not None:
                raise error
            if report is done:
                return
            yield report
    finally:
        abandoned.set()
