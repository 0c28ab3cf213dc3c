"""From outcomes to a table: fractions with intervals, differences, FID, memorisation.

All images of a thing are easy or hard together, and all sampling seeds have the same
items: intervals resample and count things (a hundred, not thousands of images).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from emojiworld.features import fit_pixels, shape_features
from racm3_jax.evaluation.clip_score import CLIPFeatures
from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import (
    Estimate,
    Share,
    adjust_holm,
    bootstrap,
    compute_grouped_share,
    paired_difference,
)

# Outcomes of a condition by figure: 1, 0 or NaN where it does not apply.
Outcomes = Mapping[str, Float[np.ndarray, "seeds items"]]
COLUMNS = {
    "top1": "thing right",
    "top5": "among 5",
    "house3": "house right, of 3",
    "house5": "of 5",
    "both": "both right",
    "followed": "shows the other thing",
    "shown": "a document shows the thing",
    "named": "caption names the thing",
    "fid": "FID ↓ (own features)",
    "bits": "bits an image ↓",
    "memorised": "nearer to training than real ones",
}
_ALMOST_ALL = 0.95
_NUM_RESAMPLES = 1000


def combine_outcomes(
    outcomes: Float[np.ndarray, "seeds items"], things: Sequence[str]
) -> Share | None:
    """The fraction over all seeds, with the interval of one question per thing."""
    own = np.unique(things, return_inverse=True)[1]
    applies = np.isfinite(outcomes)
    right = np.bincount(own, np.nansum(outcomes, 0))
    total = np.bincount(own, applies.sum(0))
    if not total.sum():
        return None
    kept = total > 0
    return compute_grouped_share(
        right[kept].astype(np.int64), total[kept].astype(np.int64)
    )


def thing_means(
    outcomes: Float[np.ndarray, "seeds items"], things: Sequence[str]
) -> Float[np.ndarray, "seeds things"]:
    """The fraction of each thing that has outcomes."""
    own = np.unique(things, return_inverse=True)[1]
    applies = np.isfinite(outcomes)
    rows = [
        np.bincount(own, np.nan_to_num(row)) / np.maximum(np.bincount(own, there), 1)
        for row, there in zip(outcomes, applies, strict=True)
    ]
    return np.stack(rows)[:, np.bincount(own, applies[0]) > 0]


def text_to_image_ranks(
    texts: Float32[np.ndarray, "items d_embed"],
    images: Float32[np.ndarray, "items d_embed"],
) -> Int[np.ndarray, " items"]:
    """How many images are more similar to each caption than its own one."""
    similarity = texts @ images.T
    return (similarity > np.diag(similarity)[:, None]).sum(1)


def combine_bits(
    bits: Float[np.ndarray, " items"], things: Sequence[str], seed: int = 0
) -> Estimate:
    """Mean bits per image; things are resampled."""
    own = np.unique(things, return_inverse=True)[1]
    total, count = np.bincount(own, bits), np.bincount(own)

    def mean(rows: Int[np.ndarray, " things"]) -> dict[str, float]:
        return {"bits": float(total[rows].sum() / count[rows].sum())}

    return bootstrap(mean, len(total), num_resamples=_NUM_RESAMPLES, seed=seed)["bits"]


def saved_bits(
    bits: Float[np.ndarray, " items"],
    reference: Float[np.ndarray, " items"],
    things: Sequence[str],
) -> Estimate:
    """The fraction of bits saved, relative to the reference."""
    own = np.unique(things, return_inverse=True)[1]
    mine, theirs = np.bincount(own, bits), np.bincount(own, reference)

    def saved(rows: Int[np.ndarray, " things"]) -> dict[str, float]:
        return {"saved": float(1 - mine[rows].sum() / theirs[rows].sum())}

    return bootstrap(saved, len(mine), num_resamples=_NUM_RESAMPLES)["saved"]


def compare_conditions(
    first: Mapping[str, Outcomes], reference: Outcomes, things: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Differences of every condition from a reference, by condition and figure.

    Seeds that both have are paired; p-values are Holm's, over all of them.
    """
    differences = {}
    for condition, outcomes in first.items():
        for name in outcomes.keys() & reference.keys():
            seeds = min(len(outcomes[name]), len(reference[name]))
            mine = thing_means(outcomes[name][:seeds], things)
            theirs = thing_means(reference[name][:seeds], things)
            if mine.shape[1] > 1:
                differences[condition, name] = paired_difference(
                    mine, theirs, same_questions=True
                )
    adjusted = adjust_holm({key: d.p_value for key, d in differences.items()})
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (condition, name), difference in sorted(differences.items()):
        record = difference.to_json() | {"p_value_holm": adjusted[condition, name]}
        found.setdefault(condition, {})[name] = record
    return found


def compute_distance(
    images: Sequence[np.ndarray], real: Sequence[np.ndarray], features: CLIPFeatures
) -> float:
    """FID on CLIP's features, scaled to a mean square of 1."""

    def read(pictures: Sequence[np.ndarray]) -> FeatureStatistics:
        unit = features(list(pictures))
        return FeatureStatistics.of(unit * np.sqrt(unit.shape[1]))

    return frechet_distance(read(real), read(images))


class Nearest:
    """The nearest training image, by the thing scorer's features.

    Args:
      training: the training images of the models.
      real: held-out images, for the usual distance; reconstructed by the model's
        tokenizer, like generated images.
    """

    def __init__(
        self, training: Sequence[np.ndarray], real: Sequence[np.ndarray]
    ) -> None:
        self._training = shape_features(fit_pixels(training))
        self.usual = float(np.quantile(self.find(real)[1], _ALMOST_ALL))

    def find(
        self, images: Sequence[np.ndarray]
    ) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """(position in `training`, cosine) of each image's nearest image."""
        similarity = shape_features(fit_pixels(images)) @ self._training.T
        best = similarity.argmax(1)
        return best, similarity[np.arange(len(best)), best]

    def memorised(self, images: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
        """1 where an image is nearer than 95% of real held-out images."""
        return (self.find(images)[1] > self.usual).astype(float)


def format_table(
    rows: Mapping[str, Mapping[str, Share | Estimate | float]],
    titles: Mapping[str, str],
) -> str:
    """Markdown: one row per condition, the columns that any of them has."""
    return _format({titles[name]: row for name, row in rows.items()}, _show)


def format_ceilings(ceilings: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the scorers' results on known images, one row each."""
    return _format(ceilings, "{:.1%}".format)


def _format(rows: Mapping[str, Mapping[str, Any]], show: Callable[[Any], str]) -> str:
    names = [n for n in COLUMNS if any(n in row for row in rows.values())]
    lines = [
        "| | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for title, row in rows.items():
        cells = [show(row[name]) if name in row else "-" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _show(figure: Share | Estimate | float) -> str:
    if isinstance(figure, Estimate):
        low, high = figure.interval or (figure.value, figure.value)
        return f"{figure.value:.1f} [{low:.1f}, {high:.1f}]"
    return str(figure) if isinstance(figure, Share) else f"{figure:.2f}"
