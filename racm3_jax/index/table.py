"""Precomputed neighbours: a search is one look-up in a sorted table.

    query  --blake2b-->  key  --binary search-->  its row of ids and scores

Training asks only queries that are known beforehand (`Memory.queries` of every document,
modality and variant), so their neighbours can be found once, on a pod or overnight, and
read by every run that follows: the same batches, without an index in RAM.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Self

import numpy as np
from jaxtyping import Float, Float32, Int, UInt64

from racm3_jax import storage
from racm3_jax.index.contract import Backend, Index
from racm3_jax.index.folder import REMEDY, Description
from racm3_jax.index.rows import Rows
from racm3_jax.types import Neighbours

_KEYS, _IDS, _SCORES = "keys.npy", "ids.npy", "scores.npy"


def hash_queries(
    queries: Float32[np.ndarray, "queries d_embed"],
) -> UInt64[np.ndarray, " queries"]:
    """64 bits of the bytes of every query."""
    rows = np.ascontiguousarray(queries, "<f4")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8")


class TableIndex(Backend):
    """Neighbours of known queries.

    Args:
      keys: `hash_queries` of the known queries, ascending.
      found: their neighbours; the width is the largest `k` that the table answers.
      num_rows: of the memory.
      d_embed: of the queries.
      fallback: answers other queries, and larger `k`; without one the first is an
        error, and slots beyond the table's width stay unfilled.
      settings: what the table was made from; kept in its description.
    """

    kind = "table"
    files = frozenset({_KEYS, _IDS, _SCORES})

    def __init__(
        self,
        keys: UInt64[np.ndarray, " known"],
        found: Neighbours,
        num_rows: int,
        d_embed: int,
        fallback: Index | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(num_rows, d_embed, settings or {})
        self._keys = keys
        self._found = found
        self.fallback = fallback

    @classmethod
    def compute(
        cls,
        index: Index,
        queries: Iterable[Float32[np.ndarray, "queries d_embed"]],
        k: int,
        d_embed: int,
        settings: dict | None = None,
    ) -> TableIndex:
        """Asks `index` for the neighbours of blocks of queries.

        Raises:
          ValueError: no queries, or some that an index refuses.
        """
        keys, parts = [], []
        for block in queries:
            keys.append(hash_queries(block))
            parts.append(index.search(block, k))
        if not keys:
            raise ValueError("a table needs at least one query")
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        columns = (np.concatenate(c)[first] for c in zip(*parts, strict=True))
        found = Neighbours(*columns)
        return cls(unique, found, len(index), d_embed, index, settings)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
        *,
        verify: bool = True,
        fallback: Index | None = None,
    ) -> Self:
        """Opens what `save` wrote; the arrays stay on disk, mapped.

        See `Backend.load`, and the class about `fallback`.
        """
        table = super().load(path, embeddings, verify=verify)
        table.fallback = fallback
        return table

    @classmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: None
    ) -> NoReturn:
        raise ValueError(
            "a table is made of queries: compute it (racm3 memory neighbours)"
        )

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
                f"{path} holds arrays of other shapes or types than a table has "
                f"({found}); {REMEDY}"
            )
        neighbours = Neighbours(ids, scores, np.isfinite(scores))
        return cls(keys, neighbours, *description[1:3], settings=description.settings)

    @property
    def width(self) -> int:
        """Neighbours kept for a query."""
        return self._found.ids.shape[1]

    @property
    def num_queries(self) -> int:
        """Queries that the table knows."""
        return len(self._keys)

    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """A query that the table does not know is an error without a fallback."""
        if k > self.width and self.fallback is not None:
            found = self.fallback.search(queries, k)
            return found.ids, found.scores
        keys = hash_queries(queries)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        known = self._keys[places] == keys
        ids, scores = (np.array(column[places][:, :k]) for column in self._found[:2])
        if not known.all():
            if self.fallback is None:
                raise ValueError(
                    f"query {int(np.flatnonzero(~known)[0])} is not in the table of "
                    f"{self.num_queries} precomputed queries: search with the memory's "
                    "own index, or make the table again (racm3 memory neighbours)"
                )
            live = self.fallback.search(queries[~known], k)
            ids[~known], scores[~known] = live.ids, live.scores
        return ids, scores

    def _write(self, path: pathlib.Path) -> None:
        scores = np.where(self._found.valid, self._found.scores, -np.inf)
        np.save(path / _KEYS, np.asarray(self._keys, "<u8"))
        np.save(path / _IDS, np.asarray(self._found.ids, "<i8"))
        np.save(path / _SCORES, np.asarray(scores, "<f4"))
