"""Image sheets for people: prompt | retrieved documents | generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from racm3_jax import own_files

if TYPE_CHECKING:
    from racm3_jax.generation.tasks import Generator
    from racm3_jax.types import GenerationOutput, TokenizedDocument

Pixels = UInt8[np.ndarray, "height width 3"]

_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_FAINT = (120, 120, 120)
_GAP = 8
_HEADING_HEIGHT = 30
_PROMPT_SIZE, _WORDS_SIZE = 13, 10


@dataclasses.dataclass(frozen=True)
class Panel:
    """One image of a row, with the words under it."""

    image: Pixels
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a sheet: the prompt, then groups of panels under the headings."""

    prompt: str
    groups: Sequence[Sequence[Panel]]


# For empty panels.
BLANK: Pixels = np.full((8, 8, 3), 236, np.uint8)


def enlarge(image: Pixels, times: int) -> Pixels:
    """The image, smoothly enlarged by an integer factor."""
    if times == 1:
        return image
    height, width, _ = image.shape
    size = (times * width, times * height)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def tile(images: Sequence[Pixels]) -> Pixels:
    """Images of one size in an approximately square grid.

    Raises:
      ValueError: if there are none.
    """
    if not images:
        raise ValueError("there are no images to tile")
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


def _wrap_row(row: Row, panel_size: int, prompt_width: int) -> tuple[str, list[str]]:
    """The prompt and the words of every panel, wrapped into lines that fit."""
    words = [panel.words for group in row.groups for panel in group]
    return (
        _wrap(row.prompt, _PROMPT_SIZE, prompt_width - 2 * _GAP),
        [_wrap(text, _WORDS_SIZE, panel_size) for text in words] or [""],
    )


def _wrap(text: str, size: int, width: int) -> str:
    """Wraps a text where a rendered line would be wider than `width` pixels."""
    font, lines = _font(size), [""]
    for word in text.split():
        # A word that is longer than a line is cut.
        while font.getlength(word) > width and len(word) > 1:
            fitting = max(1, int(len(word) * width / font.getlength(word)) - 1)
            lines += [word[:fitting]]
            word = word[fitting:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines).strip("\n")


def _text_height(text: str, size: int) -> int:
    """Height of wrapped lines in pixels, with the space below the last one."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(np.ceil(pen.multiline_textbbox((0, 0), text, font=_font(size))[3])) + 2


def draw_sheet(
    headings: Sequence[str],
    rows: Sequence[Row],
    *,
    panel_size: int = 128,
    prompt_width: int = 190,
) -> Pixels:
    """A table of images; small ones are enlarged without smoothing, large ones averaged.

    A row is as high as its longest text.

    Args:
      headings: of the prompt column and of each group of panels.
      rows: every row has one group of panels per heading.
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
    widths = [prompt_width]
    for heading, count in zip(headings[1:], counts, strict=True):
        needed = int(_font(_PROMPT_SIZE).getlength(heading)) + 2 * _GAP
        widths.append(max(needed, count * (panel_size + _GAP) + _GAP))
    lefts = np.cumsum([0, *widths[:-1]])
    texts = [_wrap_row(row, panel_size, prompt_width) for row in rows]
    heights = [
        max(
            _text_height(prompt, _PROMPT_SIZE) + 4,
            panel_size + 4 + max(_text_height(w, _WORDS_SIZE) for w in words),
        )
        + _GAP
        for prompt, words in texts
    ]
    tops = np.cumsum([_HEADING_HEIGHT, *heights])
    sheet = Image.new("RGB", (sum(widths), int(tops[-1])), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for heading, left in zip(headings, lefts, strict=True):
        pen.text((int(left) + _GAP, 8), heading, _INK, font=_font(_PROMPT_SIZE))
    for row, top, (prompt, words) in zip(rows, tops[:-1], texts, strict=True):
        pen.line([(0, top - 3), (sheet.width, top - 3)], (225, 225, 225))
        pen.multiline_text((_GAP, top + 4), prompt, _INK, font=_font(_PROMPT_SIZE))
        captions = iter(words)
        for left, group in zip(lefts[1:], row.groups, strict=True):
            for p, panel in enumerate(group):
                place = (int(left) + _GAP + p * (panel_size + _GAP), int(top) + 2)
                is_larger = len(panel.image) > panel_size
                resized = Image.fromarray(panel.image).resize(
                    (panel_size, panel_size),
                    Image.Resampling.BOX if is_larger else Image.Resampling.NEAREST,
                )
                sheet.paste(resized, place)
                pen.multiline_text(
                    (place[0], place[1] + panel_size + 2),
                    next(captions),
                    _FAINT,
                    font=_font(_WORDS_SIZE),
                )
    return np.asarray(sheet)


def save_sheet(path: Path, headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes the image of `draw_sheet`."""
    own_files.write_png(path, draw_sheet(headings, rows))


def save_comparison(
    path: Path, rows: Iterable[tuple[str, Sequence[Panel], Pixels, Pixels]]
) -> None:
    """Writes prompt | retrieved documents | generated with retrieval | without."""
    headings = ("prompt", "retrieved documents", "with retrieval", "without")
    shown = [
        Row(prompt, (panels, [Panel(with_retrieval)], [Panel(plain)]))
        for prompt, panels, with_retrieval, plain in rows
    ]
    save_sheet(path, headings, shown)


def save_outputs(
    path: Path,
    generator: Generator,
    with_retrieval: Sequence[GenerationOutput],
    plain: Sequence[GenerationOutput],
) -> None:
    """`save_comparison` of outputs with and without retrieval."""
    pairs = zip(with_retrieval, plain, strict=True)
    save_comparison(
        path,
        [
            (a.prompt, retrieved_panels(generator, a), a.images[0], b.images[0])
            for a, b in pairs
        ],
    )


def retrieved_panels(generator: Generator, output: GenerationOutput) -> list[Panel]:
    """The documents of a sample, as the model sees them."""
    found = output.retrieved
    return document_panels(generator.tokenizer, found.documents, found.scores.tolist())


def memory_panels(
    memory: Any,
    tokenizer: Any,
    rows: Int[np.ndarray, " k"],
    scores: Sequence[float] | None = None,
) -> list[Panel]:
    """Documents of a memory, as a model sees them; rows of -1 are left out."""
    there = rows >= 0
    kept = None if scores is None else np.asarray(scores)[there].tolist()
    return document_panels(tokenizer, memory.documents(rows[there]), kept)


def document_panels(
    tokenizer: Any,
    documents: Sequence[TokenizedDocument],
    scores: Sequence[float] | None = None,
) -> list[Panel]:
    """The last image of each document that has one, with its text and its score."""
    panels = []
    for i, document in enumerate(documents):
        decoded = tokenizer.decode(document)
        words = decoded.text
        # Hand-picked documents have no score.
        if scores is not None and np.isfinite(scores[i]):
            words += f" ({scores[i]:.2f})"
        if decoded.images:
            panels.append(Panel(decoded.images[-1], words))
    return panels
