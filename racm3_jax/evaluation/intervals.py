"""Figures with their uncertainty: shares by Wilson, all others by bootstrap."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int


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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of a whole set with its 95% percentile-bootstrap interval.

    `num_resamples` 0 means that no interval was asked for.
    """

    value: float
    interval: tuple[float, float] | None
    total: int
    num_resamples: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f}"
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"

    def to_json(self) -> dict[str, float | int | list[float] | None]:
        return {
            "value": self.value,
            "interval95": None if self.interval is None else list(self.interval),
            "total": self.total,
            "num_resamples": self.num_resamples,
        }


def bootstrap(
    compute: Callable[[Int[np.ndarray, " rows"]], Mapping[str, float]],
    total: int,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Figures of a set, with intervals from resampling its items with replacement.

    Source: Efron (1979), percentile intervals. All figures of a resample share its rows.

    Args:
      compute: rows of the items -> figures by name.
      total: number of items.
      num_resamples: 0 gives figures without intervals.
      seed: resample i depends on (seed, i) alone.

    Raises:
      ValueError: if there are no items.
    """
    if total < 1:
        raise ValueError("figures of no items are undefined")
    values = compute(np.arange(total))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for i in range(num_resamples):
        rng = np.random.default_rng([seed, i])
        resampled = compute(rng.integers(0, total, total))
        for name, value in resampled.items():
            drawn[name].append(value)

    def interval(name: str) -> tuple[float, float] | None:
        if not drawn[name]:
            return None
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        return float(low), float(high)

    return {
        name: Estimate(float(value), interval(name), total, num_resamples)
        for name, value in values.items()
    }
