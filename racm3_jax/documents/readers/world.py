"""A world as a source: `flagworld:train;num_nations=40;seed=1`, see `worlds`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from racm3_jax.documents.readers.files import RECORDS_PER_SHARD
from racm3_jax.documents.readers.records import RawRecord, Shard
from racm3_jax.types import Document
from racm3_jax.worlds import SPLITS, Split, World

_ALL = 1 << 40


def world_options(world: World) -> Mapping[str, bool | int | str]:
    """The options of the source, with their defaults."""
    return {**world.source, "max_documents": _ALL}


def world_shards(
    name: str, world: World, path: str, *, max_documents: int = _ALL, **options: Any
) -> list[Shard]:
    """A split of a world, as one shard.

    Args:
      name: of the world.
      world: it.
      path: the split.
      max_documents: take only the first ones.
      **options: of `world.source`.

    Raises:
      ValueError: no such split.
    """
    split: Split | None = next((s for s in SPLITS if s == path), None)
    if split is None:
        raise ValueError(f"{name} has the splits {', '.join(SPLITS)}; got {path!r}")
    options = {**world.source, **options}
    read = functools.partial(world.read, world.settings(**options), split)
    shard = "/".join(map(str, (name, split, *options.values())))
    records = functools.partial(_read, read, max_documents)
    return [Shard(shard, min(max_documents, RECORDS_PER_SHARD), records)]


def _read(read: Any, max_documents: int) -> Iterator[RawRecord]:
    documents: Iterator[Document] = read()
    for document in itertools.islice(documents, max_documents):
        yield RawRecord(document.id, functools.partial(lambda d: d, document))
