"""The suites of evaluation."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.build.generators import load_generator
from racm3_jax.build.parts import (
    build_memory,
    build_world,
    construct,
    resolve,
)
from racm3_jax.documents.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.evaluation.flagworld import FlagworldJudge, SuiteSettings
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig


@dataclasses.dataclass(frozen=True)
class FlagworldSuite:
    """The objects of the flagworld suite, over memories built in a work directory."""

    generator: Generator
    twin: Generator | None
    swapped: Generator
    judge: FlagworldJudge
    swapped_judge: FlagworldJudge
    settings: SuiteSettings
    memory: Memory


def build_flagworld_suite(config: Any, workdir: Path) -> FlagworldSuite:
    """Builds both memories (as they are, and with exchanged flags) and opens the models.

    Raises:
      ValueError: for a suite of another name.
    """
    if config.suite != "flagworld":
        raise ValueError(f"config.suite is {config.suite!r}; allowed: flagworld")
    directory = resolve(config.models)
    plain = load_generator(directory, None, model=config.model)
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    embedder = plain.embedder
    assert embedder is not None  # load_generator always opens one
    world = build_world(config)
    swapped_world = dataclasses.replace(world, swap_flags=True)
    pictures, scenes = [], []
    for document in itertools.islice(
        read_flagworld(world, "train"), config.num_scene_examples
    ):
        pictures.append(document.images[0])
        scenes.append(document.metadata["scene"])
    image_tokenizer = plain.tokenizer.image
    coded = image_tokenizer.decode(image_tokenizer.encode(np.stack(pictures)))

    def open_memory(name: str, its_world: FlagworldConfig) -> Memory:
        documents = itertools.chain(
            read_flagworld(its_world, "heldout_memory"),
            read_flagworld(its_world, "train"),
        )
        return build_memory(
            config,
            workdir / name,
            documents,
            plain.tokenizer,
            embedder,
            num_documents=its_world.num_heldout * its_world.documents_per_heldout
            + its_world.num_nations * its_world.documents_per_nation,
        )

    def judge(its_world: FlagworldConfig) -> FlagworldJudge:
        tests = {
            d.metadata["nation"]: d for d in read_flagworld(its_world, "heldout_test")
        }
        return FlagworldJudge(its_world, list(tests.values()), coded, scenes)

    memory = open_memory("memory", world)
    swapped_memory = open_memory("memory_swapped", swapped_world)
    return FlagworldSuite(
        plain.with_retriever(Retriever(memory, strategy)),
        load_generator(directory, None, model=config.twin) if config.twin else None,
        plain.with_retriever(Retriever(swapped_memory, strategy)),
        judge(world),
        judge(swapped_world),
        construct(SuiteSettings, config.settings, "settings"),
        memory,
    )
