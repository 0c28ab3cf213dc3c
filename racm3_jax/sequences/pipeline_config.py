"""What a training batch is made of."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

QueryModality = Literal["text", "image", "both"]
DocumentOrder = Literal["relevance", "shuffled"]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What a batch is made of.

    Attributes:
      rows: rows of a batch.
      row_length: positions of a row.
      examples_per_batch: main documents of a step, in the mean. What does not fit waits
        for the next step of its window; too many are dropped at a window's end, too few
        leave padding. `stats["fill"]` and `stats["dropped"]` show which.
      max_documents: K ~ Uniform{min_documents..max_documents} documents are retrieved.
      min_documents: 0 as in the paper, so that the model learns to do without, too.
      alpha: loss weight of retrieved documents.
      query_modality: the part of the main document that is the query; "both" draws one.
        A document without that part is queried by the other one.
      num_query_variants: queries with dropout that the memory holds, numbered from 1, one
        of which is drawn; with 0 the query without dropout is taken. They are embedded
        once, when the memory is built, so that the pipeline needs no accelerator: a
        document's query has these few forms in all epochs, where the paper drops other
        tokens each time.
      document_order: "relevance", the best one next to the first `<eod>`, or "shuffled".
      distractor_probability: share of the examples with two or more documents whose last
        one is exchanged for a document of another example (see `distractors`).
      seed: of order, masks, K and queries; 0..2^32-1.
      prefetch: batches made ahead; 0 makes each when it is asked for.
      threads: that make them.
      retrieval: False for the twin: K is 0, all else is equal.
      groups: parts of a step that are filled on their own, each `rows / groups` rows. A
        host makes the groups that its rows are in: with more hosts than groups, several
        hosts make the same ones. The batches do not depend on the hosts, but on this.
      window_steps: steps over which a group's examples are planned together (see
        `pipeline`). A resumed run makes the steps before it in its window again.
      max_trim: image tokens of retrieved documents that the examples of a row may lose,
        so that one more fits (see `packing.pack`).
      max_examples: of one row; 0: as many as fit. A training gives the bound of its
        model, `model.max_segments` less the one segment that padding is.
      max_position_offset: examples begin at a position of 0 to so many; see `positions`.
      max_position_gap: positions skipped after each retrieved document, at most.
      image_first_probability: fraction of the examples whose retrieved documents have
        their images in front of their texts, so that a caption may be asked for in this
        order (`generation.captioning`).
      max_skipped_share: a step in which a larger share of the main documents cannot be
        used is an error.
    """

    rows: int
    row_length: int
    examples_per_batch: int
    max_documents: int = 2
    min_documents: int = 0
    alpha: float = 0.1
    query_modality: QueryModality = "both"
    num_query_variants: int = 4
    document_order: DocumentOrder = "relevance"
    distractor_probability: float = 0.0
    seed: int = 0
    prefetch: int = 4
    threads: int = 2
    retrieval: bool = True
    max_skipped_share: float = 0.5
    groups: int = 1
    window_steps: int = 8
    max_trim: int = 0
    max_examples: int = 0
    max_position_offset: int = 0
    max_position_gap: int = 0
    image_first_probability: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "rows": 1,
            "row_length": 1,
            "examples_per_batch": 1,
            "max_documents": 0,
            "min_documents": 0,
            "num_query_variants": 0,
            "max_trim": 0,
            "max_examples": 0,
            "max_position_offset": 0,
            "max_position_gap": 0,
            "prefetch": 0,
            "threads": 1,
            "groups": 1,
            "window_steps": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"pipeline.{name} must be >= {minimum}; got {getattr(self, name)}"
                )
        if self.min_documents > self.max_documents:
            raise ValueError(
                f"pipeline.min_documents={self.min_documents} is more than "
                f"pipeline.max_documents={self.max_documents}"
            )
        for name, allowed in (
            ("query_modality", QueryModality),
            ("document_order", DocumentOrder),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"pipeline.{name} is {getattr(self, name)!r}; allowed: "
                    + ", ".join(get_args(allowed))
                )
        if not 0 <= self.image_first_probability <= 1:
            raise ValueError(
                "pipeline.image_first_probability must be in 0..1; got "
                f"{self.image_first_probability}"
            )
        if not 0 <= self.distractor_probability <= 1:
            raise ValueError(
                "pipeline.distractor_probability must be in 0..1; got "
                f"{self.distractor_probability}"
            )
        if self.rows % self.groups:
            raise ValueError(
                f"pipeline.groups must divide pipeline.rows={self.rows}; got "
                f"{self.groups}"
            )
        if self.examples_per_batch < self.groups:
            raise ValueError(
                f"pipeline.groups={self.groups} is more than "
                f"pipeline.examples_per_batch={self.examples_per_batch}: every group "
                "needs an example a step"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"pipeline.seed must be in 0..2^32-1; got {self.seed}")

    def plan(self, window: int, group: int) -> tuple[int, int]:
        """The global indices of a group's examples in a window: first, and one past.

        They are split evenly, whatever divides them:

            window_steps 2, examples_per_batch 5, groups 3

            window 0    0 1 2 | 3 4 5 | 6 7 8 9
            window 1    10 11 12 | 13 14 15 | 16 17 18 19
        """
        num = self.window_steps * self.examples_per_batch
        first, last = (num * g // self.groups for g in (group, group + 1))
        return window * num + first, window * num + last

    def last_position(self, num_documents: int) -> int:
        """The largest position of an example with so many documents before it."""
        most = self.row_length - 1 + self.max_position_offset
        return most + self.max_position_gap * num_documents
