"""Progress of a long loop: a bar on a terminal, a line every 10% in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from tqdm import tqdm


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
