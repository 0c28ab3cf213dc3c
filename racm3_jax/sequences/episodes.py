"""k-shot episodes: demonstrations with meaningless labels instead of neighbours.

    <eod> image of A <break> dax <eod> image of B <break> wug <eod>
          another image of A <break> dax <eod>

    <eod> dax <break> image of A <eod> wug <break> image of B <eod>
          dax <break> another image of A <eod>

The labels of an episode come either after their images (classification) or before them
(generation).

The classes are those of the memory's documents; the labels are sampled for every
episode, so that only the demonstrations define them (RA-CM3, section 5.4). Captions
alone teach a model to copy names from documents that all show the same thing; episodes
teach it to find the one that shows what is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from racm3_jax.limits import check_range
from racm3_jax.types import Example, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Which fraction of the training are episodes, and their form.

    Attributes:
      probability: fraction of the main documents that become queries of episodes.
      num_ways: labels per episode, one demonstration each.
      class_key: metadata key of a document's class; in a config, "" takes the world's.
      num_labels: number of invented words from which labels are sampled.
      label_first: fraction of the episodes whose labels come before their images.
      label_weight: factor of the answer's loss weight (a few tokens vs. a whole image).
    """

    probability: float = 0.0
    num_ways: int = 2
    class_key: str = ""
    num_labels: int = 2000
    label_first: float = 0.5
    label_weight: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "episodes", "probability", "label_first", low=0, high=1)
        if not 0 < self.label_weight < float("inf"):
            raise ValueError(
                f"episodes.label_weight must be above 0; got {self.label_weight}"
            )
        if not 2 <= self.num_ways <= self.num_labels:
            raise ValueError(
                "episodes.num_ways must be in 2..num_labels; got "
                f"{self.num_ways} of {self.num_labels}"
            )


class Episode(NamedTuple):
    """One episode.

    Attributes:
      rows: of the demonstrations, in sequence order.
      labels: indices into the list of labels, one per demonstration.
      answer: index of the correct label.
      label_first: whether labels come before their images.
    """

    rows: Int64[np.ndarray, " ways"]
    labels: Int64[np.ndarray, " ways"]
    answer: int
    label_first: bool


class Episodes:
    """Samples episodes from a memory.

    Args:
      config: fractions and sizes.
      classes: class of every row of the memory; -1 for rows that are not used.
      labels: their text tokens.

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

    def sample(self, row: int, rng: np.random.Generator) -> Episode | None:
        """Samples an episode about `row`; None if no other row has its class.

        First samples whether there is an episode, with the configured probability.
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
        """The first image of a document, with the label before or after it."""
        image = next(s for s in document.segments if s.modality == "image")
        words = TokenizedSegment("text", self._labels[label])
        segments = (words, image) if first else (image, words)
        return dataclasses.replace(document, segments=segments)

    def reweight(self, example: Example, vocab: Vocab) -> Example:
        """Multiplies the loss weights of an episode's answer by `label_weight`.

        tokens    ... i1 <break> dax <eod>
        weights   ... 1  1       5   1            label_weight 5
        """
        if self.config.label_weight == 1:
            return example
        is_answer = example.is_main & vocab.is_text(example.tokens)
        factor = np.where(is_answer, self.config.label_weight, 1)
        return example._replace(weights=(example.weights * factor).astype(np.float32))
