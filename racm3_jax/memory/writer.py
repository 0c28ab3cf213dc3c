"""Streams chunks to disk: one part of a memory, or a whole memory.

No model runs here; `chunks` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from racm3_jax import storage
from racm3_jax.documents import store
from racm3_jax.index import registry, tuning
from racm3_jax.index.contract import IndexKind
from racm3_jax.memory import format as format_lib
from racm3_jax.memory.chunks import (
    MemoryChunk,
)
from racm3_jax.memory.columns import Columns
from racm3_jax.vocab import Vocab


def write_memory(
    chunks: Iterable[MemoryChunk],
    *,
    path: str | os.PathLike[str],
    vocab: Vocab,
    tokenizer_fingerprint: str,
    encoder_fingerprint: str,
    index: IndexKind | Literal["auto"] = "auto",
    query_drop: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    rows_per_shard: int | None = None,
    recall_target: float | None = None,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Streams chunks into a new memory directory, atomically.

    Args:
      chunks: written in order; document ids must be unique.
      path: the directory to create.
      vocab: of the tokens.
      tokenizer_fingerprint: of the tokenizer of the documents.
      encoder_fingerprint: of the encoder of queries and documents.
      index: a kind of `index.registry`, or "auto".
      query_drop: fraction of a query that was dropped.
      overwrite: replace an existing memory at `path`.
      progress: called with the number of documents so far.
      rows_per_shard: of a sharded index; None means its default.
      recall_target: see `write_part`.
      about: returns more fields of the manifest, after the chunks are written.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      ValueError: no documents, or embeddings that are not unit rows.
    """
    path = pathlib.Path(path)
    check_target(path, overwrite)
    with storage.new_directory(path, replace=overwrite) as directory:
        part = write_part(
            directory,
            chunks,
            index=index,
            rows_per_shard=rows_per_shard,
            recall_target=recall_target,
            progress=progress,
        )
        if part is None:
            raise ValueError(f"there are no documents to build the memory at {path} of")
        manifest = {
            "format": format_lib.FORMAT,
            "format_version": format_lib.FORMAT_VERSION,
            **part._asdict(),
            "query_drop": query_drop,
            "vocab": dataclasses.asdict(vocab),
            "vocab_fingerprint": vocab.fingerprint(),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
            **about(),
            "files": storage.describe_files(directory, storage.list_files(directory)),
        }
        format_lib.write_denied(directory, manifest, np.zeros(0, np.int64))
        format_lib.write_manifest(directory, manifest)


class Part(NamedTuple):
    """Result of `write_part`: fields of the manifest."""

    num_documents: int
    num_with_modality: dict[str, int]
    d_embed: int
    num_query_variants: int
    index: IndexKind | None


def write_part(
    directory: pathlib.Path,
    chunks: Iterable[MemoryChunk],
    *,
    index: IndexKind | Literal["auto"] | None,
    rows_per_shard: int | None = None,
    recall_target: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Part | None:
    """Streams chunks into the files of one part of a memory.

    Args:
      directory: empty.
      chunks: if there are none, nothing is written and None is returned.
      index: its kind; None makes no index.
      rows_per_shard: of a sharded index.
      recall_target: tunes the index to it; None keeps the defaults.
      progress: called with the number of documents so far.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return None
    columns = Columns(directory, first)
    with contextlib.closing(columns):
        num_rows = store.write_records(
            directory / format_lib.DOCUMENTS_FILE,
            columns.consume(itertools.chain([first], chunks), progress),
        )
    embeddings = columns.read("embeddings_document")
    kind = None if index is None else registry.choose_kind(index, num_rows)
    if kind is not None:
        # A new directory that is renamed as a whole needs no swap of its own.
        place = directory / format_lib.INDEX_DIRECTORY
        tune = None
        if recall_target is not None:
            parts = {m: columns.read(f"embeddings_{m}") for m in ("text", "image")}
            tune = functools.partial(
                tuning.tune,
                queries=tuning.sample_queries(parts),
                recall_target=recall_target,
            )
        registry.build_index(kind, embeddings, place, rows_per_shard, tune)
    variants = first.text_queries.shape[1]
    return Part(
        num_rows, columns.num_with_modality, embeddings.shape[1], variants, kind
    )


def check_target(path: pathlib.Path, overwrite: bool) -> None:
    """Refuses a path whose content may not be replaced.

    Raises:
      FileExistsError: says what exists there.
    """
    storage.check_target(path, "memory", format_lib.is_memory, overwrite)
