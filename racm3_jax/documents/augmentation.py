"""Image augmentation: mirroring, shifts, hue rotation.

An augmentation is sampled once and applied to any number of images, so that a target
and its retrieved documents can share it. The caller seeds the sampling.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from racm3_jax.limits import check_range

Images = UInt8[np.ndarray, "images height width 3"]


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """`config.augmentation`: which augmentations, and how many.

    Attributes:
      mirror: flip half of the images horizontally: not for captions that name a side,
        nor for images with text.
      shift: maximum shift, as a fraction of the side; the border is filled by
        reflection.
      hue: maximum hue rotation, as a fraction of the circle: not for captions that name
        colours.
      num_variants: for a generator, whose images are tokenised ahead: number of
        augmented versions besides the original. Each needs the disk space of all tokens
        again.
    """

    mirror: bool = False
    shift: float = 0.0
    hue: float = 0.0
    num_variants: int = 0

    def __post_init__(self) -> None:
        check_range(self, "augmentation", "shift", "hue", low=0, high=0.5)
        check_range(self, "augmentation", "num_variants", low=0)

    @property
    def changes_images(self) -> bool:
        return bool(self.mirror or self.shift or self.hue)


NO_AUGMENTATION = AugmentationConfig()


class Change(NamedTuple):
    """One augmentation: flip, shift (fractions of the side), hue rotation."""

    mirrored: bool
    down: float
    right: float
    turn: float


def sample_change(config: AugmentationConfig, rng: np.random.Generator) -> Change:
    """Samples an augmentation uniformly from those that `config` allows."""
    mirrored = bool(rng.random() < 0.5) and config.mirror
    down, right = rng.uniform(-config.shift, config.shift, 2)
    return Change(mirrored, down, right, rng.uniform(-config.hue, config.hue))


def change_images(images: Images, change: Change) -> Images:
    """Applies one augmentation to all images.

    a b c d, moved right by a quarter  ->  b a b c      (mirrored at the border)
    """
    _, height, width, _ = images.shape
    if change.mirrored:
        images = images[:, :, ::-1]
    rows = _moved(height, change.down)
    columns = _moved(width, change.right)
    images = images[:, rows[:, None], columns[None]]
    if not change.turn:
        return images
    turned = images.astype(np.float32) @ _hue_rotation(change.turn)
    return np.clip(np.round(turned), 0, 255).astype(np.uint8)


def augment_each(
    images: Images, config: AugmentationConfig, rng: np.random.Generator
) -> Images:
    """Augments every image independently."""
    if not config.changes_images:
        return images
    changes = [sample_change(config, rng) for _ in range(len(images))]
    return np.concatenate(
        [change_images(images[i : i + 1], change) for i, change in enumerate(changes)]
    )


def _moved(length: int, share: float) -> Int[np.ndarray, " length"]:
    """Source index of each row, reflected at the border."""
    places = np.abs(np.arange(length) - round(share * length))
    return np.where(places >= length, 2 * (length - 1) - places, places)


def _hue_rotation(turn: float) -> np.ndarray:
    """Matrix that rotates RGB rows about the grey axis."""
    angle = 2 * math.pi * turn
    cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
    third = (1 - cosine) / 3
    matrix = np.full((3, 3), third, np.float32)
    matrix += cosine * np.eye(3, dtype=np.float32)
    matrix += sine * np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], np.float32)
    return matrix
