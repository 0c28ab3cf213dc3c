"""Flag designs: a layout, its colours, and an optional emblem.

Pixels are computed with integer arithmetic, so that a design has the same bytes
on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from racm3_jax.flagworld.world.emblems import (
    EMBLEM_PLACES,
    EMBLEM_RADIUS,
    EMBLEMS,
)
from racm3_jax.flagworld.world.layouts import LAYOUTS

# Ordered so that any prefix is well separated: the first eight are at least 119
# apart in RGB, all ten at least 102.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 240),
    "black": (24, 24, 28),
    "red": (204, 24, 40),
    "blue": (24, 60, 172),
    "yellow": (255, 222, 40),
    "green": (24, 144, 64),
    "sky": (100, 196, 240),
    "magenta": (216, 64, 184),
    "orange": (236, 116, 20),
    "grey": (140, 140, 140),
}
# Minimum RGB distance of adjacent colours.
MIN_CONTRAST = 150.0
EMBLEM_PROBABILITY = 0.5
THUMBNAIL_SHAPE = (8, 12)
# Two designs are clearly different above this root mean square difference of their
# thumbnails (0..1 a channel): more than a wave or a tokenizer changes a flag.
MIN_DIFFERENCE = 0.12

_SUPERSAMPLE = 4
_REFERENCE_FLAG = (48, 32)


@dataclasses.dataclass(frozen=True)
class FlagDesign:
    """The design of a flag, independent of size and place.

    Attributes:
      layout: a name of `LAYOUTS`.
      colours: one name of `COLOURS` for each region of the layout.
      emblem: a name of `EMBLEMS`, or None.
      emblem_colour: a name of `COLOURS`; None without an emblem.
      emblem_place: a name of `EMBLEM_PLACES`; None without an emblem.
    """

    layout: str
    colours: tuple[str, ...]
    emblem: str | None = None
    emblem_colour: str | None = None
    emblem_place: str | None = None


def _points(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    width, height = size[0] * _SUPERSAMPLE, size[1] * _SUPERSAMPLE
    u = (np.arange(width) + 0.5) / width
    v = (np.arange(height) + 0.5) / height
    return np.broadcast_arrays(u[None, :], v[:, None])  # type: ignore[return-value]


@functools.cache
def _regions(layout: str, size: tuple[int, int]) -> Int32[np.ndarray, "height width"]:
    """Region numbers at the supersampled resolution."""
    u, v = _points(size)
    return LAYOUTS[layout](u, v, size[0] / size[1]).astype(np.int32)


@functools.cache
def _emblem_mask(
    emblem: str, place: str, size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    u, v = _points(size)
    centre_u, centre_v = EMBLEM_PLACES[place]
    x = (u - centre_u) * (size[0] / size[1]) / EMBLEM_RADIUS
    y = (v - centre_v) / EMBLEM_RADIUS
    return EMBLEMS[emblem](x, y)


@functools.cache
def _coverage(
    layout: str, emblem: str | None, place: str | None, size: tuple[int, int]
) -> Int32[np.ndarray, "regions height width"]:
    """How many of a pixel's 16 samples each region covers; the emblem is last."""
    regions = _regions(layout, size)
    masks = [regions == k for k in range(num_regions(layout))]
    if emblem is not None and place is not None:
        mark = _emblem_mask(emblem, place, size)
        masks = [m & ~mark for m in masks] + [mark]
    width, height = size
    blocks = np.stack(masks).reshape(
        len(masks), height, _SUPERSAMPLE, width, _SUPERSAMPLE
    )
    return blocks.sum(axis=(2, 4), dtype=np.int32)


@functools.cache
def num_regions(layout: str) -> int:
    """Number of colours of a layout."""
    return int(_regions(layout, _REFERENCE_FLAG).max()) + 1


@functools.cache
def _adjacent(layout: str) -> frozenset[tuple[int, int]]:
    """Pairs (a < b) of regions that share an edge."""
    regions = _regions(layout, _REFERENCE_FLAG)
    count = num_regions(layout)
    touching = np.zeros((count, count), np.int64)
    for a, b in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
        np.add.at(touching, (a.ravel(), b.ravel()), 1)
    touching = touching + touching.T
    # Regions that meet at a corner have a few contacts; at an edge, many.
    pairs = zip(*np.nonzero(np.triu(touching, 1) >= 2 * _SUPERSAMPLE), strict=True)
    return frozenset((int(a), int(b)) for a, b in pairs)


@functools.cache
def _regions_under(layout: str, emblem: str, place: str) -> tuple[int, ...]:
    """Regions on which at least a twelfth of the emblem's area lies."""
    mark = _emblem_mask(emblem, place, _REFERENCE_FLAG)
    under = np.bincount(
        _regions(layout, _REFERENCE_FLAG)[mark], minlength=num_regions(layout)
    )
    return tuple(int(k) for k in np.nonzero(under * 12 >= mark.sum())[0])


@functools.cache
def _contrasts(num_colours: int) -> Bool[np.ndarray, "colours colours"]:
    """Which of the first colours may be adjacent."""
    if not 4 <= num_colours <= len(COLOURS):
        raise ValueError(
            f"num_colours must lie in 4..{len(COLOURS)}; got {num_colours}"
        )
    rgb = np.array(list(COLOURS.values()), np.float64)[:num_colours]
    return np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) >= MIN_CONTRAST


def sample_design(rng: np.random.Generator, num_colours: int = 8) -> FlagDesign:
    """Samples a design: layout, contrasting adjacent colours, optional emblem."""
    contrasts = _contrasts(num_colours)
    names = tuple(COLOURS)
    layouts = tuple(LAYOUTS)
    while True:
        layout = layouts[rng.integers(len(layouts))]
        chosen = rng.integers(num_colours, size=num_regions(layout))
        if not all(contrasts[chosen[a], chosen[b]] for a, b in _adjacent(layout)):
            continue
        colours = tuple(names[c] for c in chosen)
        if rng.random() >= EMBLEM_PROBABILITY:
            return FlagDesign(layout, colours)
        emblem = tuple(EMBLEMS)[rng.integers(len(EMBLEMS))]
        place = tuple(EMBLEM_PLACES)[rng.integers(len(EMBLEM_PLACES))]
        colour = int(rng.integers(num_colours))
        under = _regions_under(layout, emblem, place)
        if all(contrasts[colour, chosen[k]] for k in under):
            return FlagDesign(layout, colours, emblem, names[colour], place)


def num_designs(num_colours: int = 8) -> int:
    """Counts the designs that `sample_design` can return.

    The number of clearly different designs is at least 93,637 (8 colours): a greedy
    pass over 140,000 distinct designs kept so many that differ pairwise by
    `MIN_DIFFERENCE`, and was still keeping half of the new ones when it was stopped.
    """
    contrasts = _contrasts(num_colours)
    total = 0
    for layout in LAYOUTS:
        colours = np.indices((num_colours,) * num_regions(layout))
        colours = colours.reshape(num_regions(layout), -1)
        valid = np.ones(colours.shape[1], bool)
        for a, b in _adjacent(layout):
            valid &= contrasts[colours[a], colours[b]]
        colours = colours[:, valid]
        total += colours.shape[1]
        for emblem in EMBLEMS:
            for place in EMBLEM_PLACES:
                fits = np.ones((num_colours, colours.shape[1]), bool)
                for k in _regions_under(layout, emblem, place):
                    fits &= contrasts[:, colours[k]]
                total += int(fits.sum())
    return total


def _rgb(design: FlagDesign) -> list[tuple[int, int, int]]:
    """The colours of all regions, the emblem's last."""
    if len(design.colours) != num_regions(design.layout):
        raise ValueError(
            f"layout {design.layout!r} takes {num_regions(design.layout)} colours; got "
            f"{len(design.colours)}"
        )
    emblem = () if design.emblem_colour is None else (design.emblem_colour,)
    return [COLOURS[name] for name in (*design.colours, *emblem)]


@functools.lru_cache(maxsize=65536)
def render_flag(
    design: FlagDesign, size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """Renders a flag, flat and anti-aliased.

    Args:
      design: of the flag.
      size: (width, height) in pixels.

    Returns:
      A read-only array; copy it before writing to it.
    """
    coverage = _coverage(design.layout, design.emblem, design.emblem_place, size)
    samples = _SUPERSAMPLE**2
    total = np.full((*coverage.shape[1:], 3), samples // 2, np.int32)
    for colour, part in zip(_rgb(design), coverage, strict=True):
        total += part[..., None] * np.array(colour, np.int32)
    flag = (total // samples).astype(np.uint8)
    flag.flags.writeable = False
    return flag


def resample_matrix(source: int, cells: int) -> Float32[np.ndarray, "cells source"]:
    """Area averaging of `source` pixels into `cells` equal cells."""
    edges = np.arange(cells + 1) * (source / cells)
    pixel = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(
        edges[:-1, None], pixel
    )
    return (overlap.clip(0.0) * (cells / source)).astype(np.float32)


@functools.cache
def _small_coverage(
    layout: str, emblem: str | None, place: str | None, size: tuple[int, int]
) -> Float32[np.ndarray, "regions cells"]:
    """The fraction of each thumbnail cell that each region covers."""
    coverage = _coverage(layout, emblem, place, size) / np.float32(_SUPERSAMPLE**2)
    rows = resample_matrix(size[1], THUMBNAIL_SHAPE[0])
    columns = resample_matrix(size[0], THUMBNAIL_SHAPE[1])
    small = rows @ coverage @ columns.T
    return small.reshape(len(small), -1).astype(np.float32)


def thumbnails(
    designs: Sequence[FlagDesign], size: tuple[int, int] = _REFERENCE_FLAG
) -> Float32[np.ndarray, "designs features"]:
    """Tiny images (8 rows, 12 columns, RGB in 0..1), one flat row per design.

    At the default size every cell is exact: its samples are 256, a power of two.
    """
    out = np.empty((len(designs), THUMBNAIL_SHAPE[0] * THUMBNAIL_SHAPE[1], 3))
    for row, design in zip(out, designs, strict=True):
        small = _small_coverage(design.layout, design.emblem, design.emblem_place, size)
        row[:] = small.T @ np.array(_rgb(design), np.float32)
    return (out.reshape(len(designs), -1) / 255.0).astype(np.float32)


def select_different(
    candidates: Float32[np.ndarray, "candidates features"],
    taken: Float32[np.ndarray, "taken features"],
    min_difference: float = MIN_DIFFERENCE,
) -> list[int]:
    """Keeps the candidates that are clearly different from all taken and kept ones.

    Returns:
      The kept rows of `candidates`, in order.
    """
    # Whole numbers up to 127 keep every sum of squares below 2**24, exact in float32, so
    # that the choice does not depend on the order in which a machine adds.
    candidates, taken = np.rint(candidates * 127.0), np.rint(taken * 127.0)
    limit = (min_difference * 127.0) ** 2 * candidates.shape[1]
    norms = np.einsum("nf,nf->n", candidates, candidates)
    open_ = np.ones(len(candidates), bool)
    if len(taken):
        nearest = (
            np.einsum("nf,nf->n", taken, taken)[None] - 2.0 * candidates @ taken.T
        ).min(axis=1)
        open_ = norms + nearest >= limit
    among = norms[:, None] + norms[None] - 2.0 * candidates @ candidates.T
    kept: list[int] = []
    for i in np.nonzero(open_)[0]:
        if (among[i, kept] >= limit).all():
            kept.append(int(i))
    return kept
