"""Which thing a picture shows, and whose style it has: NumPy alone, deterministic.

    thing   16x16 pixels and oriented gradients -> 200 principal parts, less the mean of
            the house that was asked for -> whitened within the things of training
            -> the nearest of 100 mean drawings by *other* houses
    house   colours, outlines and edges -> logistic regression

Both look at RGB pixels of a drawing on white, since a generated picture has no alpha, and
learn from the drawings of training alone. `python experiments/emojiworld/scorers.py`
measures them on real held-out drawings.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from emojiworld.drawings import Drawings, read_drawings
from emojiworld.world import BY_NAME

Pixels = UInt8[np.ndarray, "n 64 64 3"]
SIDE = 64
HOUSES_3 = ("openmoji", "fluent-emoji", "twemoji")
HOUSES_5 = ("noto", "twemoji", "openmoji", "fluent-emoji", "emojione")
_COPIED = "noto"
_NUM_PARTS = 200
# Principal parts are computed from about this many drawings.
_MOST_FOR_PARTS = 1200
_RIDGE = 1e-4
_TINY = 1e-6
# Of the logistic regression: added to standard deviations, weight decay, steps.
_FLOOR, _DECAY, _NUM_STEPS = 1e-2, 3e-3, 300


def fit_pixels(images: Sequence[np.ndarray]) -> Pixels:
    """Pictures of any size as the scorers look at them."""
    return np.stack(
        [
            image
            if image.shape[:2] == (SIDE, SIDE)
            else np.asarray(
                Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
            )
            for image in images
        ]
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + _TINY)


def _gradients(
    grey: Float32[np.ndarray, "n 64 64"],
) -> tuple[Float32[np.ndarray, "n 64 64"], Float32[np.ndarray, "n 64 64"]]:
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    return down, right


def oriented_gradients(
    grey: Float32[np.ndarray, "n 64 64"], cells: int = 8, bins: int = 9
) -> Float32[np.ndarray, "n d"]:
    """HOG without blocks: root of the gradient sums of each cell and direction, unit."""
    down, right = _gradients(grey)
    strength = np.hypot(right, down)
    angle = (
        np.floor((np.arctan2(down, right) % np.pi) / np.pi * bins).astype(int) % bins
    )
    n, step = len(grey), SIDE // cells
    sums = [
        np.where(angle == b, strength, 0)
        .reshape(n, cells, step, cells, step)
        .sum((2, 4))
        for b in range(bins)
    ]
    return _unit(np.sqrt(np.stack(sums, -1)).reshape(n, -1))


def shape_features(images: Pixels) -> Float32[np.ndarray, "n d"]:
    """What is drawn: coarse pixels about their mean, and oriented gradients."""
    rgb = images.astype(np.float32) / 255
    pixels = rgb.reshape(len(rgb), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(rgb), -1)
    pixels = _unit(pixels - pixels.mean(1, keepdims=True))
    return _unit(
        np.concatenate([pixels, 1.2 * oriented_gradients(rgb.mean(-1))], axis=1)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ThingScorer:
    """Names the thing of a picture, out of the held-out ones.

    Attributes:
      things: what is chosen from.
      _mean, _parts: of the features of training drawings, and their principal parts.
      _whiten: makes differences within a thing equal in all directions.
      _houses: mean of each icon set.
      _sums: unit features of the real drawings, summed by thing and icon set.
    """

    things: tuple[str, ...]
    _mean: np.ndarray
    _parts: np.ndarray
    _whiten: np.ndarray
    _houses: dict[str, np.ndarray]
    _sums: dict[str, np.ndarray]

    @classmethod
    def learn(cls, drawings: Drawings) -> ThingScorer:
        """Learns the features from "train", the mean drawings from "held_out"."""
        features = shape_features(drawings.images)
        train = drawings.split == "train"
        mean = features[train].mean(0)
        centred = (features[train] - mean)[:: max(1, train.sum() // _MOST_FOR_PARTS)]
        parts = np.linalg.svd(centred, full_matrices=False)[2][:_NUM_PARTS].T
        rows = (features - mean) @ parts
        houses = {
            name: rows[train & (drawings.icon_set == name)].mean(0)
            for name in BY_NAME
            if (train & (drawings.icon_set == name)).any()
        }
        rows = rows - np.stack([houses[name] for name in drawings.icon_set])
        own = np.unique(drawings.thing[train], return_inverse=True)[1]
        means = np.zeros((own.max() + 1, rows.shape[1]))
        np.add.at(means, own, rows[train])
        means /= np.bincount(own)[:, None]
        within = rows[train] - means[own]
        covariance = within.T @ within / len(within)
        covariance += _RIDGE * np.eye(len(covariance))
        whiten = np.linalg.cholesky(np.linalg.inv(covariance))
        things = tuple(dict.fromkeys(drawings.thing[~train].tolist()))
        unit = _unit(rows @ whiten)
        places = {thing: i for i, thing in enumerate(things)}
        sums = {name: np.zeros((len(things), rows.shape[1])) for name in houses}
        for i in np.flatnonzero(~train):
            sums[drawings.icon_set[i]][places[drawings.thing[i]]] += unit[i]
        return cls(things, mean, parts, whiten, houses, sums)

    def rank(
        self,
        images: Sequence[np.ndarray],
        icon_sets: Sequence[str],
        things: Sequence[str],
        left_out: str | None = None,
    ) -> Int[np.ndarray, " n"]:
        """How many things look more like each picture than the asked one; 0 is right.

        Args:
          images: to name.
          icon_sets: that were asked for, whose own drawings (and its twin's) are not
            compared with.
          things: that were asked for.
          left_out: one more icon set whose drawings are not compared with.
        """
        rows = (shape_features(fit_pixels(images)) - self._mean) @ self._parts
        rows = rows - np.stack([self._houses[name] for name in icon_sets])
        unit = _unit(rows @ self._whiten)
        ranks = np.zeros(len(rows), np.int64)
        for name in dict.fromkeys(icon_sets):
            own = np.flatnonzero(np.asarray(icon_sets) == name)
            house = BY_NAME[name].house
            compared = [
                sums
                for other, sums in self._sums.items()
                if BY_NAME[other].house != house and other != left_out
            ]
            references = _unit(np.sum(compared, axis=0))
            likeness = unit[own] @ references.T
            asked = likeness[
                np.arange(len(own)), [self.things.index(things[i]) for i in own]
            ]
            ranks[own] = (likeness > asked[:, None]).sum(1)
        return ranks


def style_features(images: Pixels) -> Float[np.ndarray, "n d"]:
    """How it is drawn: colours, outlines, edges and shades, of what is not white."""
    n = len(images)
    grey = images.astype(np.float32).mean(-1) / 255
    ink = images.min(-1) < 250
    count = np.maximum(ink.sum((1, 2)), 1)
    out: list[np.ndarray] = []
    for step, levels in ((43, 6), (26, 10)):
        cells = (images // step).astype(np.int64) @ [levels**2, levels, 1]
        out.append(np.sqrt(_histogram(cells, ink, levels**3) / count[:, None]))
    down, right = _gradients(grey)
    edge = np.maximum(np.abs(down), np.abs(right))
    strength = np.clip((np.log10(edge + 1e-4) + 4) * 6, 0, 23).astype(np.int64)
    out.append(np.sqrt(_histogram(strength, ink, 24) / count[:, None]))
    inner = ink.copy()
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        inner &= np.roll(ink, step, axis)
    shades = np.clip(grey * 16, 0, 15).astype(np.int64)
    for part in (ink & ~inner, ink, inner):
        total = np.maximum(part.sum((1, 2)), 1)[:, None]
        out.append(np.sqrt(_histogram(shades, part, 16) / total))
    rgb = images.astype(np.float32)
    flat = (np.ptp(rgb, axis=-1) * ink).sum((1, 2)) / count / 255
    dark = ((images.max(-1) < 40) & ink).sum((1, 2)) / count
    still = ((edge < 0.004) & ink).sum((1, 2)) / count
    distinct = [
        len(np.unique((image[mask] // 8).astype(np.int64) @ [1, 32, 1024])) / c
        for image, mask, c in zip(images, ink, count, strict=True)
    ]
    area = count / (SIDE * SIDE)
    out.append(np.stack([flat, dark, still, np.sqrt(distinct), area], 1))
    return np.concatenate(out, axis=1).reshape(n, -1)


def _histogram(
    values: Int[np.ndarray, "n 64 64"], mask: np.ndarray, bins: int
) -> Float[np.ndarray, "n bins"]:
    """Counts of each picture's values under its mask."""
    n = len(values)
    offset = values + bins * np.arange(n)[:, None, None]
    return np.bincount(offset[mask], minlength=n * bins).reshape(n, bins).astype(float)


@dataclasses.dataclass(frozen=True, eq=False)
class HouseScorer:
    """Names the house of a picture, out of some; multinomial logistic regression.

    Attributes:
      icon_sets: what is chosen from.
      _mean, _scale: of the features of training drawings.
      _weights, _offsets: of the classes.
    """

    icon_sets: tuple[str, ...]
    _mean: np.ndarray
    _scale: np.ndarray
    _weights: np.ndarray
    _offsets: np.ndarray

    @classmethod
    def learn(cls, drawings: Drawings, icon_sets: Sequence[str]) -> HouseScorer:
        """Learns from the drawings of "train" by these icon sets."""
        chosen = (drawings.split == "train") & np.isin(drawings.icon_set, icon_sets)
        features = style_features(drawings.images[chosen])
        mean, scale = features.mean(0), features.std(0) + _FLOOR
        classes = np.array([icon_sets.index(n) for n in drawings.icon_set[chosen]])
        weights, offsets = _fit_logistic(
            (features - mean) / scale, np.eye(len(icon_sets))[classes]
        )
        return cls(tuple(icon_sets), mean, scale, weights, offsets)

    def name(self, images: Sequence[np.ndarray]) -> list[str]:
        """The likeliest icon set of each picture."""
        rows = (style_features(fit_pixels(images)) - self._mean) / self._scale
        best = (rows @ self._weights + self._offsets).argmax(1)
        return [self.icon_sets[i] for i in best]


def _fit_logistic(
    rows: Float[np.ndarray, "n d"], wanted: Float[np.ndarray, "n classes"]
) -> tuple[Float[np.ndarray, "d classes"], Float[np.ndarray, " classes"]]:
    """Weights by Nesterov's accelerated descent from 0, which needs no randomness."""
    n, step = len(rows), 1 / (_largest_curvature(rows) + _DECAY)
    weights, offsets = (
        np.zeros((rows.shape[1], wanted.shape[1])),
        np.zeros(len(wanted[0])),
    )
    ahead, ahead_offsets, pace = weights, offsets, 1.0
    for _ in range(_NUM_STEPS):
        logits = rows @ ahead + ahead_offsets
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        error = (chances - wanted) / n
        new = ahead - step * (rows.T @ error + _DECAY * ahead)
        new_offsets = ahead_offsets - 2 * error.sum(0)
        faster = (1 + np.sqrt(1 + 4 * pace * pace)) / 2
        push = (pace - 1) / faster
        ahead = new + push * (new - weights)
        ahead_offsets = new_offsets + push * (new_offsets - offsets)
        weights, offsets, pace = new, new_offsets, faster
    return weights, offsets


def _largest_curvature(rows: Float[np.ndarray, "n d"]) -> float:
    """A bound of the loss's second derivative: half the largest eigenvalue."""
    vector = np.ones(rows.shape[1])
    for _ in range(30):
        vector = rows.T @ (rows @ vector) / len(rows)
        size = float(np.linalg.norm(vector))
        vector /= size
    return 0.55 * size


class Verdicts:
    """All scorers of a world.

    Args:
      drawings: all of it.
    """

    def __init__(self, drawings: Drawings) -> None:
        self._thing = ThingScorer.learn(drawings)
        self._houses = {
            len(names): HouseScorer.learn(drawings, names)
            for names in (HOUSES_3, HOUSES_5)
        }

    def judge(
        self,
        images: Sequence[np.ndarray],
        icon_sets: Sequence[str],
        things: Sequence[str],
        left_out: str | None = None,
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """1 where a picture is right, 0 where not, NaN where it is not asked.

        "top1", "top5" of the thing; "house3", "house5" of pictures that were asked of one
        of those houses; "both" is top1 and house5.
        """
        images = fit_pixels(images)
        ranks = self._thing.rank(images, icon_sets, things, left_out)
        found = {"top1": (ranks < 1).astype(float), "top5": (ranks < 5).astype(float)}
        for count, scorer in self._houses.items():
            asked = np.isin(icon_sets, scorer.icon_sets)
            right = np.array(scorer.name(images)) == np.asarray(icon_sets)
            found[f"house{count}"] = np.where(asked, right, np.nan)
        found["both"] = found["top1"] * found["house5"]
        return found


def main(arguments: list[str] | None = None) -> None:
    """Measures the scorers on real held-out drawings, beside copies and random ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of fetch.py")
    options = parser.parse_args(arguments)
    try:
        drawings = read_drawings(options.data)
    except ValueError as error:
        print(f"scorers.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, figures in measure_scorers(drawings).items():
        words = ", ".join(f"{key} {value:.1%}" for key, value in figures.items())
        print(f"{name}: {words}")


def measure_scorers(drawings: Drawings) -> dict[str, dict[str, float]]:
    """Shares by what stands in for the generated pictures."""
    verdicts = Verdicts(drawings)
    held_out = np.flatnonzero(drawings.split == "held_out")
    noto = {drawings.thing[i]: i for i in held_out if drawings.icon_set[i] == _COPIED}
    others = [
        i
        for i in held_out
        if drawings.icon_set[i] != _COPIED and drawings.thing[i] in noto
    ]
    shuffled = np.random.default_rng(0).permutation(held_out)
    shown = {
        "real drawings": (held_out, held_out, None),
        "copies of Noto's drawing": (
            np.array([noto[drawings.thing[i]] for i in others]),
            np.array(others),
            _COPIED,
        ),
        "a random held-out drawing": (shuffled, held_out, None),
    }
    return {
        name: {
            key: float(np.nanmean(values))
            for key, values in verdicts.judge(
                drawings.images[pictures],
                drawings.icon_set[asked].tolist(),
                drawings.thing[asked].tolist(),
                left_out,
            ).items()
        }
        for name, (pictures, asked, left_out) in shown.items()
    }


if __name__ == "__main__":
    main()
