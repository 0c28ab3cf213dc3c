"""Features for the scorers: from RGB pixels of an image on white, with NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "n 64 64 3"]
SIDE = 64
_TINY = 1e-6


def fit_pixels(images: Sequence[np.ndarray]) -> Pixels:
    """Images of any size, resized for the scorers."""
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


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Every row, scaled to length 1."""
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
    """HOG without blocks: roots of the gradient sums of each cell and direction, unit."""
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
    return unit_rows(np.sqrt(np.stack(sums, -1)).reshape(n, -1))


def shape_features(images: Pixels) -> Float32[np.ndarray, "n d"]:
    """Features of the content: coarse pixels minus their mean, and oriented gradients."""
    rgb = images.astype(np.float32) / 255
    pixels = rgb.reshape(len(rgb), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(rgb), -1)
    pixels = unit_rows(pixels - pixels.mean(1, keepdims=True))
    return unit_rows(
        np.concatenate([pixels, 1.2 * oriented_gradients(rgb.mean(-1))], axis=1)
    )


def style_features(images: Pixels) -> Float[np.ndarray, "n d"]:
    """Features of the style: colours, outlines, edges and shades of non-white pixels."""
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
    """Counts of each image's values under its mask."""
    n = len(values)
    offset = values + bins * np.arange(n)[:, None, None]
    return np.bincount(offset[mask], minlength=n * bins).reshape(n, bins).astype(float)
