"""Combines seeds: means with 95% intervals; differences of conditions, seed by seed.

A fraction has two sources of variance, the nations of a seed and the seed itself. Its
interval is the wider of two at each end: Student's t over the seeds, and Wilson's over
the outcomes of all seeds, which stays valid if all seeds have 0% or 100%.

A difference of fractions has the error of the questions and of the seeds (see
`evaluation.intervals`): three seeds that agree by chance are not a certainty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from racm3_jax.evaluation.intervals import Share, difference_of_shares


@dataclasses.dataclass(frozen=True)
class Combined:
    """A result over the seeds.

    Attributes:
      value: the mean of the seeds.
      interval: 95%; None of a single seed without outcomes.
      seeds: the result of each seed.
      is_share: whether it is a fraction of outcomes.
      p_value: of a difference, two-sided, uncorrected; None if it is not a difference
        or has fewer than two seeds.
    """

    value: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]
    is_share: bool
    p_value: float | None = None

    def __str__(self) -> str:
        if self.is_share:
            text, show = f"{self.value:.1%}", "{:.1%}"
        else:
            text, show = f"{self.value:.3g}", "{:.3g}"
        if self.interval is None:
            return text
        low, high = (show.format(x) for x in self.interval)
        return f"{text} [{low}, {high}]"


def combine(figures: Sequence[Share | float]) -> Combined:
    """The result over all seeds.

    Raises:
      ValueError: there are none, or shares and other numbers are mixed.
    """
    shares = [f for f in figures if isinstance(f, Share)]
    if not figures or len(shares) not in (0, len(figures)):
        raise ValueError(f"figures of one kind are combined; got {list(figures)}")
    values = [f.value if isinstance(f, Share) else float(f) for f in figures]
    interval = student_interval(values)
    if shares:
        total = Share(
            sum(s.successes for s in shares),
            sum(s.total for s in shares),
            max(s.design_effect for s in shares),
        )
        low, high = total.interval
        if interval is not None:
            low, high = min(low, interval[0]), max(high, interval[1])
        interval = max(0.0, low), min(1.0, high)
    return Combined(float(np.mean(values)), interval, tuple(values), bool(shares))


def compare(
    figures: Sequence[Share | float], reference: Sequence[Share | float]
) -> Combined:
    """The difference from the reference, over the seeds, with its interval."""
    pairs = list(zip(figures, reference, strict=True))
    values = [_value(a) - _value(b) for a, b in pairs]
    mean = float(np.mean(values))
    shares = [(a, b) for a, b in pairs if isinstance(a, Share) and isinstance(b, Share)]
    if len(shares) == len(pairs):
        found = difference_of_shares([a for a, _ in shares], [b for _, b in shares])
        return Combined(mean, found.interval, tuple(values), False, found.p_value)
    interval = student_interval(values)
    p_value = None
    if interval is not None:
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        if error:
            p_value = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1))
        else:
            p_value = float(mean == 0)
    return Combined(mean, interval, tuple(values), False, p_value)


def _value(figure: Share | float) -> float:
    return figure.value if isinstance(figure, Share) else float(figure)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of a mean; None for fewer than two or infinite values."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    mean, count = float(np.mean(values)), len(values)
    reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1))
    return mean - reach / math.sqrt(count), mean + reach / math.sqrt(count)
