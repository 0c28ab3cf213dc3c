"""Runs a suite and writes what came out: `results.json`, a table, a picture sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax import own_files
from racm3_jax.evaluation.intervals import Estimate, Share
from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import GenerationOutput


def check_workdir(workdir: Path) -> None:
    """Refuses a work directory where results would replace somebody's own files."""
    names = ("results.json", "table.md", "samples.png")
    sheets = (workdir / "samples").glob("*.png")
    own_files.check(
        *(workdir / name for name in names),
        *sheets,
        change="give another --workdir",
    )


def write_results(
    workdir: Path, results: Mapping[str, Any], settings: Mapping[str, Any]
) -> Path:
    """Writes `results.json`; shares and estimates carry their intervals."""
    record = {
        "settings": dict(settings),
        "results": {
            name: value.to_json() if isinstance(value, Share | Estimate) else value
            for name, value in results.items()
        },
    }
    path = workdir / "results.json"
    own_files.write_json(path, record, sort_keys=True)
    return path


def write_table(workdir: Path, table: str) -> None:
    """Writes `table.md`."""
    own_files.write_markdown(workdir / "table.md", table)


def retrieved_panels(generator: Generator, output: GenerationOutput) -> list[Panel]:
    """The documents that a sample was given, as the model sees them."""
    panels = []
    for document, score in zip(
        output.retrieved.documents, output.retrieved.scores, strict=True
    ):
        decoded = generator.tokenizer.decode(document)
        words = decoded.text  # hand-picked documents have no score
        if np.isfinite(score):
            words += f" ({score:.2f})"
        if decoded.images:
            panels.append(Panel(decoded.images[-1], words))
    return panels


def write_sheet(
    path: Path,
    generator: Generator,
    with_retrieval: Sequence[GenerationOutput],
    without: Sequence[GenerationOutput],
) -> None:
    """`samples.png`: prompt | retrieved documents | drawn with retrieval | without."""
    rows = [
        Row(
            drawn.prompt,
            (
                retrieved_panels(generator, drawn),
                [Panel(drawn.images[0])],
                [Panel(plain.images[0])],
            ),
        )
        for drawn, plain in zip(with_retrieval, without, strict=True)
    ]
    headings = ("prompt", "retrieved documents", "with retrieval", "without")
    save_sheet(path, headings, rows)


def save_sheet(path: Path, headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes a table of pictures."""
    own_files.write_png(path, draw_sheet(headings, rows))
