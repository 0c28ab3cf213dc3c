"""The directory of a generator: written after training, opened for generation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from racm3_jax import checkpoints, own_files, storage
from racm3_jax.generation.settings import CaptionDefaults, ImageDefaults
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import SegmentOrder
from racm3_jax.tokenizers.mixed import MixedTokenizer

ORIGIN_NAME = "origin.json"
SOURCE_NAME = "source"


def save_generator(
    directory: Path,
    model_config: ModelConfig,
    params: Any,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    strategy: StrategyConfig,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes `model/`, `tokenizer/` and `clip/`: all for generation except a memory.

    The retrieval strategy of the training is stored with the weights, and so are the
    `defaults` that were measured with them (see `Engine`).
    """
    # The model last: it has the fingerprints of the others, which `load_generator`
    # checks.
    tokenizer.save(directory / "tokenizer")
    embedder.save(directory / "clip")
    checkpoints.save_weights(
        directory / "model",
        params,
        kind="generator",
        config=dataclasses.asdict(model_config),
        extra={
            "tokenizer": tokenizer.fingerprint(),
            "clip": embedder.fingerprint(),
            "strategy": dataclasses.asdict(strategy),
            "defaults": dict(defaults or {}),
        },
    )


def ask_as_trained(
    defaults: Mapping[str, Mapping[str, Any]], segment_order: SegmentOrder
) -> dict[str, dict[str, Any]]:
    """The defaults of a trained model: captions are asked for as its examples ask.

    Args:
      defaults: those of the weights where the training began.
      segment_order: of the training, see `PipelineConfig`.
    """
    caption = {**defaults.get("caption", {}), "image_first": segment_order == "as_main"}
    return {name: dict(of) for name, of in defaults.items()} | {"caption": caption}


def carry_origin(start: Path, directory: Path) -> bool:
    """Copies the files next to converted weights to a model trained from them.

    `racm3 export` needs `source/`; `origin.json` has the origin and licence of the
    weights.

    Args:
      start: the folder of the initial weights of a training.
      directory: the folder of `save_generator`.

    Returns:
      Whether anything was copied.
    """
    found = start.parent / SOURCE_NAME
    if not found.is_dir():
        return False
    checkpoints.verify_folder(found)
    with checkpoints.sealed_folder(
        directory / SOURCE_NAME, SOURCE_NAME, overwrite=True
    ) as folder:
        for name in storage.list_files(found):
            if name != checkpoints.MANIFEST_NAME:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found / name, folder / name)
    origin = start.parent / ORIGIN_NAME
    manifest = checkpoints.read_manifest(start.parent)
    if origin.exists():
        storage.write_file(directory / ORIGIN_NAME, origin.read_bytes())
    elif manifest is not None:
        facts = json.dumps(manifest.get("origin", {}), indent=1)
        storage.write_file(directory / ORIGIN_NAME, facts.encode())
    return True


def check_model(directory: Path, model: str = "model") -> None:
    """Refuses a folder without a trained generator.

    Raises:
      ValueError: says which folder to give instead.
    """
    if (directory / model).is_dir():
        return
    own = directory / "generator"  # of `racm3 fit`
    if (own / "model").is_dir():
        advice = f"it is of `racm3 fit`; give {own}"
    elif own_files.is_own(directory / "plan.json", key="plan"):
        advice = "`racm3 fit` has not finished there; run its command again"
    else:
        advice = (
            "give the --workdir of a finished `racm3 train` or `racm3 quickstart`, the "
            "folder generator of `racm3 fit`, or shipped:flagworld"
        )
    raise ValueError(f"no trained model in {directory}: {advice}")


def load_generator(
    directory: Path,
    memory: Memory | None,
    strategy: StrategyConfig | None = None,
    *,
    model: str = "model",
    mesh: Mesh | None = None,
) -> Generator:
    """Loads a generator from `save_generator`.

    Args:
      directory: has the folder of the model, `tokenizer/` and `clip/`.
      memory: what to retrieve from, or None.
      strategy: which of the found documents are used; None means the strategy of the
        model's training.
      model: the folder of the weights ("twin" for the shipped model without retrieval).
      mesh: devices for decoding; see `Engine`.

    Raises:
      ValueError: a missing or damaged directory, parts of different models, or a memory
        with another encoder or tokenizer.
    """
    check_model(directory, model)
    if not (directory / "clip").is_dir():
        raise ValueError(
            f"{directory} has no clip/, which embeds queries and ranks samples: copy a "
            "converted CLIP there, or convert the model again with --clip=FOLDER"
        )
    params, fields, extra = checkpoints.load_weights(directory / model, "generator")
    tokenizer = MixedTokenizer.load(directory / "tokenizer")
    embedder = DocumentEmbedder.load(directory / "clip")
    for name, part in (("tokenizer", tokenizer), ("clip", embedder)):
        if extra.get(name, part.fingerprint()) != part.fingerprint():
            raise ValueError(
                f"{directory / model} was trained with another {name} (fingerprint "
                f"{extra[name]!r}) than the one in {directory / name} "
                f"({part.fingerprint()!r}): copy the one of its training there"
            )
    retriever = None
    if memory is not None:
        memory.check(embedder=embedder, tokenizer=tokenizer)
        strategy = strategy or checkpoints.build_config(
            StrategyConfig, extra.get("strategy", {}), directory / model
        )
        retriever = Retriever(memory, strategy)
    config = checkpoints.build_config(ModelConfig, fields, directory / model)
    return Generator(
        config,
        params,
        tokenizer,
        retriever,
        embedder,
        mesh=mesh,
        defaults=read_defaults(extra, directory / model),
    )


def read_defaults(extra: Mapping[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    """The settings that were measured best with weights; see `Engine`.

    Args:
      extra: from the folder of weights.
      where: the folder, for the error.

    Raises:
      ValueError: an unknown setting, or a value of another type or out of its range.
    """
    defaults = extra.get("defaults", {})
    if not isinstance(defaults, dict) or not all(
        isinstance(settings, dict) for settings in defaults.values()
    ):
        raise ValueError(
            f"{where} says defaults={defaults!r:.80}, which are not settings by task: "
            "copy it again"
        )
    checkpoints.build_config(CaptionDefaults, defaults.get("caption", {}), where)
    checkpoints.build_config(ImageDefaults, defaults.get("image", {}), where)
    return defaults
