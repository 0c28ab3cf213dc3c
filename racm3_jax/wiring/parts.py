"""Builds one object from one section of a config."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int64

from racm3_jax import checkpoints, checksums, sharding, storage
from racm3_jax.buckets import is_url, refuse_url
from racm3_jax.documents.invented_names import make_labels, make_name
from racm3_jax.index.sharded import SUFFIX
from racm3_jax.memory.format import TABLE_DIRECTORY
from racm3_jax.memory.memory import UNUSED_WITH_TABLE, Memory
from racm3_jax.memory.neighbours import compute_neighbours
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.progress import open_progress
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.episodes import EpisodeConfig, Episodes
from racm3_jax.sequences.pairing import Names, Pairing, PairingConfig
from racm3_jax.sharding import leader_first
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document
from racm3_jax.vocab import Vocab
from racm3_jax.wiring.corpora import build_augmentation
from racm3_jax.wiring.rows import find_main_rows, read_column
from racm3_jax.wiring.sections import (
    MemoryConfig,
    MeshConfig,
    TokenizerConfig,
    choose_class_key,
    construct,
)

PACKAGE = Path(__file__).parent.parent

# What chooses documents by class.
Chosen = TypeVar("Chosen", EpisodeConfig, PairingConfig)


def resolve(path: str | Path) -> Path:
    """`"shipped:NAME/clip"` -> the folder inside the package; else the path.

    Raises:
      ValueError: a URL.
    """
    text = str(path)
    refuse_url(text, "what a config names")
    if text.startswith("shipped:"):
        return PACKAGE / "shipped" / text.removeprefix("shipped:")
    return Path(text).expanduser()


def build_mesh(config: Any) -> Mesh:
    mesh = construct(MeshConfig, config.mesh, "mesh")
    return sharding.make_mesh(**dataclasses.asdict(mesh))


def build_tokenizer(config: Any) -> MixedTokenizer:
    section = construct(TokenizerConfig, config.tokenizer, "tokenizer")
    for name in ("text", "image"):
        if not getattr(section, name):
            raise ValueError(
                f"config.tokenizer.{name} is empty: give the folder of a trained one, "
                f"--config.tokenizer.{name}=FOLDER"
            )
    image = ImageTokenizer.load(resolve(section.image))
    if section.image_size:
        # The same codes for smaller images: cheap examples for the start of a
        # curriculum.
        image = image.resized(section.image_size)
    return MixedTokenizer(
        TextTokenizer.load(resolve(section.text) / "tokenizer.json"),
        image,
        section.num_sentinels,
    )


def build_embedder(config: Any) -> DocumentEmbedder:
    dtype = config.get("embedder_dtype", "auto")
    return DocumentEmbedder.load(resolve(config.embedder), compute_dtype=dtype)


def build_memory(
    config: Any,
    path: Path,
    documents: Iterable[Document],
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    *,
    num_documents: int | None = None,
) -> Memory:
    """Opens the memory at `path`, or builds it there from `documents`.

    With several processes, the first builds it; a collective call.

    Args:
      config: uses its section `memory`.
      path: of the memory's directory.
      documents: read only if there is no memory yet.
      tokenizer: of the documents.
      embedder: of the documents and their queries.
      num_documents: their number, for the progress bar.
    """
    with leader_first():
        if not (path / "manifest.json").exists():
            section = construct(MemoryConfig, config.memory, "memory")
            with open_progress(
                total=num_documents, desc="build memory", unit="documents"
            ) as bar:

                def show(done: int) -> None:
                    bar.update(done - bar.n)

                Memory.build(
                    documents,
                    tokenizer=tokenizer,
                    embedder=embedder,
                    path=path,
                    index="auto" if section.index == "table" else section.index,
                    num_query_variants=section.num_query_variants,
                    query_drop=section.query_drop,
                    progress=show,
                ).close()
    return open_memory(config, path, tokenizer, embedder)


def open_memory(
    config: Any,
    path: str | Path,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder | None,
) -> Memory:
    """Opens the memory at `path`; a collective call.

    Every process memory-maps all records, as any document may be a neighbour of any
    other. Processes divide the files among them for verifying checksums. If a table
    answers the queries, the index and the embeddings are opened only when needed: the
    index for queries that are not in the table, the documents' embeddings to compare
    two documents of one example (`strategy.max_similarity`), text and image embeddings
    for queries without dropout.

    Args:
      config: uses its section `memory`.
      path: of the memory's directory, or its URL (`memory.staging`).
      tokenizer: of the documents.
      embedder: of the documents and their queries.
    """
    section = construct(MemoryConfig, config.memory, "memory")
    place = str(path) if is_url(path) else resolve(path)
    later = {"index"} if jax.process_count() > 1 else set()
    if section.index == "table":
        later = UNUSED_WITH_TABLE
    memory = Memory.load(
        place,
        embedder,
        tokenizer,
        section.cache,
        describe=_describe(section),
        later=later,
    )
    if is_url(path):
        print(f"racm3: the memory {path} is read from {memory.path}", file=sys.stderr)
    return memory


def prepare_search(config: Any, memory: Memory) -> None:
    """Prepares the search of a training; a collective call.

    With `config.memory.index="table"`, searches are look-ups in `memory/table`. If it
    is missing, all processes compute it together, by exact search on their
    accelerators, or on CPUs with the memory's index; `racm3 memory neighbours` computes
    it in advance. Otherwise several processes open a sharded index together, each some
    shards.
    """
    section = construct(MemoryConfig, config.memory, "memory")
    if section.index != "table":
        if jax.process_count() > 1 and memory.manifest["index"].endswith(SUFFIX):
            memory.share_index()
        return
    path = memory.path / TABLE_DIRECTORY
    if not path.is_dir():
        if config.get("memory_path") and is_url(config.memory_path):
            raise ValueError(
                f'config.memory.index is "table", but {config.memory_path} has no '
                f"{TABLE_DIRECTORY}/: make it where the memory was built (racm3 memory "
                "neighbours), and copy it there, too"
            )
        strategy = construct(StrategyConfig, config.strategy, "strategy")
        # Removed documents take slots of the lists.
        width = strategy.max_candidates + len(memory) - memory.num_allowed
        is_slow = jax.devices()[0].platform == "cpu"
        engine = "memory" if is_slow else "exact"
        compute_neighbours(memory, path, width, engine=engine)
    memory.use_table(path, describe=_describe(section))


def _describe(section: MemoryConfig) -> storage.Describe:
    return checksums.sample(
        section.verify_share, logging.info, checksums.describe_together
    )


def build_model_config(config: Any, vocab: Vocab) -> ModelConfig:
    """The generator's config; with `config.init_from`, its vocabulary size.

    Converted weights have rows for tokens that no tokenizer produces.
    """
    rows = vocab.size
    if config.get("init_from"):
        start = checkpoints.read_config(resolve(config.init_from))["config"]
        rows = max(rows, start.get("vocab_size", 0))
    facts = {"vocab_size": rows}
    if config.model.get("image_positions"):
        facts["image_length"] = vocab.image_length
        facts["first_code"] = vocab.image_range.start
        facts["num_codes"] = len(vocab.image_range)
    model_config = construct(ModelConfig, config.model, "model", **facts)
    if model_config.dropout:
        raise ValueError(
            f"config.model.dropout is {model_config.dropout}, but the trainer has no "
            "dropout: set it to 0"
        )
    return model_config


def build_model_shape(config: Any) -> tuple[ModelConfig, int]:
    """The generator's config and its number of parameters; allocates nothing."""
    if "vocab" in config:
        vocab = construct(Vocab, config.vocab, "vocab")
    else:
        vocab = build_tokenizer(config).vocab
    model_config = build_model_config(config, vocab)
    return model_config, count_params(abstract_params(model_config))


def count_shards(config: Any, num_devices: int, platform: str = "") -> tuple[int, int]:
    """(devices per copy of the weights, number of copies) of `config.mesh`.

    Args:
      config: of a training.
      num_devices: number of devices.
      platform: "tpu", "gpu" or "cpu"; see `sharding.mesh_sizes`.

    Raises:
      ValueError: the mesh does not fit this number of devices.
    """
    sizes = sharding.mesh_sizes(num_devices, platform=platform, **config.mesh)
    return sizes["fsdp"] * sizes["tensor"], sizes["dcn"] * sizes["data"]


def build_retriever(config: Any, memory: Memory) -> Retriever:
    return Retriever(memory, construct(StrategyConfig, config.strategy, "strategy"))


def build_episodes(
    config: Any, memory: Memory, tokenizer: MixedTokenizer, workdir: Path
) -> Episodes | None:
    """The sampler of k-shot episodes; None if the config has none.

    Classes are values of a metadata key of the memory's documents; labels are invented
    words.
    """
    if "episodes" not in config or not config.episodes.probability:
        return None
    settings = construct(EpisodeConfig, config.episodes, "episodes")
    settings = _with_class_key(config, "episodes", settings)
    classes = _read_classes(memory, settings.class_key, workdir)
    words = make_labels(settings.num_labels, np.random.default_rng(config.seed))
    labels = [tokenizer.encode_text(word) for word in words]
    return Episodes(settings, classes, labels)


def build_pairing(
    config: Any, memory: Memory, tokenizer: MixedTokenizer, workdir: Path
) -> Pairing | None:
    """The pairing of documents by class; None if the config has none.

    New names are invented words.
    """
    if "pairing" not in config or not config.pairing.probability:
        return None
    settings = construct(PairingConfig, config.pairing, "pairing")
    augmentation = build_augmentation(config)
    if settings.box_weight != 1 and (augmentation.mirror or augmentation.shift):
        raise ValueError(
            "pairing.box_weight needs the boxes of the images as they are: set "
            "augmentation.mirror=False and augmentation.shift=0"
        )
    names = Names(tokenizer.text.decode, tokenizer.text.encode, make_name)
    settings = _with_class_key(config, "pairing", settings)
    classes = _read_classes(memory, settings.class_key, workdir)
    size = tokenizer.image.image_size
    return Pairing(settings, classes, names, image_size=size)


def _with_class_key(config: Any, section: str, settings: Chosen) -> Chosen:
    class_key = choose_class_key(config, settings.class_key)
    if not class_key:
        raise ValueError(
            f"config.{section}.class_key is empty: give the metadata key of the "
            "documents' classes"
        )
    return dataclasses.replace(settings, class_key=class_key)


def _read_classes(
    memory: Memory, key: str, workdir: Path
) -> Int64[np.ndarray, " rows"]:
    """Numbers for the values of a metadata key; -1 for rows without it, or held out."""
    rows = find_main_rows(memory, workdir)
    names = read_column(memory, key, workdir)[rows]
    _, firsts, found = np.unique(names, return_index=True, return_inverse=True)
    # Numbered by first appearance; 0 means no name.
    numbers = np.argsort(np.argsort(np.where(names[firsts] == 0, len(rows), firsts)))
    classes = np.full(len(memory), -1, np.int64)
    classes[rows] = np.where(names == 0, -1, numbers[found])
    return classes
