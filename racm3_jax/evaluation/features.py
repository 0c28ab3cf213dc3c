"""Distances of generated images from real ones: KID, precision, recall, and all others."""

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
    """KID with the standard deviation over its subsets."""

    value: float
    standard_deviation: float


class Coverage(NamedTuple):
    """Fraction of generated images near real ones, and of real ones near generated ones."""

    precision: float
    recall: float


def kernel_distance(
    real: Float[np.ndarray, "real d"],
    generated: Float[np.ndarray, "generated d"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the kernel (x·y/d + 1)^3.

    Mean and standard deviation over subsets sampled without replacement; a set smaller
    than `subset_size` gives subsets of its own size. Times 1000 to compare with papers.

    Raises:
      ValueError: for fewer than 2 images in either set.
    """
    _check(real, generated)
    size = min(subset_size, len(real), len(generated))
    if size == len(real) == len(generated):
        num_subsets = 1  # all subsets would be the same
    rng = np.random.default_rng(seed)
    values = [
        _squared_mmd(
            real[rng.choice(len(real), size, replace=False)],
            generated[rng.choice(len(generated), size, replace=False)],
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
    generated: Float[np.ndarray, "generated d"],
    *,
    num_neighbours: int = 3,
) -> Coverage:
    """Improved precision and recall (arXiv 1904.06991).

    An image is covered by a set if it is within the distance of some image of the set to
    that image's `num_neighbours`-th nearest neighbour in the set.

    Raises:
      ValueError: for a set with no more than `num_neighbours` images.
    """
    _check(real, generated, num_neighbours + 1)
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return Coverage(
        float(_covered(generated, real, num_neighbours).mean()),
        float(_covered(real, generated, num_neighbours).mean()),
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


def _check(real: np.ndarray, generated: np.ndarray, least: int = 2) -> None:
    if len(real) < least or len(generated) < least:
        raise ValueError(
            f"each set needs at least {least} images; got {len(real)} real and "
            f"{len(generated)} generated"
        )


class FeatureExtractor(Protocol):
    """`InceptionFeatures` or `CLIPFeatures`."""

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float32[np.ndarray, "images d"]:
        """One row per image."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the features."""
        ...


def open_statistics(
    path: Path, about: Mapping[str, Any], real: Float32[np.ndarray, "real d"]
) -> FeatureStatistics:
    """Statistics of the real images: saved ones, if of these pixels and this network.

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
    generated: Float32[np.ndarray, "generated d"],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The Fréchet distance with its interval, KID, precision and recall.

    The real images are a fixed reference: only the generated ones are resampled. A
    resample repeats images, which increases a Fréchet distance: the interval shows the
    variance of the figure and may be above it.

    Args:
      name: of the network, the prefix of the figures' names.
      reference: statistics of `real`.
      real: features of the real images.
      generated: features of the generated ones.
      num_resamples: of the interval.
      seed: of the resamples.
    """

    def distance(rows: Int[np.ndarray, " rows"]) -> dict[str, float]:
        found = FeatureStatistics.of(generated[rows])
        return {f"{name}_frechet": frechet_distance(reference, found)}

    figures: dict[str, Any] = dict(
        bootstrap(distance, len(generated), num_resamples=num_resamples, seed=seed)
    )
    kernel = kernel_distance(real, generated, seed=seed)
    figures[f"{name}_kernel"] = kernel.value
    figures[f"{name}_kernel_deviation"] = kernel.standard_deviation
    if min(len(real), len(generated)) > 3:
        coverage = precision_and_recall(real, generated)
        figures[f"{name}_precision"] = coverage.precision
        figures[f"{name}_recall"] = coverage.recall
    return figures
