"""Figures with their uncertainty: Wilson intervals of fractions, paired differences.

A difference of two trained models has two sources of variance, the training seeds and the
test questions:

    seeds       s2 / S            s2: variance over the S seeds of the seeds' differences
    questions   q2 / (S Q)        q2: variance over a seed's Q questions, paired; divided
                                  by Q only if all seeds have the same questions

Both are added, with Student's quantile at Satterthwaite's (1946) degrees of freedom. So
three seeds that agree by chance keep the error of their questions, and many questions do
not hide that there are only three seeds. All other figures are bootstrapped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy import special

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Share:
    """A fraction of successes with its 95% Wilson interval.

    Source: Wilson (1927); it keeps its coverage near 0 and 1, where the normal
    interval does not.

    Attributes:
      successes: outcomes that are True.
      total: number of outcomes.
      design_effect: how many outcomes are worth one independent one, at least 1 (see
        `compute_grouped_share`).
    """

    successes: int
    total: int
    design_effect: float = 1.0

    @property
    def value(self) -> float:
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.96, self.total / self.design_effect, self.value
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
        } | ({} if self.design_effect == 1 else {"design_effect": self.design_effect})


def compute_share(outcomes: Sequence[bool]) -> Share:
    """The fraction of True among `outcomes`.

    Raises:
      ValueError: if there are none.
    """
    if len(outcomes) == 0:
        raise ValueError("a fraction of no outcomes is undefined")
    return Share(int(sum(bool(o) for o in outcomes)), len(outcomes))


def compute_grouped_share(successes: Sequence[int], totals: Sequence[int]) -> Share:
    """The fraction of True where several outcomes belong to the same question.

    Samples of one question, or codes of one image, are not independent: for an easy
    question all are right. The interval is that of fewer outcomes, by the design effect
    (Kish, 1965): the variance of the ratio over questions, divided by that of equally many
    independent outcomes.

    Args:
      successes: outcomes of each question that are True.
      totals: all outcomes of each question.

    Raises:
      ValueError: if there are no outcomes, or more successes than outcomes.
    """
    right, count = np.asarray(successes, np.int64), np.asarray(totals, np.int64)
    if right.shape != count.shape or right.ndim != 1 or not count.sum():
        raise ValueError(
            "grouped outcomes are counted question by question, at least one in all; "
            f"got {len(right)} counts of successes and {len(count)} totals"
        )
    if (right < 0).any() or (right > count).any():
        raise ValueError("a question has more successes than outcomes, or fewer than 0")
    p, num_questions = float(right.sum() / count.sum()), len(right)
    effect = 1.0
    if num_questions > 1 and 0 < p < 1:
        spread = float(np.square(right - p * count).sum())
        spread *= num_questions / (num_questions - 1)
        independent = p * (1 - p) * float(count.sum())
        effect = min(max(1.0, spread / independent), float(count.max()))
    return Share(int(right.sum()), int(count.sum()), effect)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of a whole set with its 95% percentile-bootstrap interval.

    `num_resamples` 0 means without an interval.
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

    Source: Efron (1979), percentile intervals. All figures of a resample use the same rows.

    Args:
      compute: rows of the items -> figures by name.
      total: number of items.
      num_resamples: 0 gives figures without intervals.
      seed: resample i depends only on (seed, i).

    Raises:
      ValueError: if there are no items.
    """
    if total < 1:
        raise ValueError("figures of no items are undefined")
    values = compute(np.arange(total))
    resampled: dict[str, list[float]] = {name: [] for name in values}
    for i in range(num_resamples):
        rng = np.random.default_rng([seed, i])
        for name, value in compute(rng.integers(0, total, total)).items():
            resampled[name].append(value)

    def interval(name: str) -> tuple[float, float] | None:
        if not resampled[name]:
            return None
        low, high = np.quantile(resampled[name], [0.025, 0.975])
        return float(low), float(high)

    return {
        name: Estimate(float(value), interval(name), total, num_resamples)
        for name, value in values.items()
    }


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference with its 95% interval over seeds and questions.

    Attributes:
      value: the mean of the first minus that of the second.
      interval: 95%.
      p_value: two-sided, of no difference.
      num_seeds: trainings of each of the two.
      num_questions: of each seed.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    num_seeds: int
    num_questions: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.3g} [{low:+.3g}, {high:+.3g}]"

    def to_json(self) -> dict[str, float | int | list[float]]:
        fields = dataclasses.asdict(self)
        return fields | {"interval95": list(fields.pop("interval"))}


def paired_difference(
    first: Float[np.ndarray, "seeds questions"],
    second: Float[np.ndarray, "seeds questions"],
    *,
    same_questions: bool = False,
) -> Difference:
    """The first minus the second, for the same questions.

    Args:
      first: outcome of every question, one row per seed.
      second: of the other model, with the same seeds and questions.
      same_questions: column j is the same question in all rows, so that more seeds do not
        mean more questions.

    Raises:
      ValueError: other shapes, or fewer than two questions.
    """
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    if first.shape != second.shape or first.ndim != 2 or 0 in first.shape:
        raise ValueError(
            "paired outcomes are [seeds, questions] of the same shape; got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    num_seeds, num_questions = first.shape
    if num_questions < 2:
        raise ValueError("the error of one question is unknown; ask at least two")
    differences = first - second
    if same_questions:
        of_questions = differences.mean(0).var(ddof=1) / num_questions
        freedom = num_questions - 1
    else:
        of_questions = differences.var(axis=1, ddof=1).mean() / differences.size
        freedom = num_seeds * (num_questions - 1)
    return _student_difference(
        differences.mean(1), float(of_questions), freedom, num_questions
    )


def difference_of_shares(first: Sequence[Share], second: Sequence[Share]) -> Difference:
    """The same for counted outcomes, one fraction per seed.

    It is unknown which questions were right, so there is no gain from pairing: the
    interval is at least as wide as that of `paired_difference`, unless the two models fail
    on different questions more often than by chance.

    Raises:
      ValueError: no seeds, or different numbers of them.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            "fractions are compared seed by seed, at least one; got "
            f"{len(first)} and {len(second)}"
        )
    values = np.array([a.value - b.value for a, b in zip(first, second, strict=True)])
    of_questions, freedom = 0.0, 0.0
    for share in (*first, *second):
        # Half an outcome more of each kind: 0 of 100 does not mean zero variance.
        p = (share.successes + 0.5) / (share.total + 1)
        independent = share.total / share.design_effect
        of_questions += p * (1 - p) / independent / len(values) ** 2
        freedom += max(1.0, independent - 1) / 2
    num_questions = min(share.total for share in (*first, *second))
    return _student_difference(values, of_questions, freedom, num_questions)


def _student_difference(
    by_seed: Float[np.ndarray, " seeds"],
    of_questions: float,
    question_freedom: float,
    num_questions: int,
) -> Difference:
    """Adds both variances; see the top of the file."""
    value, num_seeds = float(by_seed.mean()), len(by_seed)
    of_seeds = float(by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    variance = of_seeds + of_questions
    if variance == 0:
        return Difference(
            value, (value, value), float(value == 0), num_seeds, num_questions
        )
    parts = of_questions**2 / question_freedom
    if num_seeds > 1:
        parts += of_seeds**2 / (num_seeds - 1)
    freedom = variance**2 / parts
    error = math.sqrt(variance)
    reach = float(special.stdtrit(freedom, 0.975)) * error
    p_value = 2 * float(special.stdtr(freedom, -abs(value) / error))
    return Difference(
        value, (value - reach, value + reach), p_value, num_seeds, num_questions
    )


def adjust_holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """p-values corrected for many comparisons: each may be compared with 0.05.

    Source: Holm (1979), step down: the i-th smallest of n is multiplied by n - i + 1, and
    none is below an earlier one. The probability that any of them is below 0.05 without a
    real difference is then at most 5%, for any dependence.

    Raises:
      ValueError: a value outside 0..1.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value of {name!r} is {p}; it must be in 0..1")
    adjusted: dict[Name, float] = {}
    largest = 0.0
    order = sorted(p_values, key=lambda name: p_values[name])
    for i, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - i) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
