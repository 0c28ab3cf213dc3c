"""Writes the columns of a memory: checks rows, one shard file at a time."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float

from racm3_jax.documents import store
from racm3_jax.index.rows import Rows, RowsWriter
from racm3_jax.memory.chunks import MemoryChunk
from racm3_jax.memory.format import COLUMN_TYPES, MODALITY_BITS, hash_name
from racm3_jax.types import Modality, TokenizedDocument

# Tolerance of an embedding's norm.
NORM_TOLERANCE = 1e-2


class Columns:
    """The arrays of a memory (one row per document) while they are written.

    Args:
      directory: where they are written; must exist.
      chunk: the first chunk, for shapes; it is not written.
    """

    def __init__(self, directory: pathlib.Path, chunk: MemoryChunk):
        self.num_with_modality: dict[str, int] = dict.fromkeys(MODALITY_BITS, 0)
        self._directory = directory
        self._writers: dict[str, RowsWriter] = {}
        d_embed = chunk.document.shape[1]
        shapes = {"embeddings": (d_embed,), "queries": chunk.text_queries.shape[1:]}
        for name, dtype in COLUMN_TYPES.items():
            # Unknown for documents of a memory that was built without them.
            if (
                name in ("content_hashes", "image_hashes")
                and chunk.image_hashes is None
            ):
                continue
            shape = shapes.get(name.split("_")[0], ())
            self._writers[name] = RowsWriter(directory, name, shape, dtype)

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
            # A precomputed embedding may represent an image that is not available.
            shown = present & [name in d.modalities for d in chunk.documents]
            modalities[shown] |= MODALITY_BITS[name]
            self.num_with_modality[name] += int(shown.sum())
            self._writers[f"embeddings_{name}"].append(embeddings)
            self._writers[f"queries_{name}"].append(queries)
        sources = [hash_name(d.source) for d in chunk.documents]
        self._writers["embeddings_document"].append(chunk.document)
        hashes = [hash_name(d.id) for d in chunk.documents]
        self._writers["id_hashes"].append(np.asarray(hashes, np.uint64))
        self._writers["source_hashes"].append(np.asarray(sources, np.uint64))
        splits = [hash_name(str(d.metadata.get("split", ""))) for d in chunk.documents]
        self._writers["split_hashes"].append(np.asarray(splits, np.uint64))
        self._writers["modalities"].append(modalities)
        for name in ("content_hashes", "image_hashes"):
            if name in self._writers:
                self._writers[name].append(np.asarray(getattr(chunk, name), np.uint64))


def _check_rows(
    documents: Sequence[TokenizedDocument],
    what: str,
    rows: Float[np.ndarray, "n d_embed"],
    present: Bool[np.ndarray, " n"],
) -> None:
    """Raises for the first row that is not finite, or not a unit vector."""
    if len(rows) != len(documents):
        raise ValueError(f"{len(documents)} documents came with {len(rows)} {what}s")
    norms = np.linalg.norm(np.asarray(rows, np.float32), axis=1)
    wrong = ~np.isfinite(norms) | (present & (np.abs(norms - 1) > NORM_TOLERANCE))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"the {what} of document {documents[first].id!r} has norm "
            f"{norms[first]:.3g}, not 1: check the embedder that computed it"
        )
