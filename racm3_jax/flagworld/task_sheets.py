"""Titles of the figures of the flagworld tasks, and one image sheet per task.

infill.png   prompt | documents | given | generated: masked, twin; masked; in_place; ...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.pictures import Panel, Row, memory_panels, save_sheet
from racm3_jax.flagworld.task_probes import Box, TaskProbes
from racm3_jax.generation.settings import REGION_PROMPTS
from racm3_jax.generation.tasks import Generator

# Task -> variant -> columns of the outputs, see `keep_outputs`.
TaskOutputs = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]

_HEADINGS = ("prompt", "documents", "given", "generated")


def write_task_sheets(
    folder: Path,
    generator: Generator,
    probes: TaskProbes,
    outputs: TaskOutputs,
    num_rows: int,
) -> None:
    """Writes `TASK.png` for each task; the region to fill in is grey.

    Args:
      folder: of the sheets; created.
      generator: whose tokenizer shows the documents.
      probes: the inputs.
      outputs: the generated images.
      num_rows: items of a sheet; 0 writes none.
    """
    if not num_rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for task, ways in outputs.items():
        boxes = _regions(task, probes)
        # Of the variants with documents, which are the same.
        most = max(ways.values(), key=lambda columns: columns["retrieved"].shape[1])
        rows = [
            Row(
                prompt,
                (
                    _documents(generator, most, i),
                    [] if boxes is None else [Panel(_hide(probes, i, boxes[i]))],
                    [Panel(columns["images"][i], way) for way, columns in ways.items()],
                ),
            )
            for i, prompt in enumerate(most["prompt"][:num_rows].tolist())
        ]
        save_sheet(folder / f"{task}.png", _HEADINGS, rows)


def _regions(task: str, probes: TaskProbes) -> list[Box] | None:
    """The hidden region of each item, if any."""
    if task.startswith("infill"):
        return probes.fly_halves()
    return probes.flag_boxes() if task.startswith("edit") else None


def _documents(
    generator: Generator, columns: Mapping[str, np.ndarray], i: int
) -> list[Panel]:
    if generator.retriever is None:
        return []
    memory, tokenizer = generator.retriever.memory, generator.tokenizer
    rows, scores = columns["retrieved"][i], columns["scores"][i]
    return memory_panels(memory, tokenizer, rows, scores)


def _hide(probes: TaskProbes, i: int, box: Box) -> np.ndarray:
    left, top, right, bottom = box
    given = probes.tests[i].images[0].copy()
    given[top:bottom, left:right] = 128
    return given


def make_titles(results: Mapping[str, Any]) -> dict[str, str]:
    """The titles of the existing figures, in the order of the table."""
    titles = {}
    for prompt in REGION_PROMPTS:
        titles |= {
            f"alone/infill_{prompt}": f"hidden half generated {prompt}: no documents",
            f"twin/infill_{prompt}": f"hidden half generated {prompt}: trained without retrieval",
        }
    plain = {}
    for prompt in REGION_PROMPTS:
        plain |= {
            f"infill_{prompt}/flag": f"hidden half generated {prompt}: right flag",
            f"edit_{prompt}/flag": f"region generated {prompt}: the chosen document's flag",
            f"edit_{prompt}/codes_kept": f"codes outside that are kept, {prompt}",
            f"edit_{prompt}_sized/flag": f"the same, a document of that size, {prompt}",
            f"edit_{prompt}_sized/codes_kept": f"codes outside that are kept, sized, {prompt}",
            f"edit_{prompt}_beside/flag": f"any, with a similar one, {prompt}",
            f"edit_{prompt}_beside/codes_kept": f"codes outside that are kept, similar one too, {prompt}",
        }
    for name, who in (("named", "prompt names it"), ("other", "prompt names another")):
        for end, what in (
            ("", "demonstration"),
            ("_two", "two demonstrations"),
            ("_beside", "demonstration with a similar one"),
        ):
            for value in ("flag", "layout"):
                title = f"{what} followed: {value} ({who})"
                plain[f"controlled_{name}{end}/{value}"] = title
    for name, title in plain.items():
        task, _, value = name.partition("/")
        titles |= {name: title, f"{task}_guided/{value}": f"{title}, guided"}
    titles |= {
        "int8/flag": "generated flag right, weights in 8 bits",
        "rerank/none": "generated flag right, any sample",
        "rerank/clip": "generated flag right, best by CLIP",
        "rerank/likelihood": "generated flag right, best by likelihood",
        "rerank/document": (
            "any, with a similar one, in_place, guided: best by similarity to the document"
        ),
    }
    for name in results:
        task, _, value = name.partition("/")
        if task.startswith("kshot_"):
            by = task.removeprefix("kshot_").removesuffix("_auc")
            title = f"two-way classification by {by}, {value} examples a label"
            titles[name] = f"{title}: AUC" if task.endswith("_auc") else title
        if task == "guidance":
            titles[name] = f"generated flag right, guidance {value}"
        if task == "document_guidance":
            titles[name] = f"generated flag right, guidance {value} with documents"
    return {name: title for name, title in titles.items() if name in results}
