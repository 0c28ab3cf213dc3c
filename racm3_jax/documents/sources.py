"""The training and held-out documents of a corpus, split by groups.

source     "folder:photos", or "2*folder:own + webdataset:more/*.tar": documents of
           the first are seen twice per epoch
group_key  the metadata key of the group ("the same thing"); without it every document
is
           its own group
holdout    "0.1"               this fraction of the groups, chosen by hashed name
           "split=val,test"    documents with one of these metadata values
           "panda,violin"      these groups, or a .txt file of them, one per line
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from racm3_jax.documents.readers import parse_source, read_documents
from racm3_jax.types import Document
from racm3_jax.worlds import World

# Metadata keys that a corpus writes into its documents.
SPLIT_KEY, TIMES_KEY = "split", "times"
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?)\*(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, with their split in `metadata["split"]`.

    Attributes:
      group_key: metadata key of the group; "" if there is none.
      train: reads the training documents.
      heldout: reads the evaluation documents, of groups that no training sees.
      shown: reads the documents of held-out groups that a memory may contain.
      times: all values of how often a document is seen per epoch.
    """

    group_key: str
    train: Callable[[], Iterator[Document]]
    heldout: Callable[[], Iterator[Document]]
    shown: Callable[[], Iterator[Document]]
    times: tuple[float, ...] = (1.0,)

    def group(self, document: Document) -> str:
        """The name of the document's group."""
        return _group(document, self.group_key)


def world_corpus(world: World, settings: Any) -> Corpus:
    """A world: other documents of its held-out groups may be in the memory.

    Args:
      world: it.
      settings: of its class `world.settings`.
    """
    return Corpus(
        world.group_key,
        functools.partial(world.read, settings, "train"),
        functools.partial(world.read, world.measured(settings), "heldout_test"),
        functools.partial(world.read, settings, "heldout_memory"),
    )


def source_corpus(source: str, group_key: str = "", holdout: str = "") -> Corpus:
    """A corpus of files; see the module's docstring for the three settings.

    Raises:
      ValueError: an invalid setting.
      FileNotFoundError: `holdout` names a missing file.
    """
    weighted = parse_sources(source)
    is_held_out = _read_holdout(holdout)

    def read(held_out: bool) -> Iterator[Document]:
        for place, times in weighted:
            for document in read_documents(place):
                name = _group(document, group_key)
                if is_held_out(name, document) != held_out:
                    continue
                facts = {SPLIT_KEY: "heldout" if held_out else "train"}
                if times != 1:
                    facts[TIMES_KEY] = str(times)
                metadata = {**document.metadata, **facts}
                yield dataclasses.replace(document, metadata=metadata)

    return Corpus(
        group_key,
        functools.partial(read, False),
        functools.partial(read, True),
        functools.partial(read, True),
        tuple(sorted({times for _, times in weighted})),
    )


def parse_sources(source: str) -> list[tuple[str, float]]:
    """`"2*folder:a + folder:b"` -> `[("folder:a", 2.0), ("folder:b", 1.0)]`.

    Raises:
      ValueError: an unknown kind, no path, or a weight of 0.
    """
    found = []
    for part in source.split(" + "):
        weighted = _WEIGHTED.fullmatch(part.strip())
        place, times = part.strip(), 1.0
        if weighted is not None:
            place, times = weighted[2].strip(), float(weighted[1])
        if not times:
            raise ValueError(f"the source {part.strip()!r} has weight 0: remove it")
        parse_source(place)
        found.append((place, times))
    return found


def _group(document: Document, key: str) -> str:
    name = document.metadata.get(key)
    return document.id if name is None or name == "" else str(name)


def _read_holdout(holdout: str) -> Callable[[str, Document], bool]:
    """(name of the group, document) -> whether it is held out."""
    holdout = holdout.strip()
    if not holdout:
        return lambda name, document: False
    try:
        share = float(holdout)
    except ValueError:
        pass
    else:
        if not 0 <= share < 1:
            raise ValueError(
                f"config.holdout is {holdout}; a fraction must be in 0..1, e.g. 0.1"
            )
        return lambda name, document: _place(name) < share
    key, equals, values = holdout.partition("=")
    if equals:
        wanted = {value.strip() for value in values.split(",")}
        return lambda name, document: str(document.metadata.get(key)) in wanted
    if holdout.endswith(".txt"):
        lines = Path(holdout).expanduser().read_text(encoding="utf-8").splitlines()
    else:
        lines = holdout.split(",")
    names = {line.strip() for line in lines if line.strip()}
    return lambda name, document: name in names


def _place(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def repeat_rows(
    times: Float[np.ndarray, " rows"], seed: int
) -> Int64[np.ndarray, " seen"]:
    """Repeats every row as often as it is seen per epoch; 1.5 is once or twice."""
    chance = np.random.default_rng([seed, len(times)]).random(len(times))
    counts = np.floor(times + chance).astype(np.int64)
    return np.repeat(np.arange(len(times)), counts)
