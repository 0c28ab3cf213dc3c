"""Which back end a memory gets: built by its kind, opened by its description."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from racm3_jax.index.contract import Index, IndexKind, read_description
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.rows import Rows
from racm3_jax.index.scann import ScannConfig, ScannIndex
from racm3_jax.index.sharded import ShardedIndex, Tune
from racm3_jax.index.table import TableIndex

# Below this, the exact search is as fast as any.
MIN_SCANN_ROWS = 1024


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
    if kind not in ("exact", "scann", "scann_sharded"):
        raise ValueError(
            f'index must be "scann_sharded", "exact", "scann" or "auto"; got {kind!r}'
        )
    return kind


def build_index(
    kind: IndexKind | Literal["auto"],
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
    path: pathlib.Path,
    rows_per_shard: int | None = None,
    tune: Tune | None = None,
) -> Index:
    """Builds an index of the rows and writes it into the directory `path`.

    Args:
      kind: of the index.
      embeddings: the rows.
      path: directory; made when it does not exist.
      rows_per_shard: of a sharded index; None is its default.
      tune: called with every ScaNN index that was built; see `tuning.tune`.
    """
    kind = choose_kind(kind, len(embeddings))
    path = pathlib.Path(path)
    if kind == "scann_sharded":
        path.mkdir(parents=True, exist_ok=True)
        return ShardedIndex.build(
            embeddings, path, rows_per_shard=rows_per_shard, tune=tune
        )
    if kind == "scann":
        built = ScannIndex.build(np.asarray(embeddings), ScannConfig(), path)
        if tune is not None:
            tune(built, path, embeddings)
        return built
    index = ExactIndex(np.asarray(embeddings))
    path.mkdir(parents=True, exist_ok=True)
    index.save(path)
    return index


def open_index(
    path: str | pathlib.Path,
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
    *,
    verify: bool = True,
) -> Index:
    """Opens an index of any kind.

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
        return ScannIndex.load(path, verify=verify)
    if description["kind"] == "scann_sharded":
        return ShardedIndex.load(path, verify=verify)
    if description["kind"] == "table":
        return TableIndex.load(path, verify=verify)
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


def open_parts(
    paths: Sequence[pathlib.Path], counts: Sequence[int], embeddings: Rows
) -> Index:
    """Opens the indexes of a memory's parts as one; their files are verified already.

    Args:
      paths: of the indexes.
      counts: rows of each.
      embeddings: the rows of all.
    """
    if len(paths) == 1:
        return open_index(paths[0], embeddings, verify=False)
    shards, first = [], 0
    for path, count in zip(paths, counts, strict=True):
        rows = embeddings[first : first + count]
        shards.append((first, open_index(path, rows, verify=False)))
        first += count
    return ShardedIndex(shards)
