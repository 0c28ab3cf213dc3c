"""Nearest neighbours by inner product: one contract, several back ends.

`ExactIndex` is the oracle and the default for small memories; `ScannIndex` (in
`scann_index`) is for the others. Both answer unfilled slots in the same way, refuse the
same inputs with the same sentences, and pass one contract test.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from racm3_jax.retrieval import integrity
from racm3_jax.retrieval.rows import Rows
from racm3_jax.types import Neighbours

IndexKind = Literal["exact", "scann"]
FORMAT = "racm3-index"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
REMEDY = "build the index anew"
# Below this, the exact search is as fast as any.
MIN_SCANN_ROWS = 1024
MAX_QUERIES_PER_CALL = 256


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
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
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


@functools.partial(jax.jit, static_argnames=("k", "num_rows"))
def _search_blocks(
    blocks: Float[Array, "blocks block_rows d_embed"],
    queries: Float[Array, "queries d_embed"],
    k: int,
    num_rows: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Top k of every block, then the top k of those; ties go to the lower row."""
    num_blocks, block_rows, _ = blocks.shape

    def search_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        number, rows = block
        scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
        ids = number * block_rows + jnp.arange(block_rows)
        scores = jnp.where(ids < num_rows, scores, -jnp.inf)
        best, position = jax.lax.top_k(scores, min(k, block_rows))
        return best, ids[position]

    scores, ids = jax.lax.map(search_block, (jnp.arange(num_blocks), blocks))
    scores, ids = (
        jnp.moveaxis(x, 0, 1).reshape(queries.shape[0], -1) for x in (scores, ids)
    )
    best, position = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, jnp.take_along_axis(ids, position, axis=1)


class ExactIndex:
    """All inner products, then top-k, in JAX: the oracle.

    Args:
      embeddings: finite rows; kept on JAX's default device.
      block_rows: rows scored at a time, which bounds the scores held at once.
    """

    def __init__(
        self,
        embeddings: Float[np.ndarray, "rows d_embed"],
        block_rows: int = 1 << 16,
    ):
        embeddings = check_embeddings(embeddings)
        self._num_rows, self._d_embed = embeddings.shape
        block_rows = min(block_rows, self._num_rows)
        padding = -self._num_rows % block_rows
        padded = np.pad(embeddings, ((0, padding), (0, 0)))
        self._blocks = jnp.asarray(padded.reshape(-1, block_rows, self._d_embed))

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        queries = check_queries(queries, self._d_embed, k)
        # Powers of two, so that batches of any size share a few compiled programs.
        width = min(_next_power_of_two(k), self._num_rows)
        parts = [empty_neighbours(0, k)]
        for start in range(0, len(queries), MAX_QUERIES_PER_CALL):
            block = queries[start : start + MAX_QUERIES_PER_CALL]
            padding = _next_power_of_two(len(block)) - len(block)
            scores, ids = _search_blocks(
                self._blocks,
                jnp.asarray(np.pad(block, ((0, padding), (0, 0)))),
                width,
                self._num_rows,
            )
            found = slice(0, len(block))
            parts.append(
                fill_slots(np.asarray(ids)[found], np.asarray(scores)[found], k)
            )
        return Neighbours(
            *(np.concatenate(column) for column in zip(*parts, strict=True))
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes only a description: the rows are the memory's own embeddings."""
        write_description(path, "exact", self._num_rows, self._d_embed, {}, [])


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


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
        "files": integrity.describe_files(path, names),
    }
    integrity.write_file(path / INDEX_FILE, integrity.encode_sealed(content))


def read_description(path: pathlib.Path) -> dict:
    """What `write_description` wrote.

    Raises:
      FileNotFoundError: if there is no index at `path`.
      IntegrityError: if the description is damaged.
    """
    file = path / INDEX_FILE
    if not file.is_file():
        raise FileNotFoundError(f"there is no index at {path} (no {INDEX_FILE})")
    content = integrity.decode_sealed(file.read_bytes(), str(file), REMEDY)
    found = (content.get("format"), content.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{file} has format {found}; this version reads "
            f"{(FORMAT, FORMAT_VERSION)}: {REMEDY}"
        )
    return content


def has_scann() -> bool:
    """ScaNN has wheels for Linux only."""
    return importlib.util.find_spec("scann") is not None


def choose_kind(kind: IndexKind | Literal["auto"], num_rows: int) -> IndexKind:
    """Resolves "auto": ScaNN where it exists and the memory is not tiny.

    Raises:
      ValueError: on any other word.
    """
    if kind == "auto":
        return "scann" if has_scann() and num_rows >= MIN_SCANN_ROWS else "exact"
    if kind not in ("exact", "scann"):
        raise ValueError(f'index must be "exact", "scann" or "auto"; got {kind!r}')
    return kind


def build_index(
    kind: IndexKind | Literal["auto"],
    embeddings: Float[np.ndarray, "rows d_embed"],
    path: pathlib.Path,
) -> Index:
    """Builds an index of the rows and writes it into the directory `path`."""
    if choose_kind(kind, len(embeddings)) == "scann":
        from racm3_jax.retrieval import scann_index

        return scann_index.ScannIndex.build(
            embeddings, scann_index.ScannConfig(), pathlib.Path(path)
        )
    index = ExactIndex(embeddings)
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    index.save(pathlib.Path(path))
    return index


def open_index(
    path: str | pathlib.Path,
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
    *,
    verify: bool = True,
) -> Index:
    """Opens an index of either kind.

    Args:
      path: the directory that `build_index` wrote.
      embeddings: the rows; an exact index keeps no copy of its own.
      verify: False where the caller has checked the sha256 of the files already.

    Raises:
      FileNotFoundError: if there is no index.
      IntegrityError: if a file is damaged.
      ValueError: if an exact index is opened without its rows, or with others.
    """
    path = pathlib.Path(path)
    description = read_description(path)
    if description["kind"] == "scann":
        from racm3_jax.retrieval import scann_index

        return scann_index.ScannIndex.load(path, verify=verify)
    if embeddings is None:
        raise ValueError(
            f"the index at {path} is exact and keeps no rows of its own: "
            "pass the embeddings that it was built from"
        )
    expected = (description["num_rows"], description["d_embed"])
    if embeddings.shape != expected:
        raise ValueError(
            f"the index at {path} was built from {list(expected)} embeddings; "
            f"got {list(embeddings.shape)}"
        )
    return ExactIndex(np.asarray(embeddings))
