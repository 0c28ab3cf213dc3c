"""A region of an image as cells of its code grid, as spans, and as tokens to sample.

    cells (* = in the region)      raster order           at most one span
      . . . .
      . * * .      ->   . . . . . * * . . * * . . . . .   ->   [5, 11)
      . * * .                     `---' `---'                   * * k k * *
      . . . .                     two runs                      k = known, forced

The closest runs are joined first; the codes between them are known, and forced while the
span is sampled. Models see few spans at once in training, so one is the default.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.vocab import Vocab

Box = tuple[int, int, int, int]
Region = Box | Bool[np.ndarray, "height width"]
Span = tuple[int, int]


def find_cells(
    region: Region, image_shape: tuple[int, int], image_size: int, num_codes: int
) -> Bool[np.ndarray, " codes"]:
    """The codes of an image that a region touches.

    Args:
      region: a box (left, top, right, bottom) in pixels, right and bottom excluded; or a
        mask, True where the image is to be replaced.
      image_shape: height and width of the image that the region is of.
      image_size: of the square that the image is cut to and resized to.
      num_codes: of one image; a square grid.

    Raises:
      ValueError: a region outside the image, empty, or of another size.
    """
    height, width = image_shape
    if isinstance(region, np.ndarray):
        if region.dtype != bool or region.shape != (height, width):
            raise ValueError(
                f"the mask is {region.dtype}{list(region.shape)} but the image has "
                f"{width}x{height} pixels: give bool[{height}, {width}]"
            )
        mask = region
    else:
        left, top, right, bottom = region
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"the region {left},{top},{right},{bottom} (left, top, right, bottom) "
                f"does not lie inside the image of {width}x{height} pixels"
            )
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
    pixels = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    small = resize_image(pixels, image_size)[..., 0] >= 128
    side = round(num_codes**0.5)
    if side * side != num_codes or image_size % side:
        raise ValueError(
            f"regions need a square grid of codes; this tokenizer has {num_codes} codes "
            f"for {image_size}x{image_size} pixels"
        )
    cell = image_size // side
    cells = small.reshape(side, cell, side, cell).any((1, 3)).reshape(-1)
    if not cells.any():
        raise ValueError(
            "the region holds no pixel of the image's central square, which is what the "
            "model sees: choose a larger one"
        )
    return cells


def find_spans(cells: Bool[np.ndarray, " codes"], max_spans: int) -> list[Span]:
    """At most `max_spans` half-open ranges that cover the cells; closest runs joined."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], cells.astype(np.int8), [0]])))
    spans = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    if max_spans < 1:
        raise ValueError(f"max_spans must be >= 1; got {max_spans}")
    while len(spans) > max_spans:
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
        i = int(np.argmin(gaps))
        spans[i : i + 2] = [(spans[i][0], spans[i + 1][1])]
    return spans


def plan_spans(
    tokens: Int[np.ndarray, " codes"],
    cells: Bool[np.ndarray, " codes"],
    spans: Sequence[Span],
    vocab: Vocab,
) -> Int32[np.ndarray, " new"]:
    """The tokens after an `infill_prompt`: known ones, and -1 where one is sampled.

    Between two spans are the end of the first and the sentinel of the second:

        spans [0, 2) [5, 6), all sampled   ->   -1 -1 <eoss> <mask:1> -1
    """
    hidden = np.where(cells, -1, tokens)
    pieces = []
    for i, (start, end) in enumerate(spans):
        if i:
            pieces.append(np.array([vocab.eoss, vocab.sentinel(i)]))
        pieces.append(hidden[start:end])
    return np.concatenate(pieces).astype(np.int32)


def place_spans(spans: Sequence[Span]) -> Int32[np.ndarray, " new"]:
    """Which code of the image each token of `plan_spans` is; -1 between two spans."""
    pieces = []
    for i, (start, end) in enumerate(spans):
        pieces += [np.full(2 if i else 0, -1), np.arange(start, end)]
    return np.concatenate(pieces).astype(np.int32)


def fill_spans(
    tokens: Int[np.ndarray, " codes"],
    spans: Sequence[Span],
    sampled: Int[np.ndarray, "samples new"],
) -> Int32[np.ndarray, "samples codes"]:
    """The image with the sampled tokens in place: the inverse of `plan_spans`."""
    filled = np.tile(tokens, (len(sampled), 1)).astype(np.int32)
    position = 0
    for start, end in spans:
        filled[:, start:end] = sampled[:, position : position + end - start]
        position += end - start + 2
    return filled
