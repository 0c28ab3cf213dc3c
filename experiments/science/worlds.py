"""Worlds, their memories and judges, and the shipped models.

A seed's world has nations that no model was trained on: `num_heldout` tested nations
with 8 documents each, among the documents of `num_others` other nations.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from racm3_jax import wiring
from racm3_jax.commands.configs import find_config, load_config_file
from racm3_jax.flagworld import (
    FlagworldConfig,
    make_nations,
    read_flagworld,
)
from racm3_jax.flagworld.judge import FlagworldJudge
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import Document
from science.cells import hold
from science.experiment import TINY, Place

# Seeds of new worlds: the shipped models know world 0.
FIRST_WORLD = 1000
TRAINED_WORLD = 0
SHIPPED = "shipped:flagworld"
# Of the shipped CLIP: see configs/flagworld.py.
STRATEGY = StrategyConfig(max_similarity=0.95, num_candidates=24)
# The world of the small models, in which fewer steps are enough to learn copying: flags
# of one size, not waving, at one of two heights.
EASY: dict[str, Any] = {
    "flag_sizes": ((48, 32),),
    "wave_amplitudes": (0.0,),
    "placement_grid": 16,
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """The tests of a seed.

    Attributes:
      world: of the seed.
      tests: documents in scenes in which the memory never shows their nation.
      judge: decides by the world what is right.
      memory: has documents of every tested nation.
    """

    world: FlagworldConfig
    tests: list[Document]
    judge: FlagworldJudge
    memory: Memory

    def over_memory(
        self,
        generator: Generator,
        strategy: StrategyConfig = STRATEGY,
        memory: Any = None,
    ) -> Generator:
        """The model with this bench's memory, or another one."""
        chosen = self.memory if memory is None else memory
        return generator.with_retriever(Retriever(chosen, strategy))


def seed_world(seed: int, place: Place, **changes: Any) -> FlagworldConfig:
    """The world of a seed, which shares no flag with the training world."""
    scale = place.scale
    # A tiny run tests the code only.
    avoided = 0 if scale.name == TINY.name else _num_trained_nations()
    return FlagworldConfig(
        **(
            {
                "seed": FIRST_WORLD + seed,
                "num_nations": scale.num_others,
                "num_heldout": scale.num_heldout,
                "documents_per_nation": 4,
                "documents_per_heldout": 8,
                "avoided_seed": TRAINED_WORLD,
                "avoided_nations": avoided,
            }
            | changes
        )
    )


def open_bench(
    seed: int,
    place: Place,
    *,
    tests_per_nation: int = 1,
    documents: Sequence[Document] | None = None,
    **changes: Any,
) -> Bench:
    """The world of a seed, with its memory, which is built once.

    Args:
      seed: of the world.
      place: has the memory.
      tests_per_nation: 1 or 2 of the scenes in which the memory never shows it.
      documents: of the memory, instead of the world's own.
      **changes: settings of the world.
    """
    world = seed_world(seed, place, **changes)
    if documents is None:
        documents = [
            *read_flagworld(world, "heldout_memory"),
            *read_flagworld(world, "train"),
        ]
    # A tiny run tests the code only.
    known = frozenset() if place.scale.name == TINY.name else _trained_names()
    tests = choose_tests(world, tests_per_nation, known)
    return Bench(
        world, tests, open_judge(world, tests, place), open_memory(documents, place)
    )


def choose_tests(
    world: FlagworldConfig, tests_per_nation: int, known: frozenset[str]
) -> list[Document]:
    """Test documents of the nations whose names are not among the known ones."""
    counts: dict[str, int] = {}
    tests = []
    for document in read_flagworld(world, "heldout_test"):
        nation = document.metadata["nation"]
        if nation in known or counts.get(nation, 0) == tests_per_nation:
            continue
        if document.id.endswith("-copy"):
            continue
        counts[nation] = counts.get(nation, 0) + 1
        tests.append(document)
    return tests


def _num_trained_nations() -> int:
    """All of world 0: the shipped models, and the small ones, were trained on them."""
    world = load_config_file(find_config("flagworld.py")).world
    return world.num_nations + world.num_heldout


@functools.cache
def _trained_names() -> frozenset[str]:
    world = FlagworldConfig(
        seed=TRAINED_WORLD, num_nations=_num_trained_nations(), num_heldout=0
    )
    return frozenset(nation.name for nation in make_nations(world, "train"))


def open_judge(
    world: FlagworldConfig, tests: Sequence[Document], place: Place
) -> FlagworldJudge:
    """Evaluates images of the tests; scenes are the same in all worlds."""
    return FlagworldJudge(
        world, tests, *_scene_examples(place.scale.num_scene_examples)
    )


@functools.cache
def _scene_examples(count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Images reconstructed by the image tokenizer, and their scenes."""
    world = FlagworldConfig(seed=0, num_nations=max(1, count // 5), num_heldout=0)
    documents = list(read_flagworld(world, "train"))[:count]
    tokenizer = open_shipped("model").tokenizer.image
    pictures = np.stack([d.images[0] for d in documents])
    coded = tokenizer.decode(tokenizer.encode(pictures))
    return coded, tuple(d.metadata["scene"] for d in documents)


@functools.cache
def open_shipped(model: str) -> Generator:
    """A model of the package, "model" or "twin", without a memory."""
    return wiring.load_generator(wiring.resolve(SHIPPED), None, model=model)


def open_memory(
    documents: Sequence[Document],
    place: Place,
    *,
    num_query_variants: int = 0,
    query_drop: float = 0.2,
) -> Memory:
    """The memory of these documents, built with the shipped models if missing."""
    shipped = open_shipped("model")
    digest = hashlib.sha256(
        json.dumps(
            [num_query_variants, query_drop, shipped.tokenizer.fingerprint()]
        ).encode()
    )
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0{document.source}\0".encode())
        for image in document.images:
            digest.update(image.tobytes())
    path = place.work / "memories" / digest.hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seeds measured in parallel share the memory of their trainings.
    with hold(path.with_suffix(".lock")):
        if not (path / "manifest.json").exists():
            Memory.build(
                documents,
                tokenizer=shipped.tokenizer,
                embedder=shipped.embedder,
                path=path,
                index="exact",
                num_query_variants=num_query_variants,
                query_drop=query_drop,
            ).close()
    return Memory.load(path, embedder=shipped.embedder, tokenizer=shipped.tokenizer)


def shipped_weights() -> dict[str, str]:
    """The fingerprints of the shipped weights, as settings: new weights, new cells."""
    folder = wiring.resolve(SHIPPED)
    return {
        name: json.loads((folder / name / "config.json").read_text())["fingerprint"][
            :16
        ]
        for name in ("model", "twin", "clip", "tokenizer/image")
    }
