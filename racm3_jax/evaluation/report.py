"""A report in one HTML file: with embedded images, no script, no network."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from racm3_jax import own_files
from racm3_jax.documents.images import encode_png
from racm3_jax.evaluation.pictures import Panel, retrieved_panels

if TYPE_CHECKING:
    from racm3_jax.generation.tasks import Generator
    from racm3_jax.types import Document, GenerationOutput

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px;
  color: #222; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
img { max-width: 100%; } table { border-collapse: collapse; }
td, th { padding: 6px 10px; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
img.small { width: 96px; height: 96px; image-rendering: pixelated; }
.faint { color: #777; font-size: 0.85em; }
"""


@dataclasses.dataclass(frozen=True)
class CaptionRow:
    """One captioned image, with its retrieved documents."""

    image: UInt8[np.ndarray, "height width 3"]
    truth: str
    retrieved: Sequence[Panel]
    with_retrieval: str
    without: str


def caption_rows(
    generator: Generator,
    documents: Sequence[Document],
    with_retrieval: Sequence[GenerationOutput],
    without: Sequence[GenerationOutput],
) -> list[CaptionRow]:
    """Captions of the documents' images, with and without retrieval.

    Args:
      generator: of `with_retrieval`.
      documents: one image and one text each.
      with_retrieval: output per document.
      without: the same, from any model.
    """
    return [
        CaptionRow(
            image=document.images[0],
            truth=document.text,
            retrieved=retrieved_panels(generator, found),
            with_retrieval=found.texts[0],
            without=alone.texts[0],
        )
        for document, found, alone in zip(
            documents, with_retrieval, without, strict=True
        )
    ]


def _inline(png: bytes, alt: str, small: bool = False) -> str:
    data = base64.b64encode(png).decode()
    style = ' class="small"' if small else ""
    return f'<img{style} alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _caption_table(rows: Sequence[CaptionRow]) -> str:
    headings = ("image", "retrieved", "with retrieval", "without")
    lines = ["<table><tr>", *(f"<th>{heading}</th>" for heading in headings), "</tr>"]
    for row in rows:
        retrieved = " ".join(
            _inline(encode_png(panel.image), panel.words, small=True)
            for panel in row.retrieved
        )
        words = "<br>".join(html.escape(panel.words) for panel in row.retrieved)
        lines.append(
            f"<tr><td>{_inline(encode_png(row.image), row.truth, small=True)}"
            f'<div class="faint">{html.escape(row.truth)}</div></td>'
            f'<td>{retrieved}<div class="faint">{words}</div></td>'
            f"<td>{html.escape(row.with_retrieval)}</td>"
            f"<td>{html.escape(row.without)}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def write_report(
    path: Path,
    *,
    title: str,
    explanation: str,
    sheet: Path,
    captions: Sequence[CaptionRow],
    loss_curves: Mapping[str, Path],
    facts: Mapping[str, str],
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      title: of the page.
      explanation: of its images.
      sheet: the sample sheet, a PNG.
      captions: the captioned images.
      loss_curves: PNGs by heading; missing files are left out.
      facts: short facts shown at the top, by name.
    """
    items = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(explanation)}</p>",
        f"<table>{items}</table>",
        "<h2>Generated from a prompt</h2>",
        _inline(
            sheet.read_bytes(), "prompts, retrieved documents and generated images"
        ),
        "<h2>Captioned</h2>",
        _caption_table(captions),
    ]
    for heading, curve in loss_curves.items():
        if curve.exists():
            parts += [f"<h2>{html.escape(heading)}</h2>"]
            parts += [_inline(curve.read_bytes(), "loss curves")]
    head = f"<title>racm3 report</title><style>{_STYLE}</style>"
    own_files.write_html(path, head, "\n".join(parts))
