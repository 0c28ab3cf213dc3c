"""Several indexes as one: shards of the rows, searched separately, merged exactly.

    shard 0: rows 0 .. R-1        -> (.9, 4) (.7, 1)
    shard 1: rows R .. 2R-1       -> (.9, R) (.8, R+2)
    merged by (-score, id), k = 3 -> (.9, 4) (.9, R) (.8, R+2)

One process may have all shards, or each process some (`hosts`). Builds of several
million rows peak at many times the rows' size; sharding bounds that.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from racm3_jax import storage
from racm3_jax.index import contract, folder
from racm3_jax.index.contract import Backend, Index
from racm3_jax.index.rows import Rows
from racm3_jax.types import Neighbours

SUFFIX = "_sharded"
# Above this a ScaNN build of 768-d rows no longer fits 64 GB.
ROWS_PER_SHARD = 4_000_000
# Tunes an index that was built at a path from some rows; saves the settings.
Tune = Callable[[Backend, pathlib.Path, np.ndarray | Rows], object]


def merge_neighbours(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The best `k` of all parts for each query, by (-score, id)."""
    ids, scores, valid = (np.concatenate(c, axis=1) for c in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores, ~valid), axis=1)[:, :k]
    best = (np.take_along_axis(c, order, axis=1) for c in (ids, scores, valid))
    merged = contract.empty_neighbours(len(ids), k)
    for column, part in zip(merged, best, strict=True):
        column[:, : part.shape[1]] = part
    return merged


class ShardedIndex:
    """Indexes of consecutive rows as one index.

    Args:
      shards: first row and index of each, ascending; may be a subset.
    """

    def __init__(self, shards: Sequence[tuple[int, Index]]):
        if not shards:
            raise ValueError("a sharded index needs at least one shard")
        self._shards = list(shards)
        self._num_rows = sum(len(index) for _, index in shards)

    @classmethod
    def build(
        cls,
        backend: type[Backend],
        embeddings: np.ndarray | Rows,
        path: str | os.PathLike[str],
        *,
        config: Any = None,
        rows_per_shard: int | None = None,
        tune: Tune | None = None,
    ) -> ShardedIndex:
        """Builds an index of every `rows_per_shard` rows into `path`.

        One shard is in memory at a time; all are opened at the end.

        Args:
          backend: of every shard; must be shardable.
          embeddings: the rows.
          path: directory; made when it does not exist.
          config: of every shard.
          rows_per_shard: of all shards except the last.
          tune: called with every shard, which must reach the recall target by itself.

        Raises:
          ValueError: rows that are not finite, no rows, or a shard size < 1.
        """
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        size = ROWS_PER_SHARD if rows_per_shard is None else rows_per_shard
        if size < 1:
            raise ValueError(f"rows_per_shard must be >= 1; got {size}")
        if len(embeddings) == 0 or len(embeddings.shape) != 2:
            contract.check_embeddings(np.asarray(embeddings))
        starts = list(range(0, len(embeddings), size))
        for number, start in enumerate(starts):
            rows = np.asarray(embeddings[start : start + size])
            if isinstance(embeddings, Rows):
                embeddings.release()
            if not np.isfinite(rows.sum(axis=1, dtype=np.float64)).all():
                # Checks the whole array again so that the error has the caller's row
                # number.
                contract.check_embeddings(np.asarray(embeddings))
            place = path / _name(number)
            index = backend.build(rows, place, config)
            if tune is not None:
                tune(index, place, rows)
            del index
        names = sorted(_names(backend, len(starts)) & {*storage.list_files(path)})
        kind, settings = backend.kind + SUFFIX, {"starts": starts}
        num_rows, d_embed = embeddings.shape
        folder.write_description(path, kind, num_rows, d_embed, settings, names)
        return cls.load(backend, path, verify=False)

    @classmethod
    def load(
        cls,
        backend: type[Backend],
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        only: Sequence[int] | None = None,
    ) -> ShardedIndex:
        """Opens what `build` wrote.

        Args:
          backend: of every shard.
          path: the directory.
          verify: False where the caller has checked the files already.
          only: indices of the shards of this process; None means all.

        Raises:
          FileNotFoundError: there is no index.
          IntegrityError: a file is damaged, missing, or not allowed.
          ValueError: a shard does not exist.
        """
        path = pathlib.Path(path)
        description = folder.read_description(path)
        if description.kind != backend.kind + SUFFIX:
            raise ValueError(
                f'{path} holds an index of kind "{description.kind}"; this opens '
                f'"{backend.kind + SUFFIX}"'
            )
        starts = _check_starts(path, description)
        numbers = range(len(starts)) if only is None else only
        if any(not 0 <= n < len(starts) for n in numbers):
            raise ValueError(
                f"the index at {path} has shards 0..{len(starts) - 1}; got {list(numbers)}"
            )
        folder.check_names(path, description, _names(backend, len(starts)))
        if verify:
            folder.verify(path, description)
        shards, ends = [], [*starts[1:], description.num_rows]
        for n in sorted(numbers):
            shard = backend.load(path / _name(n), verify=False)
            found = (len(shard), shard.d_embed)
            expected = (ends[n] - starts[n], description.d_embed)
            if found != expected:
                raise storage.IntegrityError(
                    f"{path / _name(n)} has {list(found)} rows and dimensions instead "
                    f"of {list(expected)}; {folder.REMEDY}"
                )
            shards.append((starts[n], shard))
        return cls(shards)

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        found = []
        for first, index in self._shards:
            part = index.search(queries, k)
            ids = np.where(part.valid, part.ids + first, -1)
            found.append(part._replace(ids=ids))
        return merge_neighbours(found, k)


def _check_starts(path: pathlib.Path, description: folder.Description) -> list[int]:
    """The first row of each shard: 0, then ascending, all below the number of rows."""
    starts = description.settings.get("starts")
    if isinstance(starts, list) and all(type(start) is int for start in starts):
        edges = [*starts, description.num_rows]
        if edges[0] == 0 and all(a < b for a, b in itertools.pairwise(edges)):
            return starts
    raise storage.IntegrityError(
        f'{path / folder.INDEX_FILE}: the setting "starts" must be the first row of '
        f"each shard of {description.num_rows} rows; {folder.REMEDY}"
    )


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def shard_of(name: str) -> int | None:
    """The index of the shard to which a file belongs; None if to none."""
    match = re.match(r"shard-(\d{5})/", name)
    return int(match[1]) if match else None


def _names(backend: type[Backend], num_shards: int) -> set[str]:
    """All files allowed in the folder besides its description."""
    return {
        f"{_name(number)}/{name}"
        for number in range(num_shards)
        for name in (folder.INDEX_FILE, *backend.files)
    }
