"""Backgrounds: few flat colours, skyline and ground; recognisable behind a large flag.

Coordinates are those of a 64x64 image, whatever its real size. Skylines repeat every
32 units and variants move them by multiples of 8, so an image tokenizer with 8x8 pixel
codes needs only a few codes for each scene.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from racm3_jax.flagworld.world.config import REFERENCE_SIZE

_SUPERSAMPLE = 4
_PERIOD = 32
_SHIFT = 8
_HORIZONS = (40, 48)
_LIGHTS = (100, 90)
NUM_VARIANTS = len(_HORIZONS) * len(_LIGHTS) * (_PERIOD // _SHIFT)

Mask = Bool[np.ndarray, "height width"]
Colour = tuple[int, int, int]


class _Canvas:
    """One period of a supersampled image, painted back to front.

    Attributes:
      x: horizontal coordinate of every sample, 0 to the period.
      y: vertical coordinate, 0 at the top.
      horizon: y of the ground's upper edge.
    """

    def __init__(self, image_size: int, horizon: int) -> None:
        samples = image_size * _SUPERSAMPLE
        line = (np.arange(samples) + 0.5) * (REFERENCE_SIZE / samples)
        shape = (samples, samples * _PERIOD // REFERENCE_SIZE)
        self.x = np.broadcast_to(line[: shape[1]], shape)
        self.y = np.broadcast_to(line[:, None], shape)
        self.horizon = horizon
        self.pixels = np.zeros((*shape, 3), np.int32)

    def fill(self, mask: Mask, colour: Colour) -> None:
        self.pixels[mask] = colour

    def sky(self, colour: Colour) -> None:
        self.pixels[:] = colour

    def ground(self, colour: Colour, height: int = 0) -> None:
        self.fill(self.y >= self.horizon - height, colour)

    def box(self, left: float, right: float, up: float, down: float) -> Mask:
        """A box; `up` and `down` are heights above the horizon."""
        height = self.horizon - self.y
        return (self.x >= left) & (self.x < right) & (height < up) & (height >= down)

    def cone(self, centre: float, half: float, up: float, top: float = 0.0) -> Mask:
        """A triangle standing on the horizon, cut off `top` units below its tip."""
        height = self.horizon - self.y
        away = np.abs((self.x - centre + _PERIOD / 2) % _PERIOD - _PERIOD / 2)
        slope = away / half < 1.0 - height / up
        return slope & (height >= 0) & (height < up - top)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> Mask:
        """An ellipse; `cy` is an offset downwards from the horizon."""
        away = np.abs((self.x - cx + _PERIOD / 2) % _PERIOD - _PERIOD / 2)
        return (away / rx) ** 2 + ((self.y - self.horizon - cy) / ry) ** 2 < 1.0


def _moon(c: _Canvas) -> None:
    c.sky((10, 10, 24))
    for x, up in ((4, 36), (12, 20), (20, 28), (28, 12), (20, 44), (4, 4)):
        c.fill(c.box(x, x + 1.5, up + 1.5, up), (255, 255, 255))
    c.ground((164, 164, 168))
    for x, y in ((8, 4), (24, 4), (16, 12), (0, 12), (8, 20), (24, 20)):
        c.fill(c.ellipse(x, y, 4.5, 2.2), (108, 108, 116))


def _beach(c: _Canvas) -> None:
    c.sky((136, 208, 248))
    c.ground((32, 128, 208), height=8)
    c.ground((240, 220, 156))
    for x, y in ((4, 12), (20, 12)):
        c.fill(c.ellipse(x, y, 5.0, 1.5), (214, 186, 116))


def _mountains(c: _Canvas) -> None:
    c.sky((176, 214, 240))
    for centre, half, up in ((8, 14, 24), (24, 12, 16)):
        c.fill(c.cone(centre, half, up), (104, 108, 128))
        c.fill(
            c.cone(centre, half, up) & (c.y < c.horizon - 0.62 * up), (246, 246, 246)
        )
    c.ground((84, 132, 72))


def _night_city(c: _Canvas) -> None:
    c.sky((24, 24, 72))
    for left, right, up in ((0, 8, 16), (8, 16, 30), (16, 24, 12), (24, 32, 22)):
        c.fill(c.box(left + 0.5, right - 0.5, up, 0), (56, 56, 84))
        windows = (c.x % 4 >= 1.5) & (c.x % 4 < 3.5) & ((c.horizon - c.y) % 4 >= 2)
        c.fill(c.box(left + 0.5, right - 0.5, up - 1, 1) & windows, (255, 220, 112))
    c.ground((36, 36, 42))
    c.fill(c.box(2, 10, -5, -7), (220, 220, 220))
    c.fill(c.box(18, 26, -5, -7), (220, 220, 220))


def _forest(c: _Canvas) -> None:
    c.sky((196, 224, 200))
    for centre, up in ((4, 26), (12, 18), (20, 26), (28, 18)):
        c.fill(c.cone(centre, 6.5, up), (16, 92, 48))
    for centre in (4, 12, 20, 28):
        c.fill(c.box(centre - 1, centre + 1, 3, 0), (88, 56, 32))
    c.ground((104, 72, 40))


def _desert(c: _Canvas) -> None:
    c.sky((252, 216, 152))
    c.fill(c.cone(8, 24, 10), (216, 136, 64))
    c.ground((232, 164, 84))
    c.fill(c.box(22.5, 25.5, 12, -2), (56, 128, 64))
    c.fill(c.box(19.5, 28.5, 7.5, 5.5), (56, 128, 64))
    c.fill(c.box(19.5, 21.5, 10, 5.5) | c.box(26.5, 28.5, 10, 5.5), (56, 128, 64))


def _snow(c: _Canvas) -> None:
    c.sky((188, 204, 220))
    for x, up in ((4, 28), (20, 20), (12, 36), (28, 12)):
        c.fill(c.box(x, x + 2, up + 2, up), (250, 252, 255))
    c.ground((246, 250, 255))
    c.fill(c.ellipse(8, 0, 9, 4), (246, 250, 255))
    for y in (6, 14):
        c.fill(c.ellipse(20, y, 6, 1.4), (200, 218, 240))


def _sea(c: _Canvas) -> None:
    c.sky((168, 216, 244))
    c.ground((16, 88, 160))
    for y in (3, 11, 19):
        ridge = np.abs(c.x % 16 - 8.0) * 0.35
        height = c.y - c.horizon - y
        c.fill((height >= ridge) & (height < ridge + 1.6), (96, 176, 224))


def _meadow(c: _Canvas) -> None:
    c.sky((148, 212, 252))
    c.ground((112, 196, 80))
    for x, y in ((3, 3), (19, 3), (11, 11), (27, 11), (3, 19), (19, 19)):
        c.fill(c.ellipse(x, y, 1.8, 1.8), (248, 96, 120))
        c.fill(c.ellipse(x + 5, y + 1, 1.8, 1.8), (255, 236, 96))


def _volcano(c: _Canvas) -> None:
    c.sky((96, 32, 40))
    c.fill(c.cone(16, 18, 32, top=12), (44, 32, 36))
    c.fill(c.box(13, 19, 20, 8), (255, 128, 24))
    c.ground((60, 44, 44))
    c.fill(c.ellipse(16, 4, 7, 1.8), (255, 128, 24))
    c.fill(c.ellipse(0, 12, 7, 1.8), (255, 128, 24))


_PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "moon": _moon,
    "beach": _beach,
    "mountains": _mountains,
    "night city": _night_city,
    "forest": _forest,
    "desert": _desert,
    "snow": _snow,
    "sea": _sea,
    "meadow": _meadow,
    "volcano": _volcano,
}
SCENES: tuple[str, ...] = tuple(_PAINTERS)


@functools.lru_cache(maxsize=128)
def _paint(
    scene: str, horizon: int, image_size: int
) -> Int32[np.ndarray, "image_size period 3"]:
    """One period of a scene, in full light."""
    canvas = _Canvas(image_size, horizon)
    _PAINTERS[scene](canvas)
    height, width = (side // _SUPERSAMPLE for side in canvas.pixels.shape[:2])
    blocks = canvas.pixels.reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE, 3)
    return blocks.sum(axis=(1, 3), dtype=np.int32) // _SUPERSAMPLE**2


@functools.lru_cache(maxsize=1024)
def render_scene(
    scene: str, variant: int, image_size: int
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Renders a background.

    Args:
      scene: one of `SCENES`.
      variant: 0 to `NUM_VARIANTS` - 1; numbers the horizon, the light and the shift.
      image_size: height and width in pixels.

    Returns:
      A read-only array.
    """
    if scene not in _PAINTERS:
        raise ValueError(f"scene must be one of {', '.join(SCENES)}; got {scene!r}")
    if not 0 <= variant < NUM_VARIANTS:
        raise ValueError(f"variant must lie in 0..{NUM_VARIANTS - 1}; got {variant}")
    rest, horizon = divmod(variant, len(_HORIZONS))
    shift, light = divmod(rest, len(_LIGHTS))
    period = np.roll(
        _paint(scene, _HORIZONS[horizon], image_size),
        -shift * _SHIFT * image_size // REFERENCE_SIZE,
        axis=1,
    )
    picture = np.tile(period * _LIGHTS[light] // 100, (1, 2, 1)).astype(np.uint8)
    picture.flags.writeable = False
    return picture
