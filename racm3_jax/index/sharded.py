"""Several indexes as one: shards of the rows, searched apart, merged exactly.

    shard 0: rows 0 .. R-1        -> (.9, 4) (.7, 1)
    shard 1: rows R .. 2R-1       -> (.9, R) (.8, R+2)
    merged by (-score, id), k = 3 -> (.9, 4) (.9, R) (.8, R+2)

One process may hold all shards, or each its own: `search` of each, then
`merge_neighbours` over the processes, gives what one process would. ScaNN builds of
several million rows peak at many times the rows' size; shards bound that.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32

from racm3_jax.index import contract
from racm3_jax.index.contract import Index
from racm3_jax.index.rows import Rows
from racm3_jax.index.scann import ScannConfig, ScannIndex
from racm3_jax.types import Neighbours

# Above this a ScaNN build of 768-d rows no longer fits 64 GB.
ROWS_PER_SHARD = 4_000_000
# Sets a ScaNN index that was built at a path, of some rows; saves what it changes.
Tune = Callable[[ScannIndex, pathlib.Path, np.ndarray | Rows], object]


def merge_neighbours(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The best `k` of all parts for each query, by (-score, id)."""
    ids, scores, valid = (np.concatenate(c, axis=1) for c in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores, ~valid), axis=1)[:, :k]
    merged = Neighbours(
        *(np.take_along_axis(c, order, axis=1) for c in (ids, scores, valid))
    )
    return contract.fill_slots(
        merged.ids, np.where(merged.valid, merged.scores, -np.inf), k
    )


class ShardedIndex:
    """Indexes of consecutive rows, behind one contract.

    Args:
      shards: first row and index of each, ascending; may be some of a whole.
    """

    def __init__(self, shards: Sequence[tuple[int, Index]]):
        if not shards:
            raise ValueError("a sharded index needs at least one shard")
        self._shards = list(shards)
        self._num_rows = sum(len(index) for _, index in shards)

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray | Rows,
        path: str | pathlib.Path,
        *,
        config: ScannConfig | None = None,
        rows_per_shard: int | None = None,
        tune: Tune | None = None,
    ) -> ShardedIndex:
        """Builds a ScaNN index of every `rows_per_shard` rows into `path`.

        One shard is in memory at a time; all of them are opened at the end.

        Args:
          embeddings: the rows.
          path: directory; must exist.
          config: of every shard.
          rows_per_shard: of all shards but the last.
          tune: called with every shard, which must reach a recall target by itself.

        Raises:
          ValueError: on rows that are not finite, none, or a shard size below 1.
        """
        path = pathlib.Path(path)
        size = ROWS_PER_SHARD if rows_per_shard is None else rows_per_shard
        if size < 1:
            raise ValueError(f"rows_per_shard must be >= 1; got {size}")
        if len(embeddings) == 0 or len(embeddings.shape) != 2:
            contract.check_embeddings(np.asarray(embeddings))
        names: list[str] = []
        starts = list(range(0, len(embeddings), size))
        for number, start in enumerate(starts):
            rows = np.asarray(embeddings[start : start + size])
            if isinstance(embeddings, Rows):
                embeddings.release()
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                # The whole array names the row as the caller counts.
                contract.check_embeddings(np.asarray(embeddings))
            name = f"shard-{number:05d}"
            index = ScannIndex.build(rows, config or ScannConfig(), path / name)
            if tune is not None:
                tune(index, path / name, rows)
            del index
            names += [f"{name}/{f}" for f in _files_of(path / name)]
        _describe(path, names, starts, *embeddings.shape)
        return cls.load(path, verify=False)

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        *,
        verify: bool = True,
        only: Sequence[int] | None = None,
    ) -> ShardedIndex:
        """Opens what `build` wrote.

        Args:
          path: the directory.
          verify: False where the caller has checked the files already.
          only: numbers of the shards that this process holds; None is all.

        Raises:
          FileNotFoundError: if there is no index.
          IntegrityError: if a file is damaged or missing.
          ValueError: if a shard does not exist.
        """
        path = pathlib.Path(path)
        description = contract.read_description(path)
        starts = description["settings"]["starts"]
        numbers = range(len(starts)) if only is None else only
        if any(not 0 <= n < len(starts) for n in numbers):
            raise ValueError(
                f"the index at {path} has shards 0..{len(starts) - 1}; got {list(numbers)}"
            )
        if verify:
            contract.verify_description(path, description)
        return cls(
            [
                (starts[n], ScannIndex.load(path / f"shard-{n:05d}", verify=False))
                for n in sorted(numbers)
            ]
        )

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

    def save(self, path: pathlib.Path) -> None:
        """Writes every shard into the directory `path`; see `Index.save`."""
        names, d_embed = [], 0
        for number, (_, index) in enumerate(self._shards):
            name = f"shard-{number:05d}"
            index.save(path / name)
            d_embed = contract.read_description(path / name)["d_embed"]
            names += [f"{name}/{f}" for f in _files_of(path / name)]
        starts = [first for first, _ in self._shards]
        _describe(path, names, starts, len(self), d_embed)


def _describe(
    path: pathlib.Path, names: list[str], starts: list[int], num_rows: int, d_embed: int
) -> None:
    settings = {"starts": starts}
    contract.write_description(
        path, "scann_sharded", num_rows, d_embed, settings, names
    )


def _files_of(path: pathlib.Path) -> list[str]:
    """The files of one index: those that it lists, and its description."""
    return [*contract.read_description(path)["files"], contract.INDEX_FILE]
