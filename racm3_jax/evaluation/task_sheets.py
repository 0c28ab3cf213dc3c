"""Images that the tasks of flagworld made: one sheet a task, all ways side by side.

infill.png   prompt | documents | given | generated: masked, twin; masked; in_place; ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from racm3_jax.evaluation.pictures import Panel, Row
from racm3_jax.evaluation.runner import retrieved_panels, save_sheet
from racm3_jax.evaluation.task_probes import Box, TaskProbes
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import GenerationOutput

# Task -> way of asking -> what was generated for each item.
TaskOutputs = Mapping[str, Mapping[str, Sequence[GenerationOutput]]]

_HEADINGS = ("prompt", "documents", "given", "generated")


def write_task_sheets(
    folder: Path,
    generator: Generator,
    probes: TaskProbes,
    outputs: TaskOutputs,
    num_rows: int,
) -> None:
    """Writes `TASK.png` for each task; the region that was asked for is given in grey.

    Args:
      folder: of the sheets; is made.
      generator: whose tokenizer shows the documents.
      probes: what was asked.
      outputs: what was drawn.
      num_rows: items of a sheet; 0 writes none.
    """
    if not num_rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for task, ways in outputs.items():
        boxes = _regions(task, probes)
        rows = [
            Row(
                found[0].prompt,
                (
                    _documents(generator, found),
                    [] if boxes is None else [Panel(_hide(probes, i, boxes[i]))],
                    [
                        Panel(output.images[0], way)
                        for way, output in zip(ways, found, strict=True)
                    ],
                ),
            )
            for i, found in enumerate(zip(*ways.values(), strict=True))
            if i < num_rows
        ]
        save_sheet(folder / f"{task}.png", _HEADINGS, rows)


def _regions(task: str, probes: TaskProbes) -> list[Box] | None:
    """What was hidden of each item, where something was."""
    if task.startswith("infill"):
        return probes.fly_halves()
    return probes.flag_boxes() if task.startswith("edit") else None


def _documents(
    generator: Generator, outputs: Sequence[GenerationOutput]
) -> list[Panel]:
    """Those of the ways that had documents: they are the same."""
    most = max(outputs, key=lambda output: len(output.retrieved.documents))
    return retrieved_panels(generator, most)


def _hide(probes: TaskProbes, i: int, box: Box) -> np.ndarray:
    left, top, right, bottom = box
    given = probes.tests[i].images[0].copy()
    given[top:bottom, left:right] = 128
    return given
