"""Pictures that people look at first: prompt | retrieved documents | drawn."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "height width 3"]

_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_FAINT = (120, 120, 120)
_GAP = 8


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a row, with the words under it."""

    image: Pixels
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a sheet: what was asked, then groups of panels under the headings."""

    prompt: str
    groups: Sequence[Sequence[Panel]]


def tile(images: Sequence[Pixels]) -> Pixels:
    """Pictures of one size, side by side in a grid that is about square.

    Raises:
      ValueError: if there are none.
    """
    if not images:
        raise ValueError("there are no pictures to tile")
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    height, width, _ = images[0].shape
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * height, (i % columns) * width
        grid[top : top + height, left : left + width] = image
    return grid


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_sheet(
    headings: Sequence[str],
    rows: Sequence[Row],
    *,
    panel_size: int = 128,
    prompt_width: int = 190,
) -> Pixels:
    """A table of pictures; small ones are enlarged without smoothing.

    Args:
      headings: of the prompt column and of each group of panels.
      rows: every row has one group of panels a heading.
      panel_size: side of a panel, pixels.
      prompt_width: of the prompt column, pixels.

    Raises:
      ValueError: if a row's groups do not fit the headings.
    """
    for row in rows:
        if len(row.groups) != len(headings) - 1:
            raise ValueError(
                f"{len(headings)} headings need rows of {len(headings) - 1} groups; "
                f"got {len(row.groups)}"
            )
    counts = [
        max((len(row.groups[g]) for row in rows), default=1) or 1
        for g in range(len(headings) - 1)
    ]
    widths = [prompt_width] + [n * (panel_size + _GAP) + _GAP for n in counts]
    words_height = 46
    row_height = panel_size + words_height + _GAP
    sheet = Image.new(
        "RGB", (sum(widths), 30 + max(1, len(rows)) * row_height), _BACKGROUND
    )
    pen = ImageDraw.Draw(sheet)
    lefts = np.cumsum([0, *widths[:-1]])
    for heading, left in zip(headings, lefts, strict=True):
        pen.text((int(left) + _GAP, 8), heading, _INK, font=_font(13))
    for r, row in enumerate(rows):
        top = 30 + r * row_height
        pen.line([(0, top - 3), (sheet.width, top - 3)], (225, 225, 225))
        pen.multiline_text(
            (_GAP, top + 4),
            textwrap.fill(row.prompt, prompt_width // 8),
            _INK,
            font=_font(13),
        )
        for left, group in zip(lefts[1:], row.groups, strict=True):
            for p, panel in enumerate(group):
                place = (int(left) + _GAP + p * (panel_size + _GAP), top + 2)
                picture = Image.fromarray(panel.image).resize(
                    (panel_size, panel_size), Image.Resampling.NEAREST
                )
                sheet.paste(picture, place)
                pen.multiline_text(
                    (place[0], place[1] + panel_size + 2),
                    textwrap.fill(panel.words, panel_size // 6),
                    _FAINT,
                    font=_font(10),
                )
    return np.asarray(sheet)
