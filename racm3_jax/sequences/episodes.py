"""k-shot episodes: demonstrations with labels that mean nothing, in place of neighbours.

    <eod> image of A <break> dax <eod> image of B <break> wug <eod>
          another image of A <break> dax <eod>

    <eod> dax <break> image of A <eod> wug <break> image of B <eod>
          dax <break> another image of A <eod>

The labels of an episode stand either behind their images, so that the label has to be
told from the image, or in front, so that the image has to be drawn by the label.

The classes are those of the memory's documents; the labels are drawn anew for every
episode, so that only the demonstrations can tell them (RA-CM3, section 5.4). Captions
alone teach a model to copy names from documents that all show the same thing; episodes
teach it to look for the one that shows what is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from racm3_jax.types import TokenizedDocument, TokenizedSegment


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """How much of the training are episodes.

    Attributes:
      probability: share of the main documents that become the question of an episode.
      num_ways: labels of an episode, one demonstration each.
      class_key: the metadata that says what a document shows.
      num_labels: invented words that labels are drawn from.
      label_first: share of the episodes whose labels stand in front of their images.
    """

    probability: float = 0.0
    num_ways: int = 2
    class_key: str = "nation"
    num_labels: int = 2000
    label_first: float = 0.5

    def __post_init__(self) -> None:
        for name in ("probability", "label_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"episodes.{name} must be in 0..1; got {getattr(self, name)}"
                )
        if not 2 <= self.num_ways <= self.num_labels:
            raise ValueError(
                "episodes.num_ways must be in 2..num_labels; got "
                f"{self.num_ways} of {self.num_labels}"
            )


class Episode(NamedTuple):
    """One question.

    Attributes:
      rows: of the demonstrations, in the order in which they stand.
      labels: positions in the list of labels, one a demonstration.
      answer: position in the list of labels of the right one.
      label_first: whether labels stand in front of their images.
    """

    rows: Int64[np.ndarray, " ways"]
    labels: Int64[np.ndarray, " ways"]
    answer: int
    label_first: bool


class Episodes:
    """Draws episodes from a memory.

    Args:
      config: shares and sizes.
      classes: of every row of the memory that may be shown; -1 shows none.
      labels: their text ids.

    Raises:
      ValueError: too few classes or labels.
    """

    def __init__(
        self,
        config: EpisodeConfig,
        classes: Int64[np.ndarray, " rows"],
        labels: Sequence[Int32[np.ndarray, " length"]],
    ) -> None:
        self.config = config
        self._classes = np.asarray(classes, np.int64)
        self._labels = list(labels)
        order = np.argsort(self._classes, kind="stable")
        order = order[self._classes[order] >= 0]
        found, starts = np.unique(self._classes[order], return_index=True)
        if len(found) < config.num_ways or len(self._labels) < config.num_ways:
            raise ValueError(
                f"episodes of {config.num_ways} ways need as many classes and labels; "
                f"the memory has {len(found)} classes by {config.class_key!r}, and "
                f"there are {len(self._labels)} labels"
            )
        self._found = found
        self._members = dict(
            zip(found.tolist(), np.split(order, starts[1:]), strict=True)
        )

    def draw(self, row: int, rng: np.random.Generator) -> Episode | None:
        """An episode that asks about `row`; None where nothing else shows its class.

        Whether there is one at all is drawn first, with the configured probability.
        """
        if rng.random() >= self.config.probability or self._classes[row] < 0:
            return None
        own = int(self._classes[row])
        others = self._members[own]
        others = others[others != row]
        if not len(others):
            return None
        ways = self.config.num_ways
        strangers = rng.permutation(self._found[self._found != own])[: ways - 1]
        rows = [int(rng.choice(others))]
        rows += [int(rng.choice(self._members[int(c)])) for c in strangers]
        labels = rng.choice(len(self._labels), ways, replace=False)
        order = rng.permutation(ways)
        first = bool(rng.random() < self.config.label_first)
        return Episode(np.array(rows)[order], labels[order], int(labels[0]), first)

    def label(
        self, document: TokenizedDocument, label: int, first: bool
    ) -> TokenizedDocument:
        """The first image of a document, and the label's words in front or behind."""
        image = next(s for s in document.segments if s.modality == "image")
        words = TokenizedSegment("text", self._labels[label])
        segments = (words, image) if first else (image, words)
        return dataclasses.replace(document, segments=segments)
