"""Finds the flag in an image and names its nation, by analysis by synthesis.

The window at every placement of every flag size is reduced to a thumbnail and compared
with the thumbnails of all nations at that size: first coarsely (4x6 cells, every 4
pixels) with every nation, then finely (8x12 cells, every 2 pixels) with the best few.

A placement's score is how much better the flag explains its window than the scene does:

    score = area * (mean of min(scene's error, TOLERANCE) - flag's mean squared error)

The scene is the background that fits most of the image. So a sea below a sky is not a
flag of two bands, and a whole flag beats a part of it that looks like another flag.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from racm3_jax.flagworld.world.config import FLAG_SIZES, REFERENCE_SIZE
from racm3_jax.flagworld.world.designs import (
    THUMBNAIL_SHAPE,
    resample_matrix,
    thumbnails,
)
from racm3_jax.flagworld.world.nations import Nation
from racm3_jax.flagworld.world.scenes import (
    NUM_VARIANTS,
    SCENES,
    render_scene,
)

# Squared error (0..1 a channel, averaged over RGB) from which a pixel is unexplained.
TOLERANCE = 0.06
_COARSE_SHAPE = (THUMBNAIL_SHAPE[0] // 2, THUMBNAIL_SHAPE[1] // 2)
_COARSE_STRIDE = 4
_FINE_STRIDE = 2
_NUM_FINALISTS = 32
_SCENE_CELLS = 16


@functools.lru_cache(maxsize=64)
def _shrinkers(
    length: int, image_size: int, cells: int, stride: int
) -> Float32[np.ndarray, "placements cells image_size"]:
    """Matrices that average each window's cells along one axis."""
    starts = range(0, image_size - length + 1, stride)
    out = np.zeros((len(starts), cells, image_size), np.float32)
    for matrix, start in zip(out, starts, strict=True):
        matrix[:, start : start + length] = resample_matrix(length, cells)
    return out


def _windows(
    pixels: Float32[np.ndarray, "size size channels"],
    flag_size: tuple[int, int],
    shape: tuple[int, int],
    stride: int,
) -> Float32[np.ndarray, "placements features"]:
    """The thumbnails of all placements of a flag, as flat rows like `thumbnails`."""
    rows = _shrinkers(flag_size[1], len(pixels), shape[0], stride)
    columns = _shrinkers(flag_size[0], len(pixels), shape[1], stride)
    small = np.tensordot(rows, pixels, axes=(2, 0))
    small = np.tensordot(small, columns, axes=(2, 2))
    # [tops, y, channel, lefts, x] -> [tops * lefts, y * x * channel]
    return small.transpose(0, 3, 1, 4, 2).reshape(len(rows) * len(columns), -1)


def _best_scores(
    windows: Float32[np.ndarray, "placements features"],
    references: Float32[np.ndarray, "nations features"],
    gains: Float32[np.ndarray, " placements"],
    area: float,
) -> Float32[np.ndarray, " nations"]:
    """Each nation's best score over the placements."""
    features = windows.shape[1]
    squares = np.einsum("pf,pf->p", windows, windows) / features
    # gain - |window - reference|^2 / features, less the reference's own square.
    scores = windows @ references.T
    scores *= 2.0 / features
    scores += (gains - squares)[:, None]
    own = np.einsum("nf,nf->n", references, references) / features
    return area * (scores.max(axis=0) - own)


@functools.lru_cache(maxsize=4)
def _scenes(
    image_size: int,
) -> tuple[
    UInt8[np.ndarray, "scenes size size 3"], Float32[np.ndarray, "scenes y x 3"]
]:
    """All backgrounds, and the same in 16 by 16 cells (0..1)."""
    full = np.stack(
        [
            render_scene(scene, variant, image_size)
            for scene in SCENES
            for variant in range(NUM_VARIANTS)
        ]
    )
    return full, _shrink(full.astype(np.float32) / 255.0)


def _shrink(pixels: Float32[np.ndarray, "*batch size size 3"]) -> np.ndarray:
    cells = resample_matrix(pixels.shape[-2], _SCENE_CELLS)
    small = np.einsum("...hwc,yh->...ywc", pixels, cells, optimize=True)
    return np.einsum("...ywc,xw->...yxc", small, cells, optimize=True)


def _scene_errors(
    pixels: Float32[np.ndarray, "size size 3"],
) -> Float32[np.ndarray, "size size"]:
    """Squared error of the best background at each pixel, at most `TOLERANCE`."""
    full, small = _scenes(len(pixels))
    errors = ((small - _shrink(pixels)) ** 2).mean(axis=-1)
    # Capped, so that the flag does not determine the background.
    best = np.minimum(errors, TOLERANCE).mean(axis=(1, 2)).argmin()
    error = ((pixels - full[best] * np.float32(1.0 / 255.0)) ** 2).mean(axis=-1)
    return np.minimum(error, TOLERANCE)


class FlagIdentifier:
    """Identifies the nation of the flag in an image, among given nations.

    Args:
      nations: the candidates; at least one.
      flag_sizes: (width, height) choices in pixels of a 64x64 image.
    """

    def __init__(
        self,
        nations: Sequence[Nation],
        flag_sizes: Sequence[tuple[int, int]] = FLAG_SIZES,
    ) -> None:
        if not nations:
            raise ValueError("identifying a flag needs at least one nation; got none")
        self.nations = list(nations)
        self._flag_sizes = tuple(flag_sizes)
        self._references: dict[tuple[int, int], np.ndarray] = {}

    def _reference(
        self, size: tuple[int, int]
    ) -> Float32[np.ndarray, "nations features"]:
        """Thumbnails of all nations at a flag size, made once."""
        if size not in self._references:
            designs = [nation.design for nation in self.nations]
            self._references[size] = thumbnails(designs, size)
        return self._references[size]

    def _scores(
        self,
        pixels: Float32[np.ndarray, "size size 3"],
        scene_errors: Float32[np.ndarray, "size size"],
        candidates: Int64[np.ndarray, " candidates"] | slice,
        coarse: bool,
    ) -> Float32[np.ndarray, " candidates"]:
        """Each candidate's best score over all flag sizes and placements."""
        shape = _COARSE_SHAPE if coarse else THUMBNAIL_SHAPE
        stride = _COARSE_STRIDE if coarse else _FINE_STRIDE
        best = []
        for flag_size in self._flag_sizes:
            width, height = (
                round(side * len(pixels) / REFERENCE_SIZE) for side in flag_size
            )
            references = self._reference((width, height))[candidates]
            if coarse:
                cells = references.reshape(-1, shape[0], 2, shape[1], 2, 3)
                references = cells.mean(axis=(2, 4)).reshape(len(references), -1)
            windows = _windows(pixels, (width, height), shape, stride)
            gains = _windows(scene_errors[..., None], (width, height), (1, 1), stride)
            area = flag_size[0] * flag_size[1] / REFERENCE_SIZE**2
            best.append(_best_scores(windows, references, gains[:, 0], area))
        return np.max(best, axis=0)

    def identify_one(
        self, image: UInt8[np.ndarray, "size size 3"]
    ) -> tuple[Nation, float]:
        """Identifies the nation in one image; see `identify`."""
        if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
            raise ValueError(
                f"image must be uint8[size, size, 3]; got {list(image.shape)}"
            )
        pixels = image.astype(np.float32) / 255.0
        errors = _scene_errors(pixels)
        count = min(_NUM_FINALISTS, len(self.nations))
        if count < len(self.nations):
            coarse = self._scores(pixels, errors, slice(None), coarse=True)
            finalists = np.argpartition(-coarse, count)[:count]
        else:
            finalists = np.arange(count)
        scores = self._scores(pixels, errors, finalists, coarse=False)
        order = np.argsort(-scores, kind="stable")
        margin = float(scores[order[0]] - scores[order[1]]) if count > 1 else np.inf
        return self.nations[finalists[order[0]]], margin

    def identify(
        self, images: Sequence[UInt8[np.ndarray, "size size 3"]]
    ) -> list[tuple[Nation, float]]:
        """Identifies the nation in each image.

        Returns:
          For each image the best nation and its margin over the second best (in units of
          the score, >= 0; infinite when there is only one nation).
        """
        return [self.identify_one(image) for image in images]


def identify_flag(
    image: UInt8[np.ndarray, "size size 3"], nations: Sequence[Nation]
) -> tuple[Nation, float]:
    """Identifies the nation of the flag in one image; see `FlagIdentifier`."""
    return FlagIdentifier(nations).identify_one(image)
