"""Resizes images to squares for CLIP, pixel for pixel like OpenAI's code."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def fit_image(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes the shorter side to `size` (bicubic, antialiased), then crops the centre.

    In this order, as for the public weights: resizing then uses pixels outside the
    crop, and the crop falls on whole pixels. A square image is only resized.

    ```
    600 x 400, size 224  ->  336 x 224  ->  columns 56..279
    ```
    """
    if size < 1:
        raise ValueError(f"size must be >= 1; got {size}")
    height, width = image.shape[:2]
    if height == width == size:
        return image
    # The longer side is rounded down, as in the reference.
    if height <= width:
        new_height, new_width = size, int(size * width / height)
    else:
        new_height, new_width = int(size * height / width), size
    picture = Image.fromarray(image)
    if (new_height, new_width) != (height, width):
        picture = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
    # Halves are rounded to even, as in the reference.
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.array(picture.crop((left, top, left + size, top + size)))
