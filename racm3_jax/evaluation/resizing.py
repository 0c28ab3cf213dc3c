"""Resizing of images for the image-quality networks, which changes FID by points.

"clean"    PIL's bicubic filter with antialiasing, each channel in float, clipped, not
           rounded (clean-fid, arXiv 2104.11222)
"legacy"   bilinear between the four nearest pixels, without antialiasing
           (as inside pytorch-fid's network)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Resizing = Literal["clean", "legacy"]
RESIZINGS: tuple[Resizing, ...] = ("clean", "legacy")


def resize_batch(
    images: Sequence[UInt8[np.ndarray, "height width 3"]],
    size: int,
    resizing: Resizing = "clean",
) -> Float32[np.ndarray, "images size size 3"]:
    """Images of any sizes -> `size` × `size`, pixels 0..255 in float.

    Raises:
      ValueError: for another resizing.
    """
    if resizing not in RESIZINGS:
        raise ValueError(
            f"resizing is {resizing!r}; allowed: {', '.join(map(repr, RESIZINGS))}"
        )
    resize = _resize_clean if resizing == "clean" else _resize_legacy
    out = np.zeros((len(images), size, size, 3), np.float32)
    for row, image in zip(out, images, strict=True):
        row[:] = resize(image, size)
    return out


def _resize_clean(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> Float32[np.ndarray, "size size 3"]:
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(x) for x in channels], axis=-1).clip(0, 255)


def _resize_legacy(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> Float32[np.ndarray, "size size 3"]:
    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Left and right neighbour of each output pixel's centre, weight of the right."""
        centres = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0)
        left = np.floor(centres).astype(int)
        return left, np.minimum(left + 1, length - 1), centres - left

    top, bottom, y = places(image.shape[0])
    left, right, x = places(image.shape[1])
    pixels = image.astype(np.float64)
    x, y = x[None, :, None], y[:, None, None]
    rows = pixels[top] * (1 - y) + pixels[bottom] * y
    return (rows[:, left] * (1 - x) + rows[:, right] * x).astype(np.float32)
