"""The built-in world as a source: `flagworld:train;num_nations=40;seed=1`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import get_args

from racm3_jax.documents.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.documents.flagworld.reader import Split
from racm3_jax.documents.readers.files import RECORDS_PER_SHARD
from racm3_jax.documents.readers.records import RawRecord, Shard


def flagworld_shards(
    path: str,
    *,
    seed: int = 0,
    num_nations: int = 40,
    num_heldout: int = 16,
    image_size: int = 64,
    max_documents: int = 1 << 40,
) -> list[Shard]:
    """A split of a flagworld, as one shard.

    Args:
      path: "train", "heldout_memory" or "heldout_test".
      seed: of the world.
      num_nations: of the training split.
      num_heldout: nations of the other two.
      image_size: pixels.
      max_documents: take only the first ones.

    Raises:
      ValueError: another split.
    """
    split = next((s for s in get_args(Split) if s == path), None)
    if split is None:
        raise ValueError(
            f"flagworld has the splits {', '.join(get_args(Split))}; got {path!r}"
        )
    config = FlagworldConfig(
        seed=seed,
        num_nations=num_nations,
        num_heldout=num_heldout,
        image_size=image_size,
    )
    read = functools.partial(_read, config, split, max_documents)
    name = f"flagworld/{split}/{seed}/{num_nations}/{num_heldout}/{image_size}"
    return [Shard(name, min(max_documents, RECORDS_PER_SHARD), read)]


def _read(
    config: FlagworldConfig, split: Split, max_documents: int
) -> Iterator[RawRecord]:
    for document in itertools.islice(read_flagworld(config, split), max_documents):
        yield RawRecord(document.id, functools.partial(lambda d: d, document))
