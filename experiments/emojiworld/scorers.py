"""Which thing an image shows, and which vendor's style it has: NumPy only, deterministic.

    thing   16x16 pixels and oriented gradients -> 200 principal components, minus the
            mean of the requested vendor -> whitened within training things
            -> the nearest of 100 mean images by *other* vendors
    house   colours, outlines and edges -> logistic regression

Both use RGB pixels of an image on white, since a generated image has no alpha, and are
trained only on training images. Every generated image is decoded by an image tokenizer,
which blurs the differences of vendors: the vendor is learned from original and from
reconstructed images.

    python experiments/emojiworld/scorers.py --data=out/emojiworld \\
        --tokenizer=out/emoji_tokenizer/vqgan

measures them on held-out images, on copies, and on wrong ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from emojiworld import features as features_lib
from emojiworld.drawings import Drawings, read_drawings
from emojiworld.features import (
    fit_pixels,
    shape_features,
    style_features,
    unit_rows,
)
from emojiworld.world import BY_NAME
from racm3_jax import storage
from racm3_jax.documents.images import resize_image
from racm3_jax.evaluation.fingerprints import describe_documents
from racm3_jax.tokenizers.image import ImageTokenizer

HOUSES_3 = ("openmoji", "fluent-emoji", "twemoji")
HOUSES_5 = ("noto", "twemoji", "openmoji", "fluent-emoji", "emojione")
_COPIED = "noto"
_NUM_PARTS = 200
# Principal components are computed from about this many images.
_MOST_FOR_PARTS = 1200
_RIDGE = 1e-4
# Of the logistic regression: added to standard deviations, weight decay, steps.
_FLOOR, _DECAY, _NUM_STEPS = 1e-2, 3e-3, 300
_DECODED_AT_ONCE = 128


class Codec(Protocol):
    """The interface of an image tokenizer: see `ImageTokenizer`."""

    @property
    def image_size(self) -> int: ...

    def encode(self, images: np.ndarray) -> np.ndarray: ...

    def decode(self, codes: np.ndarray) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


def reconstruct(codec: Codec, images: np.ndarray) -> UInt8[np.ndarray, "n size size 3"]:
    """Images reconstructed by a tokenizer, in its size."""
    size, found = codec.image_size, []
    starts = range(0, len(images), _DECODED_AT_ONCE)
    for start in tqdm(starts, "through the tokenizer", delay=5.0):
        some = images[start : start + _DECODED_AT_ONCE]
        resized = np.stack([resize_image(image, size) for image in some])
        found.append(codec.decode(codec.encode(resized)))
    return np.concatenate(found)


class _Fitted:
    """A scorer, whose fields are arrays and tuples of names."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {
            field.name: np.asarray(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        return cls(
            **{
                name: tuple(column.tolist()) if column.dtype.kind == "U" else column
                for name, column in arrays.items()
            }
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ThingScorer(_Fitted):
    """Identifies the thing of an image among the held-out ones.

    Attributes:
      things: to choose from.
      icon_sets: that may be requested.
      mean, parts: mean and principal components of the features of training images.
      whiten: makes differences within a thing equal in all directions.
      houses: mean of each icon set.
      sums: unit features of the real images, summed by icon set and thing.
    """

    things: tuple[str, ...]
    icon_sets: tuple[str, ...]
    mean: np.ndarray
    parts: np.ndarray
    whiten: np.ndarray
    houses: Float[np.ndarray, "icon_sets d"]
    sums: Float[np.ndarray, "icon_sets things d"]

    @classmethod
    def learn(cls, drawings: Drawings) -> ThingScorer:
        """Learns the features from "train", the mean images from "held_out"."""
        features = shape_features(fit_pixels(drawings.images))
        train = drawings.split == "train"
        mean = features[train].mean(0)
        centred = (features[train] - mean)[:: max(1, train.sum() // _MOST_FOR_PARTS)]
        parts = np.linalg.svd(centred, full_matrices=False)[2][:_NUM_PARTS].T
        rows = (features - mean) @ parts
        icon_sets = tuple(n for n in BY_NAME if n in set(drawings.icon_set[train]))
        sets = np.array([icon_sets.index(name) for name in drawings.icon_set])
        houses = np.stack(
            [rows[train & (sets == i)].mean(0) for i in range(len(icon_sets))]
        )
        rows = rows - houses[sets]
        own = np.unique(drawings.thing[train], return_inverse=True)[1]
        means = np.zeros((own.max() + 1, rows.shape[1]))
        np.add.at(means, own, rows[train])
        means /= np.bincount(own)[:, None]
        within = rows[train] - means[own]
        covariance = within.T @ within / len(within)
        covariance += _RIDGE * np.eye(len(covariance))
        whiten = np.linalg.cholesky(np.linalg.inv(covariance))
        things = tuple(dict.fromkeys(drawings.thing[~train].tolist()))
        unit = unit_rows(rows @ whiten)
        places = [things.index(thing) for thing in drawings.thing[~train]]
        sums = np.zeros((len(icon_sets), len(things), rows.shape[1]))
        np.add.at(sums, (sets[~train], places), unit[~train])
        return cls(things, icon_sets, mean, parts, whiten, houses, sums)

    def rank(
        self,
        images: Sequence[np.ndarray],
        icon_sets: Sequence[str],
        things: Sequence[str],
        left_out: str | None = None,
    ) -> Int[np.ndarray, " n"]:
        """How many things are more similar to each image than the requested one; 0 is right.

        Args:
          images: to identify.
          icon_sets: the requested ones; images of their vendors are not compared with.
          things: the requested ones.
          left_out: one more icon set whose images are not compared with.
        """
        rows = (shape_features(fit_pixels(images)) - self.mean) @ self.parts
        rows = rows - self.houses[[self.icon_sets.index(name) for name in icon_sets]]
        unit = unit_rows(rows @ self.whiten)
        ranks = np.zeros(len(rows), np.int64)
        for name in dict.fromkeys(icon_sets):
            own = np.flatnonzero(np.asarray(icon_sets) == name)
            house = BY_NAME[name].house
            compared = [
                sums
                for other, sums in zip(self.icon_sets, self.sums, strict=True)
                if BY_NAME[other].house != house and other != left_out
            ]
            references = unit_rows(np.sum(compared, axis=0))
            similarity = unit[own] @ references.T
            requested = similarity[
                np.arange(len(own)), [self.things.index(things[i]) for i in own]
            ]
            ranks[own] = (similarity > requested[:, None]).sum(1)
        return ranks


@dataclasses.dataclass(frozen=True, eq=False)
class VendorScorer(_Fitted):
    """Identifies the vendor of an image; multinomial logistic regression.

    Attributes:
      icon_sets: to choose from.
      mean, scale: of the features of training images.
      weights, offsets: of the classes.
    """

    icon_sets: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray

    @classmethod
    def learn(
        cls,
        features: Float[np.ndarray, "n d"],
        drawn_by: np.ndarray,
        icon_sets: Sequence[str],
    ) -> VendorScorer:
        """Learns from the training images of `icon_sets`.

        Args:
          features: of style, of all training images.
          drawn_by: the icon set of each.
          icon_sets: to choose from.
        """
        chosen = np.isin(drawn_by, icon_sets)
        features = features[chosen]
        mean, scale = features.mean(0), features.std(0) + _FLOOR
        classes = np.array([icon_sets.index(name) for name in drawn_by[chosen]])
        weights, offsets = _fit_logistic(
            (features - mean) / scale, np.eye(len(icon_sets))[classes]
        )
        return cls(tuple(icon_sets), mean, scale, weights, offsets)

    def name(self, images: Sequence[np.ndarray]) -> list[str]:
        """The most likely icon set of each image."""
        rows = (style_features(fit_pixels(images)) - self.mean) / self.scale
        best = (rows @ self.weights + self.offsets).argmax(1)
        return [self.icon_sets[i] for i in best]


def _fit_logistic(
    rows: Float[np.ndarray, "n d"], wanted: Float[np.ndarray, "n classes"]
) -> tuple[Float[np.ndarray, "d classes"], Float[np.ndarray, " classes"]]:
    """Weights by Nesterov's accelerated gradient descent from 0, deterministic."""
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
    """All scorers: of things, and of three and five vendors."""

    def __init__(self, thing: ThingScorer, houses: Sequence[VendorScorer]) -> None:
        self._thing = thing
        self._vendors = {len(scorer.icon_sets): scorer for scorer in houses}

    @classmethod
    def learn(cls, drawings: Drawings, codec: Codec | None = None) -> Verdicts:
        """Learns from the images of "train".

        Args:
          drawings: all images.
          codec: decodes the images to score: the vendor is learned from real and from
            reconstructed images. None: only from real ones.
        """
        chosen = (drawings.split == "train") & np.isin(drawings.icon_set, HOUSES_5)
        real, drawn_by = drawings.images[chosen], drawings.icon_set[chosen]
        features = style_features(fit_pixels(real))
        if codec is not None:
            blurred = style_features(fit_pixels(reconstruct(codec, real)))
            features = np.concatenate([features, blurred])
            drawn_by = np.concatenate([drawn_by, drawn_by])
        houses = [
            VendorScorer.learn(features, drawn_by, names)
            for names in (HOUSES_3, HOUSES_5)
        ]
        return cls(ThingScorer.learn(drawings), houses)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All learned arrays."""
        scorers: dict[str, _Fitted] = {"thing": self._thing}
        scorers |= {f"house{n}": scorer for n, scorer in self._vendors.items()}
        return {
            f"{name}/{field}": column
            for name, scorer in scorers.items()
            for field, column in scorer.to_arrays().items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Verdicts:
        """The inverse of `to_arrays`."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for key, column in arrays.items():
            name, _, field = key.partition("/")
            found.setdefault(name, {})[field] = column
        thing = ThingScorer.from_arrays(found.pop("thing"))
        return cls(thing, [VendorScorer.from_arrays(own) for own in found.values()])

    def judge(
        self,
        images: Sequence[np.ndarray],
        icon_sets: Sequence[str],
        things: Sequence[str],
        left_out: str | None = None,
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """1 where an image is right, 0 where not, NaN where a figure does not apply.

        "top1", "top5" of the thing; "house3", "house5" of images of those three or five
        vendors; "both" is top1 and house5.
        """
        images = fit_pixels(images)
        ranks = self._thing.rank(images, icon_sets, things, left_out)
        found = {"top1": (ranks < 1).astype(float), "top5": (ranks < 5).astype(float)}
        for count, scorer in self._vendors.items():
            requested = np.isin(icon_sets, scorer.icon_sets)
            right = np.array(scorer.name(images)) == np.asarray(icon_sets)
            found[f"house{count}"] = np.where(requested, right, np.nan)
        found["both"] = found["top1"] * found["house5"]
        return found


Figures = dict[str, dict[str, float]]


def open_verdicts(
    path: Path,
    drawings: Drawings,
    codec: Codec,
    say: Callable[[str], None] = print,
) -> tuple[Verdicts, Figures]:
    """The scorers for images of a tokenizer, trained and measured once, kept in `path`.

    Returns:
      (scorers, their results on known images: see `measure_scorers`).
    """
    digest = hashlib.sha256(json.dumps(describe_documents(drawings.documents)).encode())
    for part in (codec.fingerprint().encode(), *map(_read, (__file__, _FEATURES))):
        digest.update(part)
    fingerprint = digest.hexdigest()[:16]
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
        ceilings = json.loads(str(arrays.pop("ceilings")))
        if str(arrays.pop("fingerprint")) == fingerprint:
            return Verdicts.from_arrays(arrays), ceilings
    except (FileNotFoundError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # missing, or cut short: learned again
    say(f"learning the scorers, once; kept in {path}")
    verdicts = Verdicts.learn(drawings, codec)
    ceilings = measure_scorers(verdicts, drawings, codec)
    stream = io.BytesIO()
    facts: dict[str, Any] = {
        "ceilings": json.dumps(ceilings),
        "fingerprint": fingerprint,
    }
    np.savez_compressed(stream, **verdicts.to_arrays(), **facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_file(path, stream.getvalue())
    return verdicts, ceilings


_FEATURES = features_lib.__file__


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def measure_scorers(
    verdicts: Verdicts, drawings: Drawings, codec: Codec | None = None
) -> Figures:
    """Fractions by what is shown in place of generated images, all of them held out."""
    held_out = np.flatnonzero(drawings.split == "held_out")
    images = drawings.images
    if codec is not None:
        images = np.array(fit_pixels(drawings.images))
        images[held_out] = fit_pixels(reconstruct(codec, drawings.images[held_out]))
    noto = {drawings.thing[i]: i for i in held_out if drawings.icon_set[i] == _COPIED}
    others = [
        i
        for i in held_out
        if drawings.icon_set[i] != _COPIED and drawings.thing[i] in noto
    ]
    shuffled = np.random.default_rng(0).permutation(held_out)
    copied = np.array([noto[drawings.thing[i]] for i in others])
    shown = {
        "real drawings": (drawings.images, held_out, held_out, None),
        "Noto's drawing": (images, copied, np.array(others), _COPIED),
        "a random drawing": (images, shuffled, held_out, None),
    }
    if codec is not None:
        shown["through the tokenizer"] = (images, held_out, held_out, None)
    return {
        name: {
            key: float(np.nanmean(values))
            for key, values in verdicts.judge(
                list(images_shown[own]),
                drawings.icon_set[requested].tolist(),
                drawings.thing[requested].tolist(),
                left_out,
            ).items()
        }
        for name, (images_shown, own, requested, left_out) in shown.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures the scorers on held-out images, copies and random images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of fetch.py")
    parser.add_argument(
        "--tokenizer", type=Path, help="its folder; none: the scorers of real images"
    )
    options = parser.parse_args(arguments)
    try:
        drawings = read_drawings(options.data)
        codec = ImageTokenizer.load(options.tokenizer) if options.tokenizer else None
    except (ValueError, OSError) as error:
        print(f"scorers.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    verdicts = Verdicts.learn(drawings, codec)
    for name, figures in measure_scorers(verdicts, drawings, codec).items():
        words = ", ".join(f"{key} {value:.1%}" for key, value in figures.items())
        print(f"{name}: {words}")


if __name__ == "__main__":
    main()
