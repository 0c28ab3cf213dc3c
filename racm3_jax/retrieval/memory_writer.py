"""Builds a memory: documents -> chunks of tokens and embeddings -> a directory.

`memory_chunks` runs the models; `write_memory` streams what they made to disk and needs
none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from racm3_jax.documents import store
from racm3_jax.retrieval import backends, integrity
from racm3_jax.retrieval import memory_format as format_lib
from racm3_jax.retrieval.memory_chunks import (
    CHUNK_SIZE,
    DocumentTokenizer,
    Embedder,
    MemoryChunk,
    make_chunks,
)
from racm3_jax.retrieval.memory_format import MODALITY_BITS, hash_name
from racm3_jax.retrieval.rows import Rows, RowsWriter
from racm3_jax.types import Document, Modality, TokenizedDocument
from racm3_jax.vocab import Vocab

# How far from 1 the norm of an embedding may be.
NORM_TOLERANCE = 1e-2


def build_memory(
    documents: Iterable[Document],
    *,
    tokenizer: DocumentTokenizer,
    embedder: Embedder,
    path: str | os.PathLike[str],
    index: Literal["auto", "exact", "scann"] = "auto",
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
      index: "exact", "scann", or "auto" (ScaNN unless the memory is tiny).
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
    index: Literal["auto", "exact", "scann"] = "auto",
    query_drop: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Streams chunks into a new memory directory; see `build_memory`."""
    path = pathlib.Path(path)
    check_target(path, overwrite)
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        raise ValueError(f"there are no documents to build the memory at {path} of")
    with integrity.written_aside(path) as directory:
        columns = _Columns(directory, first)
        with contextlib.closing(columns):
            num_rows = store.write_records(
                directory / format_lib.DOCUMENTS_FILE,
                columns.consume(itertools.chain([first], chunks), progress),
            )
        embeddings = columns.read("embeddings_document")
        kind = backends.choose_kind(index, num_rows)
        # A fresh directory that is renamed as a whole needs no swap of its own.
        backends.build_index(
            kind, np.asarray(embeddings), directory / format_lib.INDEX_DIRECTORY
        )
        manifest = {
            "format": format_lib.FORMAT,
            "format_version": format_lib.FORMAT_VERSION,
            "num_documents": num_rows,
            "num_with_modality": columns.num_with_modality,
            "d_embed": embeddings.shape[1],
            "num_query_variants": first.text_queries.shape[1],
            "query_drop": query_drop,
            "index": kind,
            "vocab": dataclasses.asdict(vocab),
            "vocab_fingerprint": vocab.fingerprint(),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
            "files": integrity.describe_files(
                directory, integrity.list_files(directory)
            ),
        }
        fingerprint = format_lib.fingerprint(manifest)
        format_lib.write_denied(directory, fingerprint, np.zeros(0, np.int64))
        integrity.write_file(
            directory / format_lib.MANIFEST_FILE, integrity.encode_sealed(manifest)
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


class _Columns:
    """The arrays of a memory, a row a document, while they are being written."""

    def __init__(self, directory: pathlib.Path, chunk: MemoryChunk):
        self.num_with_modality = dict.fromkeys(MODALITY_BITS, 0)
        self._directory = directory
        self._seen: set[int] = set()
        self._writers: dict[str, RowsWriter] = {}
        d_embed = chunk.document.shape[1]
        for name in ("document", "text", "image"):
            self._add(f"embeddings_{name}", (d_embed,), "<f4")
        for name in ("text", "image"):
            self._add(f"queries_{name}", chunk.text_queries.shape[1:], "<f2")
        for name, dtype in (("id", "<u8"), ("source", "<u8")):
            self._add(f"{name}_hashes", (), dtype)
        self._add("modalities", (), "u1")

    def _add(self, name: str, row_shape: tuple[int, ...], dtype: str) -> None:
        self._writers[name] = RowsWriter(self._directory, name, row_shape, dtype)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def read(self, name: str) -> Rows:
        return Rows([self._directory / shard for shard in self._writers[name].shards])

    def consume(
        self, chunks: Iterable[MemoryChunk], progress: Callable[[int], None] | None
    ) -> Iterator[bytes]:
        """Writes the arrays of each chunk and yields its documents as records."""
        for chunk in chunks:
            self._append(chunk)
            yield from (store.encode_tokenized(d) for d in chunk.documents)
            if progress is not None:
                progress(self._writers["modalities"].num_rows)

    def _append(self, chunk: MemoryChunk) -> None:
        num = len(chunk.documents)
        modalities = np.zeros(num, np.uint8)
        hashes = self._hash_ids(chunk.documents)
        _check_rows(chunk.documents, "embedding", chunk.document, np.ones(num, bool))
        parts: dict[Modality, tuple[np.ndarray, np.ndarray]] = {
            "text": (chunk.text, chunk.text_queries),
            "image": (chunk.image, chunk.image_queries),
        }
        for name, (embeddings, queries) in parts.items():
            present = np.asarray(embeddings.any(axis=1))
            _check_rows(chunk.documents, f"{name} embedding", embeddings, present)
            for variant in range(queries.shape[1]):
                rows = queries[:, variant]
                _check_rows(chunk.documents, f"{name} query", rows, present)
            modalities[present] |= MODALITY_BITS[name]
            self.num_with_modality[name] += int(present.sum())
            self._writers[f"embeddings_{name}"].append(embeddings)
            self._writers[f"queries_{name}"].append(queries)
        sources = [hash_name(d.source) for d in chunk.documents]
        self._writers["embeddings_document"].append(chunk.document)
        self._writers["id_hashes"].append(hashes)
        self._writers["source_hashes"].append(np.asarray(sources, np.uint64))
        self._writers["modalities"].append(modalities)

    def _hash_ids(self, documents: Sequence[TokenizedDocument]) -> np.ndarray:
        hashes = [hash_name(d.id) for d in documents]
        for number, document in zip(hashes, documents, strict=True):
            if number in self._seen:
                raise ValueError(
                    f"two documents have the id {document.id!r}: ids must be unique"
                )
            self._seen.add(number)
        return np.asarray(hashes, np.uint64)


def _check_rows(
    documents: Sequence[TokenizedDocument],
    what: str,
    rows: Float[np.ndarray, "n d_embed"],
    present: Bool[np.ndarray, " n"],
) -> None:
    """Names the first document whose row is not finite, or not unit where it should."""
    if len(rows) != len(documents):
        raise ValueError(f"{len(documents)} documents came with {len(rows)} {what}s")
    norms = np.linalg.norm(np.asarray(rows, np.float32), axis=1)
    wrong = ~np.isfinite(norms) | (present & (np.abs(norms - 1) > NORM_TOLERANCE))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"the {what} of document {documents[first].id!r} has norm "
            f"{norms[first]:.3g}, not 1: look at the embedder that made it"
        )
