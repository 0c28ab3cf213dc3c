"""Interrupts commands at each of their file-system changes.

`try_operation` runs one command repeatedly; the process crashes at the first change,
then at the second, and so on (`crash_points`). After every crash the memory must be the
old or the new one, the same command must succeed, and nothing may be left on disk that
an undisturbed run would not leave.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from crash_points import count_points, crashed

from racm3_jax.memory import builder, edit
from racm3_jax.memory.config import CorpusConfig, make_chunk_builder
from racm3_jax.memory.memory import Memory
from racm3_jax.porting.clip import convert_clip
from racm3_jax.retrieval.embedder import DocumentEmbedder

OPERATIONS = ("build", "overwrite", "add", "remove", "compact")


@dataclasses.dataclass
class Outcome:
    """Results of the crashes of one operation.

    Attributes:
      points: number of injected crashes.
      died: number of crashes that happened.
      wrong: states that were neither old nor new.
      failed: commands that then failed, or ended in another memory.
      leftovers: points after which something was left on disk.
    """

    points: int = 0
    died: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    leftovers: list[str] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the crashes happen.

    Attributes:
      folder: has only the memory, and is recreated for every crash.
      before: a memory to begin with, copied there; None for none.
      models: tokenizer and embedder.
      sources: of the build, and of what is added.
      config: of the build.
    """

    folder: Path
    before: Path | None
    models: tuple[Any, Any]
    sources: tuple[str, str]
    config: CorpusConfig

    @property
    def path(self) -> Path:
        return self.folder / "memory"

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, self.path)

    def describe(self) -> tuple[Any, ...] | None:
        """What a reader finds: ids of the documents that may be shown; None without a memory."""
        try:
            with Memory.load(self.path) as memory:
                rows = memory.allowed_ids()
                ids = [d.id for d in memory.documents(rows)]
                found = memory.search(memory.embeddings[rows], 1).ids[:, 0]
                return (*ids, bool(np.array_equal(found, rows)))
        except FileNotFoundError:
            return None

    def build(self, source: str, overwrite: bool = False) -> None:
        tokenizer, embedder = self.models
        builder.build_memory(
            source,
            tokenizer=tokenizer,
            embedder=embedder,
            path=self.path,
            config=self.config,
            overwrite=overwrite,
        )

    def add(self) -> None:
        maker = make_chunk_builder(self.config, *self.models)
        edit.add_documents(self.path, self.sources[1], maker)

    def remove(self) -> None:
        with Memory.load(self.path) as memory:
            memory.remove(memory.find(["d1"]))

    def compact(self) -> None:
        edit.compact(self.path)


@dataclasses.dataclass(frozen=True)
class ConvertPlace:
    """Where a conversion is interrupted.

    Attributes:
      folder: has only the result, and is recreated for every crash.
      public: weights in a public layout.
    """

    folder: Path
    public: Path
    before: Path | None = None

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def describe(self) -> str | None:
        """The fingerprint of the result; None for none."""
        out = self.folder / "clip"
        return DocumentEmbedder.load(out).fingerprint() if out.exists() else None

    def convert(self) -> None:
        convert_clip(self.public, self.folder / "clip")


def list_tree(folder: Path) -> list[str]:
    """All files, and folders without any."""
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() or not any(p.iterdir())
    )


def try_operation(
    place: Place | ConvertPlace,
    action: Callable[[], object],
    every: int = 1,
) -> Outcome:
    """Interrupts one command at every point.

    Args:
      place: where it works.
      action: the command.
      every: distance of the tested points; the first and the last few are always tested.
    """
    place.reset()
    old = place.describe()
    action()
    new, expected = place.describe(), list_tree(place.folder)
    place.reset()
    num_points = count_points(action)
    outcome = Outcome()
    for point in range(1, num_points + 1):
        if point % every and point > 1 and point <= num_points - min(every, 8):
            continue
        place.reset()
        outcome.died += crashed(action, point)
        outcome.points += 1
        where = f"point {point}"
        try:
            state = place.describe()
            if state not in (old, new):
                outcome.wrong.append(f"{where}: {state}")
        except (ValueError, OSError) as error:
            outcome.wrong.append(f"{where}: {error}")
        try:
            if not (place.before is None and place.describe() == new):
                action()
            else:
                _run_again(action)
            if place.describe() != new:
                outcome.failed.append(f"{where}: another memory")
        except (ValueError, OSError) as error:
            outcome.failed.append(f"{where}: {error}")
        left = set(list_tree(place.folder)) ^ set(expected)
        if left:
            outcome.leftovers.append(f"{where}: {min(left)}")
    return outcome


def _run_again(action: Callable[[], object]) -> None:
    """A build that is already finished may raise an error."""
    try:
        action()
    except FileExistsError:
        return


def try_operations(
    out: Path,
    models: tuple[Any, Any],
    sources: tuple[str, str],
    config: CorpusConfig,
    operations: tuple[str, ...] = OPERATIONS,
    every: int = 1,
) -> dict[str, Outcome]:
    """Interrupts the commands of a memory at every point.

    Args:
      out: created; for all files.
      models: tokenizer and embedder.
      sources: of the build, and of what is added; the first has a document "d1".
      config: of the build.
      operations: which ones.
      every: see `try_operation`.
    """
    out.mkdir(parents=True)
    whole = Place(out / "whole", None, models, sources, config)
    whole.reset()
    whole.build(sources[0])
    changed = Place(out / "changed", whole.path, models, sources, config)
    changed.reset()
    changed.add()
    changed.remove()
    found = {}
    for name in operations:
        before = {"build": None, "compact": changed.path}.get(name, whole.path)
        place = Place(out / name, before, models, sources, config)
        actions: dict[str, Callable[[], object]] = {
            "build": lambda place=place: place.build(sources[0]),
            "overwrite": lambda place=place: place.build(sources[1], overwrite=True),
            "add": place.add,
            "remove": place.remove,
            "compact": place.compact,
        }
        found[name] = try_operation(place, actions[name], every)
        shutil.rmtree(place.folder)
    return found
