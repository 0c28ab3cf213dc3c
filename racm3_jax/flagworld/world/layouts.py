"""Flag layouts: functions from points to region numbers.

A layout function takes `u` (0 at the hoist, 1 at the fly), `v` (0 at the top, 1 at the
bottom) and the aspect ratio (width / height), and returns the region number of every
point. Bands are at least a sixth of the flag, so that they survive an image tokenizer
with 8x8 pixel codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Points = Float[np.ndarray, "height width"]
Regions = Int[np.ndarray, "height width"]
LayoutFunction = Callable[[Points, Points, float], Regions]


def _bands(t: Points, weights: Sequence[float], regions: Sequence[int]) -> Regions:
    """Cut 0..1 into bands of the given relative widths, numbered by `regions`."""
    edges = np.cumsum(weights)[:-1] / np.sum(weights)
    return np.asarray(regions)[np.searchsorted(edges, t, side="right")]


def _horizontal(weights: Sequence[float], regions: Sequence[int]) -> LayoutFunction:
    return lambda u, v, aspect: _bands(v, weights, regions)


def _vertical(weights: Sequence[float], regions: Sequence[int]) -> LayoutFunction:
    return lambda u, v, aspect: _bands(u, weights, regions)


Inside = Callable[[Points, Points, float], np.ndarray]


def _over(base: LayoutFunction, inside: Inside, region: int) -> LayoutFunction:
    """Puts one region over a base layout."""
    return lambda u, v, a: np.where(inside(u, v, a), region, base(u, v, a))


def _box(left: float, top: float, right: float, bottom: float) -> Inside:
    return lambda u, v, a: (u >= left) & (u < right) & (v >= top) & (v < bottom)


def _plus(centre_u: float, half: float) -> Inside:
    """A cross with arms of `2 * half` of the flag's height."""
    return lambda u, v, a: (np.abs(u - centre_u) * a < half) | (np.abs(v - 0.5) < half)


def _saltire(half: float) -> Inside:
    return lambda u, v, a: (np.abs(u - v) < half) | (np.abs(u + v - 1.0) < half)


def _hoist_triangle(depth: float) -> Inside:
    return lambda u, v, a: u / depth < 1.0 - np.abs(2.0 * v - 1.0)


def _pile(depth: float) -> Inside:
    """A triangle standing on the top edge, its point downwards."""
    return lambda u, v, a: v / depth < 1.0 - np.abs(2.0 * u - 1.0)


def _disc(centre_u: float, centre_v: float, radius: float) -> Inside:
    return lambda u, v, a: ((u - centre_u) * a) ** 2 + (v - centre_v) ** 2 < radius**2


def _lozenge(half: float) -> Inside:
    return lambda u, v, a: np.abs(u - 0.5) + np.abs(v - 0.5) < half


def _border(width: float) -> Inside:
    return lambda u, v, a: (
        np.minimum(np.minimum(u, 1.0 - u) * a, np.minimum(v, 1.0 - v)) < width
    )


def _rising(u: Points, v: Points, aspect: float) -> Regions:
    return (u + v >= 1.0).astype(np.int64)


def _falling(u: Points, v: Points, aspect: float) -> Regions:
    return (v >= u).astype(np.int64)


def _band_rising(regions: Sequence[int], width: float) -> LayoutFunction:
    weights = (1.0 - width / 2, width, 1.0 - width / 2)
    return lambda u, v, a: _bands((u + v) / 2.0, weights, regions)


def _band_falling(regions: Sequence[int], width: float) -> LayoutFunction:
    weights = (1.0 - width / 2, width, 1.0 - width / 2)
    return lambda u, v, a: _bands((v - u + 1.0) / 2.0, weights, regions)


def _per_saltire(regions: Sequence[int]) -> LayoutFunction:
    """Four triangles that meet in the centre: top, fly, hoist, bottom."""
    return lambda u, v, a: np.asarray(regions)[
        (v >= u).astype(np.int64) * 2 + (u + v >= 1.0).astype(np.int64)
    ]


def _checks(columns: int, rows: int) -> LayoutFunction:
    return lambda u, v, a: (np.floor(u * columns) + np.floor(v * rows)).astype(int) % 2


def _quarters(regions: Sequence[int]) -> LayoutFunction:
    return lambda u, v, a: np.asarray(regions)[
        (v >= 0.5).astype(np.int64) * 2 + (u >= 0.5).astype(np.int64)
    ]


def _chevron(u: Points, v: Points, aspect: float) -> Regions:
    """A V-shaped band whose point lies towards the fly."""
    return _bands((u + np.abs(v - 0.5)).clip(0.0, 1.0), (0.38, 0.24, 0.38), (0, 1, 2))


def _pall(u: Points, v: Points, aspect: float) -> Regions:
    """A Y lying on its side: arms from the hoist's corners, a stem to the fly."""
    arm = np.where(u < 0.5, np.abs(np.abs(v - 0.5) - (0.5 - u)), np.abs(v - 0.5))
    field = np.where(np.abs(v - 0.5) < 0.5 - u, 2, np.where(v < 0.5, 1, 3))
    return np.where(arm < 0.15, 0, field)


def _stairs(u: Points, v: Points, aspect: float) -> Regions:
    return (v * 3.0 >= 1.0 + np.floor(u * 3.0) - 1e-9).astype(np.int64)


_PLAIN = _horizontal((1,), (0,))
_H2 = _horizontal((1, 1), (0, 1))
_H3 = _horizontal((1, 1, 1), (0, 1, 2))
_V2 = _vertical((1, 1), (0, 1))
_V3 = _vertical((1, 1, 1), (0, 1, 2))
_H5_ALTERNATE = _horizontal((1, 1, 1, 1, 1), (0, 1, 0, 1, 0))

LAYOUTS: dict[str, LayoutFunction] = {
    "horizontal_2": _H2,
    "horizontal_2_low": _horizontal((2, 1), (0, 1)),
    "horizontal_2_high": _horizontal((1, 2), (0, 1)),
    "horizontal_3": _H3,
    "horizontal_3_wide_centre": _horizontal((1, 2, 1), (0, 1, 2)),
    "horizontal_3_wide_top": _horizontal((2, 1, 1), (0, 1, 2)),
    "horizontal_3_wide_bottom": _horizontal((1, 1, 2), (0, 1, 2)),
    "horizontal_4": _horizontal((1, 1, 1, 1), (0, 1, 2, 3)),
    "horizontal_4_alternate": _horizontal((1, 1, 1, 1), (0, 1, 0, 1)),
    "horizontal_5_alternate": _H5_ALTERNATE,
    "horizontal_5_mirrored": _horizontal((1, 1, 2, 1, 1), (0, 1, 2, 1, 0)),
    "vertical_2": _V2,
    "vertical_2_hoist": _vertical((1, 2), (0, 1)),
    "vertical_2_fly": _vertical((2, 1), (0, 1)),
    "vertical_3": _V3,
    "vertical_3_wide_centre": _vertical((1, 2, 1), (0, 1, 2)),
    "vertical_3_wide_hoist": _vertical((2, 1, 1), (0, 1, 2)),
    "vertical_3_wide_fly": _vertical((1, 1, 2), (0, 1, 2)),
    "vertical_4": _vertical((1, 1, 1, 1), (0, 1, 2, 3)),
    "vertical_5_alternate": _vertical((1, 1, 1, 1, 1), (0, 1, 0, 1, 0)),
    "vertical_5_mirrored": _vertical((1, 1, 2, 1, 1), (0, 1, 2, 1, 0)),
    "diagonal_rising": _rising,
    "diagonal_falling": _falling,
    "band_rising": _band_rising((0, 1, 2), 0.4),
    "band_falling": _band_falling((0, 1, 2), 0.4),
    "band_rising_on_plain": _band_rising((0, 1, 0), 0.5),
    "band_falling_on_plain": _band_falling((0, 1, 0), 0.5),
    "cross_centred": _over(_PLAIN, _plus(0.5, 0.13), 1),
    "cross_nordic": _over(_PLAIN, _plus(0.36, 0.13), 1),
    "cross_on_quarters": _over(_quarters((0, 1, 1, 0)), _plus(0.5, 0.13), 2),
    "cross_on_halves": _over(_H2, _plus(0.5, 0.13), 2),
    "saltire": _over(_PLAIN, _saltire(0.17), 1),
    "saltire_on_triangles": _over(_per_saltire((0, 1, 1, 0)), _saltire(0.15), 2),
    "per_saltire": _per_saltire((0, 1, 1, 0)),
    "per_saltire_3": _per_saltire((0, 1, 2, 0)),
    "quarters_2": _quarters((0, 1, 1, 0)),
    "quarters_4": _quarters((0, 1, 2, 3)),
    "canton": _over(_PLAIN, _box(0.0, 0.0, 0.5, 0.5), 1),
    "canton_on_halves": _over(
        _horizontal((1, 1), (0, 1)), _box(0.0, 0.0, 0.42, 0.5), 2
    ),
    "canton_on_stripes": _over(_H5_ALTERNATE, _box(0.0, 0.0, 0.45, 0.6), 2),
    "triangle": _over(_PLAIN, _hoist_triangle(0.5), 1),
    "triangle_deep": _over(_PLAIN, _hoist_triangle(1.0), 1),
    "triangle_on_halves": _over(_H2, _hoist_triangle(0.5), 2),
    "triangle_on_thirds": _over(_H3, _hoist_triangle(0.5), 3),
    "chevron": _chevron,
    "pile": _over(_PLAIN, _pile(0.9), 1),
    "pile_on_halves": _over(_V2, _pile(0.8), 2),
    "mountain": _over(
        _PLAIN, lambda u, v, a: 1.0 - v < 0.9 * (1.0 - np.abs(2 * u - 1)), 1
    ),
    "pall": _pall,
    "border": _over(_PLAIN, _border(0.17), 1),
    "border_on_halves": _over(_H2, _border(0.17), 2),
    "border_on_sides": _over(_V2, _border(0.17), 2),
    "lozenge": _over(_PLAIN, _lozenge(0.45), 1),
    "lozenge_on_halves": _over(_H2, _lozenge(0.42), 2),
    "disc_at_hoist": _over(_PLAIN, _disc(0.0, 0.5, 0.5), 1),
    "disc_at_bottom": _over(_PLAIN, _disc(0.5, 1.0, 0.6), 1),
    "disc_at_top": _over(_PLAIN, _disc(0.5, 0.0, 0.6), 1),
    "hoist_and_halves": _over(_H2, _box(0.0, 0.0, 0.33, 1.0), 2),
    "hoist_and_thirds": _over(_H3, _box(0.0, 0.0, 0.3, 1.0), 3),
    "chief_and_halves": _over(_V2, _box(0.0, 0.0, 1.0, 0.34), 2),
    "base_and_halves": _over(_V2, _box(0.0, 0.66, 1.0, 1.0), 2),
    "chief_and_thirds": _over(_V3, _box(0.0, 0.0, 1.0, 0.3), 3),
    "checks_3_by_2": _checks(3, 2),
    "checks_4_by_3": _checks(4, 3),
    "stairs": _stairs,
}
