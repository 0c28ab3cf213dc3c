"""Precomputed neighbours: a search is a look-up in a sorted table.

    query  --blake2b-->  key  --binary search-->  its row of ids and scores

Training uses only queries that are known in advance (`Memory.queries` of every
document, modality and variant), so their neighbours can be computed once, on a pod or
overnight, and read by all later runs: the same batches, without an index in RAM.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from jaxtyping import Float, Float32, Int, Int64, UInt64

from racm3_jax import storage
from racm3_jax.index.contract import Backend, Index
from racm3_jax.index.folder import REMEDY, Description
from racm3_jax.index.rows import Rows

_KEYS, _IDS, _SCORES = "keys.npy", "ids.npy", "scores.npy"


def hash_queries(
    queries: Float32[np.ndarray, "queries d_embed"],
) -> UInt64[np.ndarray, " queries"]:
    """64-bit hash of the bytes of every query."""
    rows = np.ascontiguousarray(queries, "<f4")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8")


class TablePart(NamedTuple):
    """Some queries of a table, by their keys, with their results."""

    keys: UInt64[np.ndarray, " queries"]
    ids: Int64[np.ndarray, "queries width"]
    scores: Float32[np.ndarray, "queries width"]

    @classmethod
    def find(
        cls, index: Index, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> TablePart:
        """Searches the `k` neighbours of some queries in `index`."""
        found = index.search(queries, k)
        return cls(hash_queries(queries), found.ids, found.scores)


class TableIndex(Backend):
    """Neighbours of known queries.

    Args:
      keys: `hash_queries` of the known queries, ascending.
      ids: their neighbours; the width is the largest `k` of the table.
      scores: of the neighbours, best first; -inf for unfilled slots.
      num_rows: of the memory.
      d_embed: of the queries.
      fallback: index for other queries and larger `k`; without it other queries are an
        error, and slots beyond the table's width stay unfilled.
      settings: what the table was computed from; stored in its description.
    """

    kind = "table"
    files = frozenset({_KEYS, _IDS, _SCORES})

    def __init__(
        self,
        keys: UInt64[np.ndarray, " known"],
        ids: Int64[np.ndarray, "known width"],
        scores: Float32[np.ndarray, "known width"],
        num_rows: int,
        d_embed: int,
        fallback: Index | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(num_rows, d_embed, settings or {})
        self._keys = keys
        self._ids = ids
        self._scores = scores
        self.fallback = fallback

    @classmethod
    def join(
        cls,
        parts: Sequence[Callable[[], TablePart]],
        path: pathlib.Path,
        num_rows: int,
        d_embed: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Writes the table of all parts into the directory `path`, one part in RAM.

        A query in several parts is taken from the first.

        Args:
          parts: each is read twice.
          path: of the table.
          num_rows: of the memory.
          d_embed: of the queries.
          settings: see the class.
        """
        keys = [read().keys for read in parts]
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        places = np.full(sum(map(len, keys)), -1)
        places[first] = np.arange(len(unique))
        np.save(path / _KEYS, np.asarray(unique, "<u8"))
        shape, start = (len(unique), parts[0]().ids.shape[1]), 0
        ids, scores = (
            np.lib.format.open_memmap(path / name, "w+", dtype, shape)
            for name, dtype in ((_IDS, "<i8"), (_SCORES, "<f4"))
        )
        for read in parts:
            part = read()
            own = places[start : start + len(part.keys)]
            start += len(own)
            ids[own[own >= 0]] = part.ids[own >= 0]
            scores[own[own >= 0]] = part.scores[own >= 0]
        ids.flush()
        scores.flush()
        cls(unique, ids, scores, num_rows, d_embed, settings=settings).describe(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
        *,
        verify: bool = True,
        fallback: Index | None = None,
    ) -> Self:
        """Opens a table; the arrays are memory-mapped.

        See `Backend.load`, and the class about `fallback`.
        """
        table = super().load(path, embeddings, verify=verify)
        table.fallback = fallback
        return table

    @classmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: None
    ) -> NoReturn:
        raise ValueError("a table is computed from queries (racm3 memory neighbours)")

    @classmethod
    def _open(
        cls,
        path: pathlib.Path,
        description: Description,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None,
    ) -> Self:
        try:
            keys, ids, scores = (
                np.lib.format.open_memmap(path / name, mode="r")
                for name in (_KEYS, _IDS, _SCORES)
            )
        except (ValueError, OSError, EOFError) as error:
            raise storage.IntegrityError(
                f"{path} holds an array that cannot be read ({error}); {REMEDY}"
            ) from error
        found = [(x.dtype.str, x.ndim) for x in (keys, ids, scores)]
        if found != [("<u8", 1), ("<i8", 2), ("<f4", 2)] or not (
            len(keys) >= 1 and ids.shape == scores.shape and len(ids) == len(keys)
        ):
            raise storage.IntegrityError(
                f"{path} holds arrays with other shapes or types than a table "
                f"({found}); {REMEDY}"
            )
        sizes = (description.num_rows, description.d_embed)
        return cls(keys, ids, scores, *sizes, settings=description.settings)

    @property
    def width(self) -> int:
        """Neighbours per query."""
        return self._ids.shape[1]

    @property
    def has_exact_scores(self) -> bool:
        """Whether the scores are inner products, as `contract.score_rows` computes."""
        return self.settings.get("scores") == "exact"

    @property
    def num_queries(self) -> int:
        """Number of queries in the table."""
        return len(self._keys)

    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """Without a fallback, a query that is not in the table is an error."""
        if k > self.width and self.fallback is not None:
            found = self.fallback.search(queries, k)
            return found.ids, found.scores
        keys = hash_queries(queries)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        known = self._keys[places] == keys
        ids, scores = (np.array(x[places][:, :k]) for x in (self._ids, self._scores))
        if not known.all():
            if self.fallback is None:
                raise ValueError(
                    f"query {int(np.flatnonzero(~known)[0])} is not in the table of "
                    f"{self.num_queries} precomputed queries: search with the memory's "
                    "own index, or compute the table again (racm3 memory neighbours)"
                )
            live = self.fallback.search(queries[~known], k)
            ids[~known], scores[~known] = live.ids, live.scores
        return ids, scores

    def _write(self, path: pathlib.Path) -> None:
        """Does nothing: `join` writes the table."""
