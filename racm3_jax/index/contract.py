"""Nearest neighbours by inner product: the contract that every back end keeps.

All of them answer unfilled slots in the same way, refuse the same inputs with the same
sentences, and pass one contract test. `Backend` holds what they share; `registry` has
the table of them.
"""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from racm3_jax import storage
from racm3_jax.index import folder
from racm3_jax.index.folder import Allowed, Description
from racm3_jax.index.rows import Rows
from racm3_jax.types import Neighbours

# A name of the registry's table.
IndexKind = str


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
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
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
    num_rows: int,
) -> Neighbours:
    """Gives what a library found the shape and the marks of the contract.

    A slot counts as filled when its score is finite and its row exists:

        ids    [[7, 2, 0]]        [[ 7,  2,   -1,   -1]]
        scores [[.9, .4, nan]] -> [[.9, .4, -inf, -inf]]   (k = 4)
    """
    found = empty_neighbours(len(ids), k)
    width = min(k, ids.shape[1])
    exists = (ids[:, :width] >= 0) & (ids[:, :width] < num_rows)
    valid = np.isfinite(scores[:, :width]) & exists
    found.valid[:, :width] = valid
    found.ids[:, :width] = np.where(valid, ids[:, :width], -1)
    found.scores[:, :width] = np.where(valid, scores[:, :width], -np.inf)
    return found


def score_rows(
    queries: Float32[np.ndarray, "queries d_embed"],
    found: Neighbours,
    embeddings: Rows | None,
    denied: Bool[np.ndarray, " rows"],
) -> Neighbours:
    """What was found, without denied rows, with exact scores, by (-score, id).

    Without `embeddings`, the scores are exact already.
    """
    rows = np.maximum(found.ids, 0)
    valid = found.valid & ~denied[rows]
    scores = found.scores
    if embeddings is not None:
        # einsum, not a matrix product: a score depends on its two vectors alone, not
        # on the batch that they came in.
        scores = np.einsum("qd,qkd->qk", queries, embeddings[rows])
    scores = np.where(valid, scores, -np.inf).astype(np.float32)
    ids = np.where(valid, found.ids, -1)
    order = np.lexsort((ids, -scores), axis=1)
    columns = (np.take_along_axis(x, order, axis=1) for x in (ids, scores, valid))
    return Neighbours(*columns)


class Backend(abc.ABC):
    """What the file of one back end gives: build, load, search, and what may be tuned.

    A subclass writes `_build`, `_write`, `_open` and `_search`; what it is given there
    is checked already, and what it returns is brought into the contract's form here.

    Attributes:
      kind: its name in the registry's table and in index.json.
      files: the names that it may write into its folder; nothing else may be there.
      build_ram_factor: memory that a build takes at its peak, in bytes of the rows.
      settings: kept in index.json; searches follow them.
    """

    kind: ClassVar[str]
    files: ClassVar[frozenset[str]] = frozenset()
    build_ram_factor: ClassVar[float] = 1.0

    def __init__(self, num_rows: int, d_embed: int, settings: Mapping[str, Any]):
        self.settings = dict(settings)
        self._num_rows = num_rows
        self._d_embed = d_embed

    def __len__(self) -> int:
        return self._num_rows

    @property
    def d_embed(self) -> int:
        """Width of the rows."""
        return self._d_embed

    @classmethod
    def import_library(cls) -> Any:
        """The library that searches, if it is another one than this package's own.

        Raises:
          ImportError: says how to install it.
        """
        return None

    @classmethod
    def build(
        cls,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
        path: str | os.PathLike[str],
        config: Any = None,
    ) -> Self:
        """Builds an index and writes it into the directory `path`.

        Args:
          embeddings: finite rows, at least one.
          path: directory; made when it does not exist.
          config: of the back end; None is its defaults.

        Raises:
          ValueError: on rows that are not finite, or a setting that does not fit them.
          ImportError: where the back end's library is not installed.
        """
        index = cls._build(check_embeddings(embeddings), config)
        index.save(pathlib.Path(path))
        return index

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
        *,
        verify: bool = True,
    ) -> Self:
        """Opens what `build` wrote; no library sees the folder before it is checked.

        Args:
          path: the directory.
          embeddings: the rows, for a back end that keeps no copy.
          verify: False where the caller has checked the sha256 of the files already.

        Raises:
          FileNotFoundError: if there is no index.
          IntegrityError: if a file is damaged, missing, or may not be there.
          ValueError: if it is of another kind, or the rows are others.
        """
        path = pathlib.Path(path)
        description = folder.read_description(path)
        if description.kind != cls.kind:
            raise ValueError(
                f'{path} holds an index of kind "{description.kind}"; this opens '
                f'"{cls.kind}"'
            )
        folder.check_names(path, description, cls.files)
        _, num_rows, d_embed, settings, _ = description
        allowed = cls.allowed_settings(settings, num_rows, d_embed)
        folder.check_settings(path, settings, allowed)
        if verify:
            folder.verify(path, description)
        if embeddings is not None and embeddings.shape != (num_rows, d_embed):
            raise ValueError(
                f"the index at {path} was built from {[num_rows, d_embed]} embeddings; "
                f"got {list(embeddings.shape)}"
            )
        try:
            return cls._open(path, description, embeddings)
        except (RuntimeError, IndexError, UnicodeError, MemoryError) as error:
            # What the libraries raise about files that they cannot read.
            raise storage.IntegrityError(
                f"{path} cannot be opened as an index of kind {cls.kind!r} ({error}); "
                f"{folder.REMEDY}"
            ) from error

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        queries = check_queries(queries, self._d_embed, k)
        if not len(queries):
            return empty_neighbours(0, k)
        ids, scores = self._search(queries, min(k, self._num_rows))
        return fill_slots(ids, scores, k, self._num_rows)

    def save(self, path: pathlib.Path) -> None:
        """Writes the index into the directory `path`, its description last."""
        path.mkdir(parents=True, exist_ok=True)
        self._write(path)
        for name in storage.list_files(path):
            storage.sync_file(path / name)
        self.describe(path)

    def describe(self, path: pathlib.Path) -> None:
        """Writes index.json again, with the present settings, for files at `path`."""
        names = [name for name in sorted(self.files) if (path / name).is_file()]
        size = (self._num_rows, self._d_embed)
        folder.write_description(path, self.kind, *size, self.settings, names)

    @classmethod
    def allowed_settings(
        cls, settings: Mapping[str, Any], num_rows: int, d_embed: int
    ) -> Mapping[str, Allowed]:
        """What each setting that must be there may be; see `folder.check_settings`."""
        return {}

    @classmethod
    def index_row_bytes(cls, d_embed: int) -> int:
        """Bytes of a row in a large index, in memory and on disk."""
        return 4 * d_embed

    def cheapest_settings(self) -> dict[str, Any] | None:
        """Where tuning begins; None if there is nothing to tune."""
        return None

    def costlier_settings(self) -> list[dict[str, Any]]:
        """One step from the present settings in each direction that may raise recall."""
        return []

    def compute_cost(self, settings: Mapping[str, Any]) -> float:
        """Bytes that one query reads, weighted: a clock would differ from run to run."""
        return 0.0

    @classmethod
    @abc.abstractmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: Any
    ) -> Self:
        """An index of these rows."""

    @abc.abstractmethod
    def _write(self, path: pathlib.Path) -> None:
        """Writes files of names in `files` into the directory `path`."""

    @classmethod
    @abc.abstractmethod
    def _open(
        cls,
        path: pathlib.Path,
        description: Description,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None,
    ) -> Self:
        """Opens what `_write` wrote; errors of a library become an IntegrityError."""

    @abc.abstractmethod
    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """Ids and scores, best first, for 1 <= k <= rows; unfilled ids are -1."""
