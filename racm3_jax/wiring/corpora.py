"""The corpus of a config, and its documents as training data of the encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from racm3_jax.documents.augmentation import AugmentationConfig
from racm3_jax.documents.images import resize_image
from racm3_jax.documents.sources import (
    TIMES_KEY,
    Corpus,
    repeat_rows,
    source_corpus,
    world_corpus,
)
from racm3_jax.types import Document
from racm3_jax.wiring.sections import MemoryConfig, choose_world, construct


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Documents with a text and an image each.

    Attributes:
      texts: all of a document's text.
      images: its first image, resized.
      groups: equal numbers for documents of the same group.
      names: values of the metadata key that `read_pairs` was given; "" without one.
    """

    texts: list[str]
    images: UInt8[np.ndarray, "pairs size size 3"]
    groups: Int64[np.ndarray, " pairs"]
    names: list[str]


def build_world(config: Any) -> Any:
    """The settings of the config's world, see `choose_world`."""
    return construct(choose_world(config).settings, config.world, "world")


def build_corpus(config: Any) -> Corpus:
    """The training corpus: a world, or the documents of `config.source`.

    Raises:
      ValueError: the config has neither, or it cannot be read.
    """
    if config.get("world") is not None:
        return world_corpus(choose_world(config), build_world(config))
    source = config.get("source", "")
    if not source:
        raise ValueError(
            "config.source is empty: give the training documents, e.g. "
            "--config.source=folder:photos"
        )
    return source_corpus(source, config.get("group_key", ""), config.get("holdout", ""))


def build_augmentation(config: Any) -> AugmentationConfig:
    return construct(AugmentationConfig, config.get("augmentation", {}), "augmentation")


def read_memory_documents(config: Any) -> Iterator[Document]:
    """Documents of a memory: training documents, and held-out groups if configured."""
    corpus = build_corpus(config)
    if construct(MemoryConfig, config.memory, "memory").include_heldout:
        yield from corpus.shown()
    yield from corpus.train()


def read_images(
    corpus: Corpus, size: int, seed: int
) -> UInt8[np.ndarray, "images size size 3"]:
    """All training images, repeated as often as seen per epoch.

    Raises:
      ValueError: there are none.
    """
    images, times = [], []
    for document in _shown(corpus.train(), "read images"):
        for image in document.images:
            images.append(resize_image(image, size))
            times.append(_times(document))
    if not images:
        raise ValueError(
            "no images are left for training: config.source has none, or "
            "config.holdout holds out all of them"
        )
    return _repeat(np.stack(images), np.array(times), corpus, seed)


def read_pairs(corpus: Corpus, size: int, seed: int, name_key: str = "") -> Pairs:
    """All documents with a text and an image, repeated as often as seen per epoch.

    Raises:
      ValueError: there are none, or no text has the name that it has by `name_key`.
    """
    texts, images, groups, names, times = [], [], [], [], []
    for document in _shown(corpus.train(), "read documents"):
        if document.text.strip() and document.images:
            texts.append(document.text)
            images.append(resize_image(document.images[0], size))
            groups.append(corpus.group(document))
            names.append(str(document.metadata.get(name_key, "")))
            times.append(_times(document))
    if not texts:
        raise ValueError(
            "no documents with a text and an image are left for training: "
            "config.source has none, or config.holdout holds out all of them"
        )
    if name_key and not any(n and n in t for n, t in zip(names, texts, strict=True)):
        raise ValueError(
            f"config.rename_key is {name_key!r}, but no training document's text has "
            "the value of this metadata key: choose another key, or set it to ''"
        )
    rows = np.arange(len(texts))
    rows = _repeat(rows, np.array(times), corpus, seed)
    # Numbered by first appearance; a repeated copy is its own group.
    copies = np.arange(len(rows)) - np.searchsorted(rows, rows)
    numbers: dict[tuple[str, int], int] = {}
    keys = [(groups[row], int(copy)) for row, copy in zip(rows, copies, strict=True)]
    numbered = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    stacked = np.stack(images)
    if len(rows) != len(texts):
        texts, names = [texts[row] for row in rows], [names[row] for row in rows]
        stacked = stacked[rows]
    return Pairs(texts, stacked, numbered, names)


def read_heldout(
    corpus: Corpus, limit: int, *, one_per_group: bool = False
) -> list[Document]:
    """The first held-out documents with a text and an image.

    Args:
      corpus: the corpus.
      limit: maximum number.
      one_per_group: only the first of each group.
    """
    found: list[Document] = []
    groups: set[str] = set()
    for document in corpus.heldout():
        if len(found) == limit:
            break
        name = corpus.group(document)
        if not (document.text.strip() and document.images):
            continue
        if one_per_group and name in groups:
            continue
        groups.add(name)
        found.append(document)
    return found


def _shown(documents: Iterable[Document], what: str) -> Iterator[Document]:
    """Shows a progress bar if it takes long."""
    return iter(tqdm(documents, desc=what, unit="document", delay=5.0))


def _times(document: Document) -> float:
    return float(document.metadata.get(TIMES_KEY, 1))


def _repeat(
    rows: np.ndarray, times: np.ndarray, corpus: Corpus, seed: int
) -> np.ndarray:
    return rows if corpus.times == (1.0,) else rows[repeat_rows(times, seed)]
