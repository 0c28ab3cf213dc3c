"""What suites of evaluation are built from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax

from racm3_jax.evaluation.fingerprints import describe_generator, fingerprint_params
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.wiring.generators import load_generator
from racm3_jax.wiring.parts import build_memory, resolve
from racm3_jax.wiring.sections import construct
from racm3_jax.worlds import World


def describe_process(generator: Generator | None = None) -> dict[str, Any]:
    """This process among all of them, and the devices that hold a copy of the model.

    Without a model all of a process's devices work on the same items.
    """
    place: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if generator is not None:
        place["devices"] = generator.devices_with_a_copy() or (None,)
    return place


def describe_inputs(
    config: Any, generator: Generator, twin: Generator | None
) -> dict[str, Any]:
    """What the figures of a suite depend on: its config, and what is in the folders."""
    inputs = describe_generator(generator)
    inputs["twin"] = None if twin is None else fingerprint_params(twin)
    number = inputs["memory"]["num_documents"]
    return config.to_dict() | {"memory_documents": number, "inputs": inputs}


def open_models(config: Any) -> tuple[Generator, Generator | None]:
    """The model and its twin (None if the config names none), without a memory."""
    directory = resolve(config.models)
    twin = load_generator(directory, None, model=config.twin) if config.twin else None
    return load_generator(directory, None, model=config.model), twin


def open_world_memory(
    config: Any, path: Path, world: World, settings: Any, generator: Generator
) -> Memory:
    """The memory at `path`, built of the world's held-out and training documents.

    Args:
      config: uses its section `memory`.
      path: of the memory's directory.
      world: of the documents.
      settings: of the world.
      generator: whose tokenizer and embedder the memory is for.
    """
    documents = itertools.chain(
        world.read(settings, "heldout_memory"), world.read(settings, "train")
    )
    assert generator.embedder is not None  # load_generator always opens one
    return build_memory(
        config,
        path,
        documents,
        generator.tokenizer,
        generator.embedder,
        num_documents=world.count(settings),
    )


def with_memory(generator: Generator, memory: Memory, config: Any) -> Generator:
    """The model with a memory, searched as the config says."""
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    return generator.with_retriever(Retriever(memory, strategy))
