"""A flag in a scene: place, size, waving, pole."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Int32, UInt8

from racm3_jax.flagworld.world.config import REFERENCE_SIZE, FlagworldConfig
from racm3_jax.flagworld.world.designs import FlagDesign, render_flag
from racm3_jax.flagworld.world.scenes import NUM_VARIANTS, render_scene

_POLE_COLOUR = (92, 80, 72)
_POLE_WIDTH = 2
# At least this much ground stays visible under a flag, in units of a 64x64 image.
_GROUND = 8
# Wavelength in flag widths; displacements are in 1/16 pixel.
_WAVE_LENGTH = 0.8
_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Placement:
    """Position and shape of a flag.

    Attributes:
      top: row of the flag's upper edge, in pixels.
      left: column of the flag's hoist, in pixels.
      width: in pixels.
      height: in pixels.
      amplitude: vertical displacement of the waving, in pixels; 0 is flat.
      phase: of the waving, in half waves.
      variant: of the scene.
      pole: whether a pole stands at the hoist.
    """

    top: int
    left: int
    width: int
    height: int
    amplitude: float = 0.0
    phase: int = 0
    variant: int = 0
    pole: bool = True

    @property
    def box(self) -> list[int]:
        """[top, left, height, width]."""
        return [self.top, self.left, self.height, self.width]


@functools.lru_cache(maxsize=64)
def _corners(
    size: tuple[int, int], image_size: int, grid: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All rows and columns at which a flag of this size may start."""
    ground = _GROUND * image_size // REFERENCE_SIZE
    last_top, last_left = image_size - ground - size[1], image_size - size[0]
    tops = tuple(range(0, last_top + 1, grid))
    lefts = tuple(x for x in range(0, last_left + 1, grid) if x >= _POLE_WIDTH)
    if not tops or not lefts:
        raise ValueError(
            f"a flag of {size[0]}x{size[1]} pixels does not fit into an image of "
            f"{image_size} on a grid of {grid}: lower flagworld.flag_sizes or "
            "placement_grid"
        )
    return tops, lefts


def sample_placement(rng: np.random.Generator, config: FlagworldConfig) -> Placement:
    """Samples size, corner, waving and the scene's variant."""
    scale = config.image_size / REFERENCE_SIZE
    size = config.flag_sizes[rng.integers(len(config.flag_sizes))]
    width, height = round(size[0] * scale), round(size[1] * scale)
    tops, lefts = _corners((width, height), config.image_size, config.placement_grid)
    amplitude = config.wave_amplitudes[rng.integers(len(config.wave_amplitudes))]
    return Placement(
        top=tops[rng.integers(len(tops))],
        left=lefts[rng.integers(len(lefts))],
        width=width,
        height=height,
        amplitude=amplitude * scale,
        phase=config.wave_phases[rng.integers(len(config.wave_phases))],
        variant=int(rng.integers(NUM_VARIANTS)),
        pole=config.pole,
    )


@functools.lru_cache(maxsize=64)
def _wave(
    width: int, amplitude: float, phase: int
) -> tuple[Int32[np.ndarray, " width"], Int32[np.ndarray, " width"]]:
    """Per column: displacement downwards in 1/16 pixel, and light in 1/256."""
    x = (np.arange(width) + 0.5) / width
    turn = np.pi * (2.0 * x / _WAVE_LENGTH + phase)
    loose = np.minimum(1.0, 2.0 * x)
    displacement = np.rint(_STEPS * amplitude * loose * np.sin(turn))
    light = np.rint(256 - 12 * min(1.0, amplitude) * loose * (1.0 + np.cos(turn)))
    return displacement.astype(np.int32), light.astype(np.int32)


def _paste_waving(
    picture: UInt8[np.ndarray, "size size 3"],
    flag: UInt8[np.ndarray, "height width 3"],
    place: Placement,
) -> None:
    """Blends the flag over the image, each column shifted by its displacement."""
    displacement, light = _wave(place.width, place.amplitude, place.phase)
    pad = int(np.ceil(place.amplitude)) + 1
    cloth = np.zeros((place.height + 2 * pad + 1, place.width, 4), np.int32)
    inner = cloth[pad + 1 : pad + 1 + place.height]
    inner[..., :3] = flag * light[:, None] // 256
    inner[..., 3] = 1
    rows = np.arange(place.height + 2 * pad)[:, None]
    whole, part = np.divmod(displacement, _STEPS)
    # Output row r shows cloth rows r - whole (weight 16 - part) and r - whole - 1.
    upper = (rows + 1 - whole).clip(0, len(cloth) - 1)
    lower = (rows - whole).clip(0, len(cloth) - 1)
    columns = np.arange(place.width)
    mixed = (
        cloth[upper, columns] * (_STEPS - part)[:, None]
        + cloth[lower, columns] * part[:, None]
    )
    top, bottom = place.top - pad, place.top + place.height + pad
    first, last = max(top, 0), min(bottom, len(picture))
    mixed = mixed[first - top : last - top]
    view = picture[first:last, place.left : place.left + place.width]
    cover = mixed[..., 3:]
    view[:] = ((mixed[..., :3] + (_STEPS - cover) * view + _STEPS // 2) // _STEPS).clip(
        0, 255
    )


def render(
    design: FlagDesign, scene: str, placement: Placement, image_size: int = 64
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Renders one flag in one scene.

    Args:
      design: the flag.
      scene: one of `SCENES`.
      placement: from `sample_placement`, or chosen by hand.
      image_size: height and width in pixels.

    Raises:
      ValueError: the flag would leave the image, or the scene does not exist.
    """
    if (
        min(placement.top, placement.left) < 0
        or placement.top + placement.height > image_size
        or placement.left + placement.width > image_size
    ):
        raise ValueError(
            f"the flag's box {placement.box} leaves the image of {image_size} pixels"
        )
    picture = render_scene(scene, placement.variant, image_size).copy()
    if placement.pole:
        first = max(0, placement.left - _POLE_WIDTH)
        picture[placement.top :, first : placement.left] = _POLE_COLOUR
    flag = render_flag(design, (placement.width, placement.height))
    if placement.amplitude == 0.0:
        bottom, right = placement.top + placement.height, placement.left
        picture[placement.top : bottom, right : right + placement.width] = flag
    else:
        _paste_waving(picture, flag, placement)
    return picture
