"""Builds a memory: documents -> chunks of tokens and embeddings -> a directory.

`chunks` runs the models; `write_memory` streams what they made to disk and needs
none of them.
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
    CHUNK_SIZE,
    DocumentTokenizer,
    Embedder,
    MemoryChunk,
    make_chunks,
)
from racm3_jax.memory.columns import Columns
from racm3_jax.types import Document
from racm3_jax.vocab import Vocab


def build_memory(
    documents: Iterable[Document],
    *,
    tokenizer: DocumentTokenizer,
    embedder: Embedder,
    path: str | os.PathLike[str],
    index: IndexKind | Literal["auto"] = "auto",
    num_query_variants: int = 4,
    query_drop: float = 0.2,
    seed: int = 0,
    chunk_size: int = CHUNK_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Tokenises, embeds and indexes documents into a new memory.

    Documents stream through in chunks; the directory appears at `path` when all of it
    is on disk.

    Args:
      documents: any iterable; ids must be unique.
      tokenizer: a `MixedTokenizer`.
      embedder: a `DocumentEmbedder`.
      path: the directory to make.
      index: "exact", "scann", "scann_sharded", or "auto" (ScaNN unless the memory is
        tiny).
      num_query_variants: queries with dropout embedded ahead for every document.
      query_drop: share of a query's tokens, or patches, that is left out (0.2 in
        the paper).
      seed: of the dropout.
      chunk_size: documents tokenised and embedded at a time.
      overwrite: replace a memory that is at `path`.
      progress: called with the number of documents done so far.

    Raises:
      FileExistsError: if something is at `path` and may not be replaced.
      ValueError: on no documents, equal ids, or embeddings that are not unit rows.
    """
    if not 0 <= query_drop < 1:
        raise ValueError(f"query_drop must be in [0, 1); got {query_drop}")
    if num_query_variants < 0:
        raise ValueError(f"num_query_variants must be >= 0; got {num_query_variants}")
    chunks = make_chunks(
        documents,
        tokenizer,
        embedder,
        num_query_variants=num_query_variants,
        query_drop=query_drop,
        seed=seed,
        chunk_size=chunk_size,
    )
    write_memory(
        chunks,
        path=path,
        vocab=tokenizer.vocab,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        encoder_fingerprint=embedder.fingerprint(),
        index=index,
        query_drop=query_drop,
        overwrite=overwrite,
        progress=progress,
    )


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
    about: Mapping[str, Any] | None = None,
) -> None:
    """Streams chunks into a new memory directory; see `build_memory`.

    Args:
      chunks: what is written, in order.
      path: see `build_memory`.
      vocab: of the tokens.
      tokenizer_fingerprint: what documents must be read with.
      encoder_fingerprint: what queries must be embedded with.
      index: see `build_memory`.
      query_drop: see `build_memory`.
      overwrite: see `build_memory`.
      progress: see `build_memory`.
      rows_per_shard: of a sharded index; None is its default.
      recall_target: see `write_part`.
      about: more fields of the manifest.
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
            **(about or {}),
            "files": storage.describe_files(directory, storage.list_files(directory)),
        }
        format_lib.write_denied(directory, manifest, np.zeros(0, np.int64))
        storage.write_file(
            directory / format_lib.MANIFEST_FILE, storage.encode_sealed(manifest)
        )


class Part(NamedTuple):
    """What `write_part` wrote, in the manifest's words."""

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
    seen: Iterable[int] = (),
    progress: Callable[[int], None] | None = None,
) -> Part | None:
    """Streams chunks into the files of one part of a memory.

    Args:
      directory: empty.
      chunks: at least one; without any, nothing is written and None is returned.
      index: its kind; None makes no index.
      rows_per_shard: of a sharded index.
      recall_target: tunes a ScaNN tree to it; None leaves the defaults.
      seen: hashes of ids that are taken.
      progress: called with the number of documents done so far.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return None
    columns = Columns(directory, first, seen)
    with contextlib.closing(columns):
        num_rows = store.write_records(
            directory / format_lib.DOCUMENTS_FILE,
            columns.consume(itertools.chain([first], chunks), progress),
        )
    embeddings = columns.read("embeddings_document")
    kind = None if index is None else registry.choose_kind(index, num_rows)
    if kind is not None:
        # A fresh directory that is renamed as a whole needs no swap of its own.
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
    """Refuses a path whose content is not ours to replace.

    Raises:
      FileExistsError: says what is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / format_lib.MANIFEST_FILE).is_file():
        raise FileExistsError(
            f"{path} exists and is no memory, so it is left alone: give another path"
        )
    if not overwrite:
        raise FileExistsError(
            f"there is a memory at {path} already: load it, give another path, or pass "
            "overwrite=True"
        )
