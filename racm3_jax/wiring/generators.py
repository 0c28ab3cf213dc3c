"""A directory that holds a generator: written after training, opened to generate."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from racm3_jax import checkpoints
from racm3_jax.checkpoints.manifest import MANIFEST_NAME, write_aside
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.tokenizers.mixed import MixedTokenizer

ORIGIN_NAME = "origin.json"


def save_generator(
    directory: Path,
    model_config: ModelConfig,
    params: Any,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    strategy: StrategyConfig,
) -> None:
    """Writes `model/`, `tokenizer/` and `clip/`: all that generation needs but a memory.

    The strategy that the model was trained with is kept beside its weights.
    """
    checkpoints.save_weights(
        directory / "model",
        params,
        kind="generator",
        config=dataclasses.asdict(model_config),
        extra={
            "tokenizer": tokenizer.fingerprint(),
            "clip": embedder.fingerprint(),
            "strategy": dataclasses.asdict(strategy),
        },
    )
    tokenizer.save(directory / "tokenizer")
    embedder.save(directory / "clip")


def carry_origin(start: Path, directory: Path) -> bool:
    """Copies what stands beside converted weights to what was trained from them.

    `source/` is what `racm3 export` needs; `origin.json` says whose weights they were
    and under which licence.

    Args:
      start: the folder of the weights that a training began with.
      directory: the folder of `save_generator`.

    Returns:
      Whether there was anything.
    """
    found = start.parent / "source"
    if not found.is_dir():
        return False
    shutil.copytree(found, directory / "source", dirs_exist_ok=True)
    manifest = start.parent / MANIFEST_NAME
    origin = start.parent / ORIGIN_NAME
    if origin.exists():
        shutil.copyfile(origin, directory / ORIGIN_NAME)
    elif manifest.exists():
        facts = json.loads(manifest.read_text()).get("origin", {})
        write_aside(directory / ORIGIN_NAME, json.dumps(facts, indent=1).encode())
    return True


def load_generator(
    directory: Path,
    memory: Memory | None,
    strategy: StrategyConfig | None = None,
    *,
    model: str = "model",
) -> Generator:
    """Opens what `save_generator` wrote.

    Args:
      directory: holds the folder of the model, `tokenizer/` and `clip/`.
      memory: what to retrieve from, or None.
      strategy: which of the found documents are used; None takes the one of the
        model's training.
      model: the folder of the weights ("twin" for the shipped model without retrieval).

    Raises:
      ValueError: a missing directory, or a memory of another encoder or tokenizer.
    """
    if not (directory / "clip").is_dir():
        raise ValueError(
            f"{directory} has no clip/, which embeds queries and ranks samples: copy a "
            "converted CLIP there, or convert the model again with --clip=FOLDER"
        )
    params, fields, extra = checkpoints.load_weights(directory / model, "generator")
    tokenizer = MixedTokenizer.load(directory / "tokenizer")
    embedder = DocumentEmbedder.load(directory / "clip")
    retriever = None
    if memory is not None:
        memory.check(embedder=embedder, tokenizer=tokenizer)
        strategy = strategy or StrategyConfig(**extra.get("strategy", {}))
        retriever = Retriever(memory, strategy)
    return Generator(ModelConfig(**fields), params, tokenizer, retriever, embedder)
