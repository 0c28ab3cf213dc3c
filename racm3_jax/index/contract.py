"""Nearest neighbours by inner product: the contract that every back end keeps.

All of them answer unfilled slots in the same way, refuse the same inputs with the same
sentences, and pass one contract test. `registry` chooses between them.
"""

from __future__ import annotations

import pathlib
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from racm3_jax import storage
from racm3_jax.index.rows import Rows
from racm3_jax.types import Neighbours

IndexKind = Literal["exact", "scann", "scann_sharded", "table"]
FORMAT = "racm3-index"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
REMEDY = "build the index anew"


class Index(Protocol):
    """What a memory asks of a nearest-neighbour index. Safe to search from threads."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """The `k` rows of largest inner product with each query, best first.

        Slots that could not be filled (k larger than the index, or fewer rows found)
        come last, with id -1, score -inf and valid False.

        Raises:
          ValueError: on a query that is not finite, another width, or k < 1.
        """
        ...

    def save(self, path: pathlib.Path) -> None:
        """Writes the index into the directory `path`."""
        ...


def check_queries(
    queries: Float[np.ndarray, "queries d_embed"], d_embed: int, k: int
) -> Float32[np.ndarray, "queries d_embed"]:
    """The queries as contiguous float32, or a sentence about what is wrong."""
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != d_embed:
        raise ValueError(
            f"queries are float[queries, {d_embed}] for this index; "
            f"got {list(queries.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be >= 1; got {k}")
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise ValueError(
            f"query {bad[0]} has values that are not finite ({len(bad)} of "
            f"{len(queries)} queries do); look at the embedder that made it"
        )
    return queries


def check_embeddings(
    embeddings: Float[np.ndarray, "rows d_embed"],
) -> Float32[np.ndarray, "rows d_embed"]:
    """The rows as contiguous float32; NaN rows would kill ScaNN's process."""
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    if embeddings.ndim != 2 or embeddings.size == 0:
        raise ValueError(
            "an index needs float[rows, d_embed] embeddings with at least one row; "
            f"got {list(embeddings.shape)}"
        )
    # NaN and inf survive a sum; a mask of all values would be a quarter of the rows.
    bad = np.flatnonzero(~np.isfinite(embeddings.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise ValueError(
            f"embedding row {bad[0]} has values that are not finite ({len(bad)} of "
            f"{len(embeddings)} rows do); look at the embedder that made them"
        )
    return embeddings


def empty_neighbours(num_queries: int, k: int) -> Neighbours:
    """`k` unfilled slots for each query."""
    return Neighbours(
        ids=np.full((num_queries, k), -1, np.int64),
        scores=np.full((num_queries, k), -np.inf, np.float32),
        valid=np.zeros((num_queries, k), bool),
    )


def fill_slots(
    ids: Int[np.ndarray, "queries found"],
    scores: Float[np.ndarray, "queries found"],
    k: int,
) -> Neighbours:
    """Gives what a library found the shape and the marks of the contract.

    A slot counts as filled when its score is finite:

        ids    [[7, 2, 0]]        [[ 7,  2,   -1,   -1]]
        scores [[.9, .4, nan]] -> [[.9, .4, -inf, -inf]]   (k = 4)
    """
    found = empty_neighbours(len(ids), k)
    width = min(k, ids.shape[1])
    valid = np.isfinite(scores[:, :width])
    found.valid[:, :width] = valid
    found.ids[:, :width] = np.where(valid, ids[:, :width], -1)
    found.scores[:, :width] = np.where(valid, scores[:, :width], -np.inf)
    return found


def score_rows(
    queries: Float32[np.ndarray, "queries d_embed"],
    found: Neighbours,
    embeddings: Rows,
    denied: Bool[np.ndarray, " rows"],
) -> Neighbours:
    """What was found, without denied rows, with exact scores, by (-score, id)."""
    rows = np.maximum(found.ids, 0)
    valid = found.valid & ~denied[rows]
    # einsum, not a matrix product: a score depends on its two vectors alone, not on
    # the batch that they came in.
    scores = np.einsum("qd,qkd->qk", queries, embeddings[rows])
    scores = np.where(valid, scores, -np.inf).astype(np.float32)
    ids = np.where(valid, found.ids, -1)
    order = np.lexsort((ids, -scores), axis=1)
    columns = (np.take_along_axis(x, order, axis=1) for x in (ids, scores, valid))
    return Neighbours(*columns)


def write_description(
    path: pathlib.Path,
    kind: IndexKind,
    num_rows: int,
    d_embed: int,
    settings: dict,
    names: list[str],
) -> None:
    """Writes index.json last, with the sha256 of the other files of the index."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "num_rows": num_rows,
        "d_embed": d_embed,
        "settings": settings,
        "files": storage.describe_files(path, names),
    }
    storage.write_file(path / INDEX_FILE, storage.encode_sealed(content))


def read_description(path: pathlib.Path) -> dict:
    """What `write_description` wrote.

    Raises:
      FileNotFoundError: if there is no index at `path`.
      IntegrityError: if the description is damaged.
    """
    file = path / INDEX_FILE
    if not file.is_file():
        raise FileNotFoundError(f"there is no index at {path} (no {INDEX_FILE})")
    content = storage.decode_sealed(file.read_bytes(), str(file), REMEDY)
    found = (content.get("format"), content.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{file} has format {found}; this version reads "
            f"{(FORMAT, FORMAT_VERSION)}: {REMEDY}"
        )
    return content


def verify_description(path: pathlib.Path, description: dict) -> None:
    """Compares the files of an index with its description.

    Raises:
      IntegrityError: names the first that is missing or differs.
    """
    storage.verify_files(path, description["files"], REMEDY)
