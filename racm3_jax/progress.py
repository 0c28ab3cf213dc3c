"""Progress of a long loop: a bar on a terminal, a line every 10% in a log file.

`StageClock` says in which of its stages the time went.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class ProgressLines:
    """The subset of tqdm's interface that is used here, as lines on standard error.

    >>> build memory: 30% (300 of 1000 documents, 12 s)
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "",
        disable: bool = False,
    ) -> None:
        self.total = total
        self.n = initial
        self.disable = disable
        self._name = desc
        self._unit = unit
        self._facts = ""
        self._tenths = self._count_tenths()
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Adds n; prints a line when a tenth of the total is complete."""
        self.n += n
        tenths = self._count_tenths()
        if tenths > self._tenths and not self.disable:
            seconds = time.monotonic() - self._started
            done = f"{self.n:,.0f} of {self.total:,} {self._unit}".strip()
            words = ", ".join(filter(None, [done, f"{seconds:,.0f} s", self._facts]))
            print(
                f"{self._name}: {10 * tenths}% ({words})", file=sys.stderr, flush=True
            )
        self._tenths = max(self._tenths, tenths)

    def set_postfix(self, facts: Mapping[str, Any], refresh: bool = True) -> None:
        """Sets extra facts for the next line."""
        del refresh
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items()}
        self._facts = ", ".join(f"{name} {value}" for name, value in shown.items())

    def close(self) -> None:
        """Nothing to do: every tenth already has its line."""

    def _count_tenths(self) -> int:
        return int(10 * self.n / self.total) if self.total else 0


def open_progress(**settings: Any) -> Any:
    """A `tqdm` where standard error is a terminal, else `ProgressLines`.

    Args:
      **settings: total, initial, desc, unit and disable, as in tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, mininterval=0.5, smoothing=0.1, **settings)
    return ProgressLines(**settings)


class StageClock:
    """Seconds of the stages of a job, in the thread that does it.

    A stage inside another one is not counted for both:

        with clock.measure("writing"):          5 s
            with clock.measure("embedding"):    3 s      ->  writing 2 s, embedding 3 s

    Args:
      now: the current time in seconds.

    Attributes:
      seconds: by stage, in the order of their first use.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Counts the time until the end of the block, except for stages inside it."""
        self._count()
        self._open.append(stage)
        self.seconds.setdefault(stage, 0.0)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def measure_each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; counts the time until each of them is there."""
        iterator = iter(items)
        while True:
            with self.measure(stage):
                item = list(itertools.islice(iterator, 1))
            if not item:
                return
            yield item[0]

    def describe(self) -> str:
        """The shares of all time counted, largest first: "62% embedding, 38% reading"."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        shown = [(name, s / total) for name, s in ordered if s > 0.005 * total]
        return ", ".join(f"{share:.0%} {name}" for name, share in shown)

    def _count(self) -> None:
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
