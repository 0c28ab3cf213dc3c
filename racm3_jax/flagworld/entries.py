"""The suites of flagworld: their configs, and what they are built from."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.flagworld.judge import FlagworldJudge
from racm3_jax.flagworld.reading import make_reading_questions
from racm3_jax.flagworld.settings import FlagworldSettings, TaskSettings
from racm3_jax.flagworld.suite import FlagworldSuite
from racm3_jax.flagworld.task_probes import TaskProbes
from racm3_jax.flagworld.task_suite import TasksSuite
from racm3_jax.flagworld.world.config import FlagworldConfig
from racm3_jax.flagworld.world.nations import make_nations
from racm3_jax.flagworld.world.reader import WORLD, read_flagworld
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Document
from racm3_jax.wiring.sections import EvaluationOfModels, construct
from racm3_jax.wiring.suite_parts import (
    describe_inputs,
    describe_process,
    open_models,
    open_world_memory,
    with_memory,
)
from racm3_jax.worlds import SuiteEntry


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagworldEvaluation(EvaluationOfModels):
    """A file with `suite = "flagworld"`."""

    world: FlagworldConfig
    settings: FlagworldSettings
    num_scene_examples: int
    num_sheet_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksEvaluation(EvaluationOfModels):
    """A file with `suite = "flagworld_tasks"`."""

    world: FlagworldConfig
    settings: TaskSettings
    num_sheet_rows: int


def build_flagworld_suite(config: Any, workdir: Path) -> FlagworldSuite:
    """Builds both memories: as they are, and with exchanged flags."""
    world = construct(FlagworldConfig, config.world, "world")
    swapped_world = dataclasses.replace(world, swap_flags=True)
    plain, twin = open_models(config)
    pictures, scenes = [], []
    for document in itertools.islice(
        read_flagworld(world, "train"), config.num_scene_examples
    ):
        pictures.append(document.images[0])
        scenes.append(document.metadata["scene"])
    image_tokenizer = plain.tokenizer.image
    coded = image_tokenizer.decode(image_tokenizer.encode(np.stack(pictures)))

    def judge(its_world: FlagworldConfig) -> FlagworldJudge:
        return FlagworldJudge(its_world, _tests(its_world), coded, scenes)

    memory = _open_memory(config, workdir / "memory", world, plain)
    swapped = _open_memory(config, workdir / "memory_swapped", swapped_world, plain)
    settings = construct(FlagworldSettings, config.settings, "settings")
    questions = []
    # One nation a question: a small world has fewer.
    num_reading = min(settings.num_reading, world.num_heldout)
    if num_reading:
        questions = make_reading_questions(world, num_reading, seed=settings.seed)
    generator = with_memory(plain, memory, config)
    return FlagworldSuite(
        generator,
        twin,
        with_memory(plain, swapped, config),
        judge(world),
        judge(swapped_world),
        settings,
        workdir,
        describe_inputs(config, generator, twin),
        questions=questions,
        num_sheet_rows=config.num_sheet_rows,
        **describe_process(),
    )


def build_tasks_suite(config: Any, workdir: Path) -> TasksSuite:
    """Builds the memory."""
    world = construct(FlagworldConfig, config.world, "world")
    settings = construct(TaskSettings, config.settings, "settings")
    plain, twin = open_models(config)
    memory = _open_memory(config, workdir / "memory", world, plain)
    probes = TaskProbes(
        make_nations(world, "heldout"),
        _tests(world),
        list(read_flagworld(world, "heldout_memory")),
        settings,
    )
    generator = with_memory(plain, memory, config)
    return TasksSuite(
        generator,
        twin,
        probes,
        settings,
        workdir,
        describe_inputs(config, generator, twin),
        num_sheet_rows=config.num_sheet_rows,
        **describe_process(),
    )


def _open_memory(
    config: Any, path: Path, world: FlagworldConfig, generator: Generator
) -> Memory:
    return open_world_memory(config, path, WORLD, world, generator)


def _tests(world: FlagworldConfig) -> list[Document]:
    """One test document of every held-out nation."""
    tests = {d.metadata["nation"]: d for d in read_flagworld(world, "heldout_test")}
    return list(tests.values())


FLAGWORLD = SuiteEntry(FlagworldEvaluation, build_flagworld_suite)
TASKS = SuiteEntry(TasksEvaluation, build_tasks_suite)
