"""Batches of images for the VQGAN's training.

Step t samples with a generator seeded by (seed, t), so a resumed run needs only t.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8

from racm3_jax.documents.augmentation import (
    NO_AUGMENTATION,
    AugmentationConfig,
    augment_each,
)


def scale_pixels(
    images: UInt8[np.ndarray, "batch height width 3"],
) -> Float32[np.ndarray, "batch height width 3"]:
    """0..255 -> [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def image_batches(
    images: UInt8[np.ndarray, "images height width 3"],
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    augmentation: AugmentationConfig = NO_AUGMENTATION,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `{"images": f32[batch_size, height, width, 3]}` without end, augmented."""
    step = start_step
    while True:
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(images), batch_size, replace=len(images) < batch_size)
        changed = augment_each(images[rows], augmentation, rng)
        yield {"images": scale_pixels(changed)}
        step += 1
