"""Emblems: simple, large shapes on a flag's field.

An emblem function takes `x` (to the right) and `y` (downwards) in units of the emblem's
radius, and returns True inside the shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

Offsets = Float[np.ndarray, "height width"]
EmblemFunction = Callable[[Offsets, Offsets], Bool[np.ndarray, "height width"]]

# Radius of an emblem in flag heights: on a flag 24 pixels high it is 15 pixels across.
EMBLEM_RADIUS = 0.31
# Positions of an emblem: its centre in (flag widths, flag heights).
EMBLEM_PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "hoist": (0.25, 0.5),
}


def _star(x: Offsets, y: Offsets) -> Bool[np.ndarray, "height width"]:
    """A five-pointed star: the straight edge from each tip to the next notch."""
    tip, notch, half_turn = 1.2, 0.55, np.pi / 5.0
    angle = np.arctan2(x, -y) % (2.0 * half_turn)
    angle = np.minimum(angle, 2.0 * half_turn - angle)
    edge = tip * notch * np.sin(half_turn)
    edge = edge / (tip * np.sin(angle) + notch * np.sin(half_turn - angle))
    return np.hypot(x, y) < edge


EMBLEMS: dict[str, EmblemFunction] = {
    "disc": lambda x, y: x**2 + y**2 < 0.95,
    "star": _star,
    "diamond": lambda x, y: np.abs(x) + np.abs(y) < 1.15,
    "ring": lambda x, y: (x**2 + y**2 < 1.1) & (x**2 + y**2 > 0.28),
    "crescent": lambda x, y: (x**2 + y**2 < 1.1) & ((x - 0.5) ** 2 + y**2 > 0.55),
    "cross": lambda x, y: (
        (np.maximum(np.abs(x), np.abs(y)) < 1.0)
        & (np.minimum(np.abs(x), np.abs(y)) < 0.36)
    ),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85,
    "triangle": lambda x, y: (np.abs(x) * 1.75 < y + 0.95) & (y < 0.85),
    "bar": lambda x, y: (np.abs(x) < 1.2) & (np.abs(y) < 0.42),
    "pillar": lambda x, y: (np.abs(y) < 1.2) & (np.abs(x) < 0.42),
}
