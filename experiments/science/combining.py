"""Seeds -> a mean with its 95% interval; the difference of two conditions, seed by seed.

A share has two sources of chance, the nations of a seed and the seed itself. Its interval
is the wider of two at each end: Student's t over the seeds, and Wilson's of the outcomes
of all seeds together, which stays honest where all seeds say 0% or 100%.

A difference of shares carries the error of the questions and that of the seeds (see
`evaluation.intervals`): three seeds that happen to agree are no certainty.
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
    """A figure over the seeds.

    Attributes:
      value: the mean of the seeds.
      interval: 95%; None of a single seed without outcomes.
      seeds: the figure of each seed.
      is_share: it counts outcomes.
      p_value: of a difference, two-sided, not corrected for others; None where it is
        none, or of fewer than two seeds.
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
    """The figure of all seeds.

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
    """The figure less that of the reference, of each seed, with its interval."""
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
    """95% of the mean by Student's t; None of fewer than two values, or infinite ones."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    mean, count = float(np.mean(values)), len(values)
    reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1))
    return mean - reach / math.sqrt(count), mean + reach / math.sqrt(count)
