"""How far generated images are from real ones: Fréchet, kernel, precision, recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int, UInt8

from racm3_jax.evaluation.features import kernel_distance, precision_and_recall
from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import bootstrap


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
