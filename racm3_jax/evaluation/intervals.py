"""Shares with their uncertainty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of successes with its 95% Wilson interval.

    Source: Wilson (1927); it keeps its coverage near 0 and 1, where the normal
    interval does not.
    """

    successes: int
    total: int

    @property
    def value(self) -> float:
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.96, self.total, self.value
        centre = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return (
            max(0.0, (centre - spread) / scale),
            min(1.0, (centre + spread) / scale),
        )

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"

    def to_json(self) -> dict[str, float | int | list[float]]:
        return {
            "value": self.value,
            "interval95": list(self.interval),
            "successes": self.successes,
            "total": self.total,
        }


def compute_share(outcomes: Sequence[bool]) -> Share:
    """The share of True among `outcomes`.

    Raises:
      ValueError: if there are none.
    """
    if len(outcomes) == 0:
        raise ValueError("a share of no outcomes is undefined")
    return Share(int(sum(bool(o) for o in outcomes)), len(outcomes))
