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
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, UInt64

from racm3_jax.index import contract
from racm3_jax.index.contract import Index
from racm3_jax.types import Neighbours

_KEYS, _IDS, _SCORES = "keys.npy", "ids.npy", "scores.npy"


def hash_queries(
    queries: Float32[np.ndarray, "queries d_embed"],
) -> UInt64[np.ndarray, " queries"]:
    """64 bits of the bytes of every query."""
    rows = np.ascontiguousarray(queries, "<f4")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8")


class TableIndex:
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

    def __init__(
        self,
        keys: UInt64[np.ndarray, " known"],
        found: Neighbours,
        num_rows: int,
        d_embed: int,
        fallback: Index | None = None,
        settings: dict | None = None,
    ):
        self._keys = keys
        self._found = found
        self._num_rows = num_rows
        self._d_embed = d_embed
        self.fallback = fallback
        self.settings = settings or {}

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
        *,
        verify: bool = True,
        fallback: Index | None = None,
    ) -> TableIndex:
        """Opens what `save` wrote; the arrays stay on disk, mapped.

        Raises:
          FileNotFoundError: if there is no table.
          IntegrityError: if a file is damaged or missing.
        """
        path = pathlib.Path(path)
        description = contract.read_description(path)
        if description["kind"] != "table":
            raise ValueError(f"{path} holds an index of kind {description['kind']!r}")
        if verify:
            contract.verify_description(path, description)
        keys, ids, scores = (
            np.load(path / name, mmap_mode="r", allow_pickle=False)
            for name in (_KEYS, _IDS, _SCORES)
        )
        return cls(
            keys,
            Neighbours(ids, scores, np.isfinite(scores)),
            description["num_rows"],
            description["d_embed"],
            fallback,
            description["settings"],
        )

    def __len__(self) -> int:
        return self._num_rows

    @property
    def width(self) -> int:
        """Neighbours kept for a query."""
        return self._found.ids.shape[1]

    @property
    def num_queries(self) -> int:
        """Queries that the table knows."""
        return len(self._keys)

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`.

        Raises:
          ValueError: also on a query that the table does not know, without a fallback.
        """
        queries = contract.check_queries(queries, self._d_embed, k)
        if k > self.width and self.width < self._num_rows and self.fallback is not None:
            return self.fallback.search(queries, k)
        keys = hash_queries(queries)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        known = self._keys[places] == keys
        if not known.all() and self.fallback is None:
            raise ValueError(
                f"query {int(np.flatnonzero(~known)[0])} is not in the table of "
                f"{self.num_queries} precomputed queries: search with the memory's own "
                "index, or make the table anew (racm3 memory neighbours)"
            )
        ids, scores = (np.asarray(c[places]) for c in self._found[:2])
        result = contract.fill_slots(ids, scores, k)
        if not known.all() and self.fallback is not None:
            live = self.fallback.search(queries[~known], k)
            for column, part in zip(result, live, strict=True):
                column[~known] = part
        return result

    def save(self, path: pathlib.Path) -> None:
        """Writes the table into the directory `path`; see `Index.save`."""
        path.mkdir(parents=True, exist_ok=True)
        scores = np.where(self._found.valid, self._found.scores, -np.inf)
        np.save(path / _KEYS, np.asarray(self._keys, "<u8"))
        np.save(path / _IDS, np.asarray(self._found.ids, "<i8"))
        np.save(path / _SCORES, np.asarray(scores, "<f4"))
        contract.write_description(
            path,
            "table",
            self._num_rows,
            self._d_embed,
            self.settings,
            [_KEYS, _IDS, _SCORES],
        )
