"""The table of back ends: builds an index by its kind, opens it by its description.

A new back end needs a file with a `contract.Backend`, one line of `TABLE`, and its own
tests; the contract tests, `racm3 memory build --index` and `racm3 memory plan` find it
here. Shardable kinds also exist with the suffix `_sharded`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from racm3_jax import storage
from racm3_jax.index import folder
from racm3_jax.index.contract import Backend, Index, IndexKind
from racm3_jax.index.rows import Rows
from racm3_jax.index.sharded import SUFFIX, ShardedIndex, Tune


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
      place: module of this package, and its `Backend`; imported on use.
      library: required library, if any.
      fastest_at: "auto" prefers this kind at these numbers of rows; measured at 34,560,
        60,000 and 300,000 (experiments/results).
      is_shardable: can be opened without the rows of the memory.
      is_built_of_rows: False if it is built in another way, and only opened here.
    """

    place: str
    library: str | None = None
    fastest_at: range = range(0)
    is_shardable: bool = False
    is_built_of_rows: bool = True


TABLE = {
    "scann": Entry("scann:ScannIndex", library="scann", is_shardable=True),
    "faiss": Entry(
        "faiss:FaissIndex",
        library="faiss",
        fastest_at=range(20_000, 1_000_000),
        is_shardable=True,
    ),
    "exact": Entry("exact:ExactIndex"),
    "table": Entry("table:TableIndex", is_built_of_rows=False),
}
# Below this, exact search is as fast as any index.
MIN_ROWS = 1024


def get_backend(kind: IndexKind) -> type[Backend]:
    """The back end of a kind; for a sharded kind, that of its shards."""
    module, name = TABLE[kind.removesuffix(SUFFIX)].place.split(":")
    return getattr(importlib.import_module(f"racm3_jax.index.{module}"), name)


def list_kinds() -> list[IndexKind]:
    """The kinds of index that can be built for a memory."""
    whole = [kind for kind, entry in TABLE.items() if entry.is_built_of_rows]
    return whole + [kind + SUFFIX for kind in whole if TABLE[kind].is_shardable]


def is_installed(kind: IndexKind) -> bool:
    """Whether the library of a kind is installed."""
    library = TABLE[kind.removesuffix(SUFFIX)].library
    return library is None or importlib.util.find_spec(library) is not None


def _import_library(kind: IndexKind) -> None:
    try:
        get_backend(kind).import_library()
    except ImportError as error:
        raise ValueError(str(error)) from error


def choose_kind(kind: IndexKind | Literal["auto"], num_rows: int) -> IndexKind:
    """Resolves "auto": the fastest installed library, or exact for a small memory.

    Raises:
      ValueError: an unknown kind, or its library is not installed.
    """
    if kind == "auto":
        libraries = [k for k, entry in TABLE.items() if entry.library is not None]
        usable = [k for k in libraries if num_rows >= MIN_ROWS and is_installed(k)]
        fastest = [k for k in usable if num_rows in TABLE[k].fastest_at]
        return [*fastest, *usable, "exact"][0]
    if kind not in list_kinds():
        words = ", ".join(f'"{k}"' for k in list_kinds())
        raise ValueError(f'index must be "auto" or one of {words}; got {kind!r}')
    if not is_installed(kind):
        _import_library(kind)
    return kind


def fit_ram(
    kind: IndexKind, num_rows: int, d_embed: int, free_bytes: float
) -> tuple[IndexKind, int | None]:
    """The kind, or its sharded form, whose build fits; and rows per shard.

    A kind that cannot be sharded is returned as it is.
    """
    row_bytes = 4 * d_embed * get_backend(kind).build_ram_factor
    fitting = max(0, int(free_bytes / row_bytes))
    whole = kind.removesuffix(SUFFIX)
    if not TABLE[whole].is_shardable or (fitting >= num_rows and kind == whole):
        return kind, None
    return whole + SUFFIX, max(MIN_ROWS, min(fitting, num_rows))


def build_index(
    kind: IndexKind | Literal["auto"],
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
    path: pathlib.Path,
    rows_per_shard: int | None = None,
    tune: Tune | None = None,
) -> Index:
    """Builds an index of the rows and writes it into the directory `path`.

    Args:
      kind: of the index; every kind supports any number of rows >= 1.
      embeddings: the rows.
      path: directory; made when it does not exist.
      rows_per_shard: of a sharded index; None is its default.
      tune: called with every built index; see `tuning.tune`.
    """
    kind = choose_kind(kind, len(embeddings))
    backend, path = get_backend(kind), pathlib.Path(path)
    if kind.endswith(SUFFIX):
        return ShardedIndex.build(
            backend, embeddings, path, rows_per_shard=rows_per_shard, tune=tune
        )
    index = backend.build(embeddings, path)
    if tune is not None and index.cheapest_settings() is not None:
        tune(index, path, embeddings)
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
      embeddings: the rows; an exact index has no copy of its own.
      verify: False if the caller has already verified the sha256 of the files.

    Raises:
      FileNotFoundError: there is no index.
      IntegrityError: a file is damaged, or not allowed in an index.
      ValueError: an exact index without its rows, any index with other rows, or
        the library of its kind is not installed.
    """
    path = pathlib.Path(path)
    kind = folder.read_description(path).kind
    if kind not in (*TABLE, *list_kinds()):
        words = ", ".join(f'"{k}"' for k in (*TABLE, *list_kinds()))
        raise storage.IntegrityError(
            f'{path / folder.INDEX_FILE}: "kind" must be one of {words}; got {kind!r}: '
            f"{folder.REMEDY}"
        )
    _import_library(kind)
    backend = get_backend(kind)
    if kind.endswith(SUFFIX):
        return ShardedIndex.load(backend, path, verify=verify)
    return backend.load(path, embeddings, verify=verify)


def assign_shards(
    paths: Sequence[pathlib.Path], process: int, num_processes: int
) -> list[list[int] | None]:
    """The shards of each part's index for a process; None means a whole index.

    They are assigned round-robin over all parts; `[]` means no shard of a part.
    """
    shared: list[list[int] | None] = []
    first = 0
    for path in paths:
        num = len(folder.read_description(path).settings.get("starts", ()))
        own = [n for n in range(num or 1) if (first + n) % num_processes == process]
        first += num or 1
        shared.append(None if own and not num else own)
    return shared


def open_parts(
    paths: Sequence[pathlib.Path],
    counts: Sequence[int],
    embeddings: Rows,
    shared: Sequence[list[int] | None] | None = None,
) -> Index | None:
    """Opens the indexes of a memory's parts as one; their files are already verified.

    Args:
      paths: of the indexes.
      counts: rows of each.
      embeddings: the rows of all.
      shared: the shards of this process, see `assign_shards`; None means all.

    Returns:
      None if this process has no shard.

    Raises:
      IntegrityError: an index has another number of rows than its part.
    """
    shards: list[tuple[int, Index]] = []
    first = 0
    owned = [None] * len(paths) if shared is None else shared
    for path, count, own in zip(paths, counts, owned, strict=True):
        description = folder.read_description(path)
        if description.num_rows != count:
            raise storage.IntegrityError(
                f"the index at {path} has {description.num_rows} rows instead of "
                f"{count}; {folder.REMEDY}"
            )
        if own is None:
            rows = embeddings if len(paths) == 1 else embeddings[first : first + count]
            shards.append((first, open_index(path, rows, verify=False)))
        elif own:
            _import_library(description.kind)
            backend = get_backend(description.kind)
            index = ShardedIndex.load(backend, path, verify=False, only=own)
            shards.append((first, index))
        first += count
    if len(shards) == 1 and len(paths) == 1:
        return shards[0][1]
    return ShardedIndex(shards) if shards else None
