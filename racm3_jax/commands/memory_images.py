"""Images of a memory: search results, and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64, UInt8

from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet
from racm3_jax.types import Document

Pixels = UInt8[np.ndarray, "height width 3"]
_BLANK = np.full((8, 8, 3), 235, np.uint8)
COLUMNS = 6


def render_results(
    asked: str | Pixels, documents: Sequence[Document], scores: Sequence[float]
) -> Pixels:
    """The query, then the documents in order with their scores, `COLUMNS` per line."""
    panels = [
        _panel(document, f"{score:.3f}")
        for document, score in zip(documents, scores, strict=True)
    ]
    if isinstance(asked, str):
        return draw_sheet(["query", "retrieved"], _lines(panels, asked))
    rows = [
        Row("", [[Panel(asked, "query")] if i == 0 else [], row.groups[0]])
        for i, row in enumerate(_lines(panels, ""))
    ]
    return draw_sheet(["", "query", "retrieved"], rows, prompt_width=8)


def render_contact_sheet(documents: Sequence[Document]) -> Pixels:
    """A contact sheet: first images and captions, `COLUMNS` per line."""
    panels = [_panel(document, "") for document in documents]
    return draw_sheet(["", "documents"], _lines(panels, ""), prompt_width=8)


def choose_rows(
    allowed: Int64[np.ndarray, " n"], num: int = 24
) -> Int[np.ndarray, " shown"]:
    """Rows spread evenly over a memory."""
    places = np.linspace(0, len(allowed) - 1, min(num, len(allowed)))
    return allowed[places.astype(int)]


def _panel(document: Document, score: str) -> Panel:
    images = document.images
    words = f"{score} {document.text}".strip()
    return Panel(images[0] if images else _BLANK, words[:90])


def _lines(panels: Sequence[Panel], prompt: str) -> list[Row]:
    starts = range(0, max(1, len(panels)), COLUMNS)
    return [
        Row(prompt if start == 0 else "", [panels[start : start + COLUMNS]])
        for start in starts
    ]
