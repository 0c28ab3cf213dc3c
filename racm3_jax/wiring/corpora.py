"""The corpus of a config, and its documents in the form that encoders are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from racm3_jax.documents.augmentation import AugmentationConfig
from racm3_jax.documents.flagworld import FlagworldConfig
from racm3_jax.documents.images import resize_image
from racm3_jax.documents.sources import (
    TIMES_KEY,
    Corpus,
    flagworld_corpus,
    repeat_rows,
    source_corpus,
)
from racm3_jax.types import Document
from racm3_jax.wiring.sections import MemoryConfig, construct


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Documents that have a text and an image each.

    Attributes:
      texts: all of a document's text.
      images: its first image, of one size.
      groups: equal numbers for documents of one group.
    """

    texts: list[str]
    images: UInt8[np.ndarray, "pairs size size 3"]
    groups: Int64[np.ndarray, " pairs"]


def build_world(config: Any) -> FlagworldConfig:
    return construct(FlagworldConfig, config.world, "world")


def build_corpus(config: Any) -> Corpus:
    """What the config trains on: a flagworld, or the documents of `config.source`.

    Raises:
      ValueError: it names neither, or one that cannot be read.
    """
    if config.get("world") is not None:
        return flagworld_corpus(build_world(config))
    source = config.get("source", "")
    if not source:
        raise ValueError(
            "config.source is empty: say what to train on, as "
            "--config.source=folder:photos"
        )
    return source_corpus(source, config.get("group_key", ""), config.get("holdout", ""))


def build_augmentation(config: Any) -> AugmentationConfig:
    return construct(AugmentationConfig, config.get("augmentation", {}), "augmentation")


def read_memory_documents(config: Any) -> Iterator[Document]:
    """What a memory holds: the training documents, and held-out groups if wanted."""
    corpus = build_corpus(config)
    if construct(MemoryConfig, config.memory, "memory").include_heldout:
        yield from corpus.shown()
    yield from corpus.train()


def read_images(
    corpus: Corpus, size: int, seed: int
) -> UInt8[np.ndarray, "images size size 3"]:
    """All images that are trained on, each as often as an epoch shows it.

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
            "no images are left to train on: config.source holds none, or config.holdout "
            "keeps all of them"
        )
    return _repeat(np.stack(images), np.array(times), corpus, seed)


def read_pairs(corpus: Corpus, size: int, seed: int) -> Pairs:
    """All documents with a text and an image, each as often as an epoch shows it.

    Raises:
      ValueError: there are none.
    """
    texts, images, names, times = [], [], [], []
    for document in _shown(corpus.train(), "read documents"):
        if document.text.strip() and document.images:
            texts.append(document.text)
            images.append(resize_image(document.images[0], size))
            names.append(corpus.group(document))
            times.append(_times(document))
    if not texts:
        raise ValueError(
            "no documents with a text and an image are left to train on: config.source "
            "holds none, or config.holdout keeps all of them"
        )
    rows = np.arange(len(texts))
    rows = _repeat(rows, np.array(times), corpus, seed)
    # Numbers in the order of first appearance; a copy is a group of its own.
    copies = np.arange(len(rows)) - np.searchsorted(rows, rows)
    numbers: dict[tuple[str, int], int] = {}
    keys = [(names[row], int(copy)) for row, copy in zip(rows, copies, strict=True)]
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    stacked = np.stack(images)
    if len(rows) != len(texts):
        texts, stacked = [texts[row] for row in rows], stacked[rows]
    return Pairs(texts, stacked, groups)


def read_heldout(
    corpus: Corpus, limit: int, *, one_a_group: bool = False
) -> list[Document]:
    """The first held-out documents that have a text and an image.

    Args:
      corpus: whose.
      limit: how many.
      one_a_group: only the first of each group.
    """
    found: list[Document] = []
    groups: set[str] = set()
    for document in corpus.heldout():
        if len(found) == limit:
            break
        name = corpus.group(document)
        if not (document.text.strip() and document.images):
            continue
        if one_a_group and name in groups:
            continue
        groups.add(name)
        found.append(document)
    return found


def _shown(documents: Iterable[Document], what: str) -> Iterator[Document]:
    """With a bar that appears when it takes long."""
    return iter(tqdm(documents, desc=what, unit="document", delay=5.0))


def _times(document: Document) -> float:
    return float(document.metadata.get(TIMES_KEY, 1))


def _repeat(
    rows: np.ndarray, times: np.ndarray, corpus: Corpus, seed: int
) -> np.ndarray:
    return rows if corpus.times == (1.0,) else rows[repeat_rows(times, seed)]
