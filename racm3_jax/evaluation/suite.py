"""What all suites have in common: work in chunks, then figures, a table and images.

stages        retrieval, no_retrieval, ...   computed in chunks (see `parts`): resumed
                                             after a kill, shared by processes and
                                             devices
figures       "variant/name"                 of the finished chunks, with intervals

results.json  settings and figures
table.md      the figures that people read
samples.png   a few items to look at
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from racm3_jax import own_files
from racm3_jax.evaluation.intervals import (
    Estimate,
    Share,
    compute_grouped_share,
    compute_share,
)
from racm3_jax.evaluation.parts import Arrays, Parts
from racm3_jax.evaluation.retrieval import stack_rows
from racm3_jax.generation.tasks import Generator
from racm3_jax.progress import open_progress
from racm3_jax.types import GenerationOutput

# Where the output is a file, it is read while the suite runs.
_say = functools.partial(print, flush=True)


class Stage(NamedTuple):
    """A computation for every item of a list.

    Attributes:
      name: of its files.
      parts: the chunks of the list.
      compute: (positions of items, device) -> arrays, one row per item.
      figures: names of figures by columns, whose fractions they are; see
        `Suite.count_shares`.
    """

    name: str
    parts: Parts
    compute: Callable[[range, Any], Arrays]
    figures: Mapping[str, str] = {}


class Suite:
    """One run of a suite in a work directory; subclasses define the measurements.

    Attributes:
      record: all settings and fingerprints; goes into `results.json`, and chunks of
        another record are refused.
      facts: found by the run itself; also goes into `results.json`.
      parts: the chunks of the items.
      process: index and count of the processes, and the devices of this one.
    """

    def __init__(
        self,
        workdir: Path,
        record: Mapping[str, Any],
        num_items: int,
        chunk_size: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        devices: Sequence[Any] = (None,),
    ) -> None:
        """Computes nothing yet.

        Args:
          workdir: shared by all processes; finished parts there are kept.
          record: everything that the figures depend on.
          num_items: of the whole list.
          chunk_size: the most items lost when the run is killed.
          process_index: of this process.
          process_count: processes that share the work.
          devices: of this process, which divide its work; None is the model's device.
        """
        self.record, self.facts = dict(record), {}
        self.parts = Parts(workdir, num_items, chunk_size, self.record)
        self.process: dict[str, Any] = {
            "process_index": process_index,
            "process_count": process_count,
            "devices": tuple(devices),
        }

    def stages(self) -> Sequence[Stage]:
        """The stages, in order."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Figures by name; FileNotFoundError where a chunk is missing."""
        raise NotImplementedError

    def format_table(self, results: Mapping[str, Any]) -> str:
        """The figures in markdown."""
        raise NotImplementedError

    def write_images(self) -> None:
        """Writes images to look at."""
        raise NotImplementedError

    def run(self, log: Callable[[str], None] = _say) -> dict[str, Any] | None:
        """Runs to the end; the same call resumes.

        Args:
          log: receives one line per stage, and the table.

        Returns:
          The figures by name; None in processes other than the first.
        """
        self.run_stages(log)
        if self.process["process_index"]:
            return None
        for stage in self.stages():
            stage.parts.wait([stage.name], log)
        results = self.figures()
        log(self.write(results))
        return results

    def run_stages(self, log: Callable[[str], None] = _say) -> None:
        """Computes this process's missing chunks of every stage."""
        stages = self.stages()
        for number, stage in enumerate(stages, 1):
            made, seconds = self.run_stage(stage)
            place = f"{number} of {len(stages)}, {stage.name}"
            log(f"{place}: {made} chunks, {seconds:.0f} s")

    def run_stage(self, stage: Stage) -> tuple[int, float]:
        """(computed chunks, seconds)."""
        started, parts = time.monotonic(), stage.parts
        missing = len(parts.missing([stage.name])) * parts.chunk_size
        with open_progress(
            desc=stage.name,
            total=parts.num_items,
            initial=max(0, parts.num_items - missing),
            unit="items",
            disable=missing <= parts.chunk_size,
        ) as bar:

            def compute(items: range, device: Any) -> Arrays:
                found = stage.compute(items, device)
                bar.update(len(items))
                return found

            made = parts.make(stage.name, compute, **self.process)
        return made, time.monotonic() - started

    def count_shares(self) -> dict[str, Share]:
        """The figures named by the stages.

        A column has one outcome per item, or successes and their total `[items, 2]`.
        """
        results = {}
        for stage in self.stages():
            columns = stage.parts.load(stage.name) if stage.figures else {}
            for column, name in stage.figures.items():
                found = columns[column]
                results[name] = (
                    compute_share(found.tolist())
                    if found.ndim == 1
                    else compute_grouped_share(*found.T.tolist())
                )
        return results

    def read_seconds(self) -> dict[str, float]:
        """The seconds of each stage, over all processes and calls."""
        stages = self.stages()
        return {s.name: round(s.parts.read_seconds(s.name), 1) for s in stages}

    def finish(self, stage: Stage) -> dict[str, np.ndarray]:
        """All columns of a stage, after all processes have finished it."""
        self.run_stage(stage)
        stage.parts.wait([stage.name])
        return stage.parts.load(stage.name)

    def write(self, results: Mapping[str, Any]) -> str:
        """Writes the files into the work directory, and returns the table."""
        workdir, table = self.parts.workdir, self.format_table(results)
        record = {
            "settings": self.record | self.facts | {"run": self.parts.fingerprint},
            "results": to_json(results),
        }
        own_files.write_json(workdir / "results.json", record, sort_keys=True)
        own_files.write_markdown(workdir / "table.md", table)
        self.write_images()
        return table


def to_json(value: Any) -> Any:
    """Figures as records, with their intervals; also inside mappings."""
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return value.to_json() if isinstance(value, Share | Estimate) else value


def check_workdir(workdir: Path) -> None:
    """Refuses a work directory where results would replace the user's files."""
    names = ("results.json", "table.md", "samples.png")
    sheets = (workdir / "samples").glob("*.png")
    own_files.check(
        *(workdir / name for name in names),
        *sheets,
        change="give another --workdir",
    )


def keep_outputs(outputs: Sequence[GenerationOutput], generator: Generator) -> Arrays:
    """Columns of sampled images, for sheets.

    Returns:
      "prompt", "images" (the best of each), "retrieved" (rows of the memory before each,
      also hand-picked ones) and their "scores".
    """
    found = [output.retrieved for output in outputs]
    rows = [[] for _ in found]
    if any(f.documents for f in found):
        assert generator.retriever is not None  # documents come from there
        memory = generator.retriever.memory
        rows = [memory.find([d.id for d in f.documents]).tolist() for f in found]
    stacked = stack_rows(rows)
    scores = np.full(stacked.shape, np.nan, np.float32)
    for row, f in zip(scores, found, strict=True):
        row[: len(f.scores)] = f.scores
    return {
        "prompt": np.array([output.prompt for output in outputs], np.str_),
        "images": np.stack([output.images[0] for output in outputs]),
        "retrieved": stacked,
        "scores": scores,
    }


def format_rows(
    headings: Sequence[str], rows: Mapping[str, Sequence[Any]], digits: int = 4
) -> list[str]:
    """Lines of a markdown table; None is a cell without a figure."""
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for title, cells in rows.items():
        shown = (
            "-" if c is None else f"{c:.{digits}f}" if isinstance(c, float) else str(c)
            for c in cells
        )
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return lines


def format_variants(
    title: str, variants: Sequence[str], results: Mapping[str, Any]
) -> list[str]:
    """`format_rows` of figures "variant/name": one row per name, one column per variant."""
    names = [n.partition("/")[2] for n in results if n.startswith(tuple(variants))]
    rows = {name: [results.get(f"{v}/{name}") for v in variants] for name in names}
    return format_rows([title, *variants], rows)
