"""How far drawn images are from real ones: KID, precision, recall, and all distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8

from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import bootstrap

_BLOCK = 1024


class KernelDistance(NamedTuple):
    """KID with the spread of its subsets."""

    value: float
    standard_deviation: float


class Coverage(NamedTuple):
    """Share of drawn images near real ones, and of real ones near drawn ones."""

    precision: float
    recall: float


def kernel_distance(
    real: Float[np.ndarray, "real d"],
    drawn: Float[np.ndarray, "drawn d"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the kernel (x·y/d + 1)^3.

    Mean and standard deviation over subsets drawn without replacement; a set smaller than
    `subset_size` gives subsets of its own size. Multiply by 1000 to compare with papers.

    Raises:
      ValueError: for fewer than 2 images on a side.
    """
    _check(real, drawn)
    size = min(subset_size, len(real), len(drawn))
    if size == len(real) == len(drawn):
        num_subsets = 1  # all subsets would be the same
    rng = np.random.default_rng(seed)
    values = [
        _squared_mmd(
            real[rng.choice(len(real), size, replace=False)],
            drawn[rng.choice(len(drawn), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(
    x: Float[np.ndarray, "size d"], y: Float[np.ndarray, "size d"]
) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size, d = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        value = a @ b.T / d + 1
        return value * value * value  # several times as fast as a power

    within = [kernel(a, a) for a in (x, y)]
    off_diagonal = sum(k.sum() - np.trace(k) for k in within)
    return float(off_diagonal / (size * (size - 1)) - 2 * kernel(x, y).mean())


def precision_and_recall(
    real: Float[np.ndarray, "real d"],
    drawn: Float[np.ndarray, "drawn d"],
    *,
    num_neighbours: int = 3,
) -> Coverage:
    """Improved precision and recall (arXiv 1904.06991).

    An image is covered by a set if it is within the distance of some image of the set to
    that image's `num_neighbours`-th nearest neighbour in the set.

    Raises:
      ValueError: for a set with no more than `num_neighbours` images.
    """
    _check(real, drawn, num_neighbours + 1)
    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    return Coverage(
        float(_covered(drawn, real, num_neighbours).mean()),
        float(_covered(real, drawn, num_neighbours).mean()),
    )


def _covered(
    images: Float64[np.ndarray, "images d"],
    others: Float64[np.ndarray, "others d"],
    num_neighbours: int,
) -> Bool[np.ndarray, " images"]:
    covered = np.zeros(len(images), bool)
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        # Position 0 of a sorted row is the image itself, at distance 0.
        within = np.partition(_squared_distances(block, others), num_neighbours, axis=1)
        radii = within[:, num_neighbours]
        for begin in range(0, len(images), _BLOCK):
            some = slice(begin, begin + _BLOCK)
            near = _squared_distances(images[some], block) <= radii
            covered[some] |= near.any(axis=1)
    return covered


def _squared_distances(
    a: Float64[np.ndarray, "a d"], b: Float64[np.ndarray, "b d"]
) -> Float64[np.ndarray, "a b"]:
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.maximum(squares, 0)


def _check(real: np.ndarray, drawn: np.ndarray, least: int = 2) -> None:
    if len(real) < least or len(drawn) < least:
        raise ValueError(
            f"at least {least} images a side are needed; got {len(real)} real and "
            f"{len(drawn)} drawn"
        )


class FeatureExtractor(Protocol):
    """`InceptionFeatures` or `CLIPFeatures`."""

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float32[np.ndarray, "images d"]:
        """One row an image."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the features depend on."""
        ...


def open_statistics(
    path: Path, about: Mapping[str, Any], real: Float32[np.ndarray, "real d"]
) -> FeatureStatistics:
    """Of the real images: the saved ones where they are of these pixels and network.

    Raises:
      ValueError: a damaged file, or one of other pixels or another network.
    """
    if path.exists():
        return FeatureStatistics.load(path, about)
    statistics = FeatureStatistics.of(real)
    statistics.save(path, about)
    return statistics


def compute_distances(
    name: str,
    reference: FeatureStatistics,
    real: Float32[np.ndarray, "real d"],
    drawn: Float32[np.ndarray, "drawn d"],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The Fréchet distance with its interval, KID, precision and recall.

    The real images are the fixed reference, so that only the drawn ones are resampled. A
    resample repeats images, which raises a Fréchet distance: the interval shows the
    spread of the figure and may be above it.

    Args:
      name: of the network, begins the figures' names.
      reference: statistics of `real`.
      real: features of the real images.
      drawn: of the generated ones.
      num_resamples: of the interval.
      seed: of the resamples.
    """

    def distance(rows: Int[np.ndarray, " rows"]) -> dict[str, float]:
        found = FeatureStatistics.of(drawn[rows])
        return {f"{name}_frechet": frechet_distance(reference, found)}

    figures: dict[str, Any] = dict(
        bootstrap(distance, len(drawn), num_resamples=num_resamples, seed=seed)
    )
    kernel = kernel_distance(real, drawn, seed=seed)
    figures[f"{name}_kernel"] = kernel.value
    figures[f"{name}_kernel_deviation"] = kernel.standard_deviation
    if min(len(real), len(drawn)) > 3:
        coverage = precision_and_recall(real, drawn)
        figures[f"{name}_precision"] = coverage.precision
        figures[f"{name}_recall"] = coverage.recall
    return figures
