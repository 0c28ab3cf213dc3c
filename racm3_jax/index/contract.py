"""Nearest neighbours by inner product: the contract of all back ends.

All of them mark unfilled slots in the same way, refuse the same inputs with the same
messages, and pass one contract test. `Backend` is their base class; `registry` lists
them.
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

# A key of the registry's table.
IndexKind = str


class Index(Protocol):
    """The interface of a nearest-neighbour index. Searching is thread-safe."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """The `k` rows of largest inner product with each query, best first.

        Unfilled slots (k larger than the index, or fewer rows found) come last, with id
        -1, score -inf and valid False.

        Raises:
          ValueError: a query that is not finite, another width, or k < 1.
        """
        ...


def check_queries(
    queries: Float[np.ndarray, "queries d_embed"], d_embed: int, k: int
) -> Float32[np.ndarray, "queries d_embed"]:
    """The queries as contiguous float32; raises a readable error."""
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
            f"{len(queries)} queries do); check the embedder that computed it"
        )
    return queries


def check_embeddings(
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
) -> Float32[np.ndarray, "rows d_embed"]:
    """The rows as contiguous float32; NaN rows would crash ScaNN."""
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    if embeddings.ndim != 2 or embeddings.size == 0:
        raise ValueError(
            "an index needs float[rows, d_embed] embeddings with at least one row; "
            f"got {list(embeddings.shape)}"
        )
    # NaN and inf propagate through a sum; a mask of all values would need more memory.
    bad = np.flatnonzero(~np.isfinite(embeddings.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise ValueError(
            f"embedding row {bad[0]} has values that are not finite ({len(bad)} of "
            f"{len(embeddings)} rows do); check the embedder that computed them"
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
    """Brings a library's results into the form of the contract.

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
    """Results without denied rows, with exact scores, sorted by (-score, id).

    Without `embeddings`, the scores are already exact.
    """
    rows = np.maximum(found.ids, 0)
    valid = found.valid & ~denied[rows]
    scores = found.scores
    if embeddings is not None:
        # einsum, not a matrix product: a score depends only on its two vectors, not
        # on the batch.
        scores = np.einsum("qd,qkd->qk", queries, embeddings[rows])
    scores = np.where(valid, scores, -np.inf).astype(np.float32)
    ids = np.where(valid, found.ids, -1)
    order = np.lexsort((ids, -scores), axis=1)
    columns = (np.take_along_axis(x, order, axis=1) for x in (ids, scores, valid))
    return Neighbours(*columns)


class Backend(abc.ABC):
    """Base class of a back end: build, load, search, and tunable settings.

    A subclass implements `_build`, `_write`, `_open` and `_search`; their inputs are
    already checked, and their results are brought into the contract's form here.

    Attributes:
      kind: its name in the registry's table and in index.json.
      files: file names in its folder; others are not allowed.
      build_ram_factor: peak memory of a build, as a multiple of the rows' bytes.
      settings: stored in index.json; used by searches.
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
        """Imports the search library, if the back end uses one.

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
          ValueError: rows that are not finite, or a setting that does not fit them.
          ImportError: the back end's library is not installed.
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
        """Opens an index from `build`; the folder is checked before a library opens it.

        Args:
          path: the directory.
          embeddings: the rows, for a back end without its own copy.
          verify: False if the caller has already verified the sha256 of the files.

        Raises:
          FileNotFoundError: there is no index.
          IntegrityError: a file is damaged, missing, or not allowed.
          ValueError: it is of another kind, or was built from other rows.
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
            # Exceptions of the libraries for files that they cannot read.
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
        """Rewrites index.json with the current settings, for files at `path`."""
        names = [name for name in sorted(self.files) if (path / name).is_file()]
        size = (self._num_rows, self._d_embed)
        folder.write_description(path, self.kind, *size, self.settings, names)

    @classmethod
    def allowed_settings(
        cls, settings: Mapping[str, Any], num_rows: int, d_embed: int
    ) -> Mapping[str, Allowed]:
        """Allowed values of each required setting; see `folder.check_settings`."""
        return {}

    @classmethod
    def index_row_bytes(cls, d_embed: int) -> int:
        """Bytes per row of a large index, in memory and on disk."""
        return 4 * d_embed

    def cheapest_settings(self) -> dict[str, Any] | None:
        """Initial settings of tuning; None if there is nothing to tune."""
        return None

    def costlier_settings(self) -> list[dict[str, Any]]:
        """The next settings in each direction that may raise recall."""
        return []

    def compute_cost(self, settings: Mapping[str, Any]) -> float:
        """Weighted bytes that one query reads; deterministic, unlike wall-clock time."""
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
        """Opens files from `_write`; library errors become an IntegrityError."""

    @abc.abstractmethod
    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """Ids and scores, best first, for 1 <= k <= rows; unfilled ids are -1."""
