"""Settings of the input pipeline."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from racm3_jax.limits import check_choices, check_range
from racm3_jax.sequences.causal_masking import SegmentOrder

QueryModality = Literal["text", "image", "both"]
DocumentOrder = Literal["relevance", "shuffled"]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of the input pipeline.

    Attributes:
      rows: rows of a batch.
      row_length: positions of a row.
      examples_per_batch: mean number of main documents per step. What does not fit
        waits for the next step of its window; too many are dropped at a window's end,
        too few leave padding. `stats["fill"]` and `stats["dropped"]` show which.
      max_documents: K ~ Uniform{min_documents..max_documents} documents are retrieved.
      min_documents: 0 as in the paper, so that the model also learns without retrieval.
      alpha: loss weight of retrieved documents.
      query_modality: which modality of the main document is the query; "both" samples
        one. A document without that modality is queried by the other one.
      num_query_variants: number of queries with dropout in the memory, one of which is
        sampled; 0 takes the query without dropout. They are embedded once, when the
        memory is built, so that the pipeline needs no accelerator: a document has these
        few queries in all epochs, while the paper drops other tokens each time.
      document_order: "relevance", the best one next to the first `<eod>`, or "shuffled".
      distractor_probability: fraction of the examples with two or more documents whose
        last one is replaced by a document of another example (see `distractors`).
      seed: of order, masks, K and queries; 0..2^32-1.
      prefetch: number of batches made ahead; 0 makes each on demand.
      threads: number of threads of the pipeline.
      retrieval: False for the baseline without retrieval: K is 0, all else is equal.
      groups: parts of a step that are filled independently, `rows / groups` rows each.
        A host makes the groups of its rows: with more hosts than groups, several hosts
        make the same ones. The batches depend on this number, not on the hosts.
      window_steps: steps over which a group's examples are distributed (see
        `pipeline`). A resumed run makes the earlier steps of its window again.
      max_trim: image tokens of retrieved documents that the examples of a row may lose,
        so that one more fits (see `packing.pack`).
      max_examples: per row; 0: as many as fit. A training uses the model's bound,
        `model.max_segments` minus one segment for the padding.
      max_position_offset: examples start at a position of 0 to this; see `positions`.
      max_position_gap: maximum number of positions skipped after a retrieved document.
      segment_order: "stored" shows retrieved documents as they are in the memory;
        "as_main" with their images first where the main document's caption is asked for
        (see `causal_masking.build_example`). A model trained so is asked for captions
        in this order, too (see `generation.captioning`).
      max_skipped_share: maximum fraction of the main documents of a step that cannot be
        used; more is an error.
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
    segment_order: SegmentOrder = "stored"

    def __post_init__(self) -> None:
        sizes = ("rows", "row_length", "examples_per_batch")
        counts = ("threads", "groups", "window_steps")
        check_range(self, "pipeline", *sizes, *counts, low=1)
        bounds = ("max_documents", "min_documents", "max_trim", "max_examples")
        steps = ("max_position_offset", "max_position_gap")
        rest = ("num_query_variants", "prefetch")
        check_range(self, "pipeline", *bounds, *steps, *rest, low=0)
        if self.min_documents > self.max_documents:
            raise ValueError(
                f"pipeline.min_documents={self.min_documents} is more than "
                f"pipeline.max_documents={self.max_documents}"
            )
        check_choices(
            self,
            "pipeline",
            query_modality=get_args(QueryModality),
            document_order=get_args(DocumentOrder),
            segment_order=get_args(SegmentOrder),
        )
        check_range(self, "pipeline", "distractor_probability", low=0, high=1)
        if self.rows % self.groups:
            raise ValueError(
                f"pipeline.groups must divide pipeline.rows={self.rows}; got "
                f"{self.groups}"
            )
        if self.examples_per_batch < self.groups:
            raise ValueError(
                f"pipeline.groups={self.groups} is more than "
                f"pipeline.examples_per_batch={self.examples_per_batch}: every group "
                "needs an example per step"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"pipeline.seed must be in 0..2^32-1; got {self.seed}")

    def index_range(self, window: int, group: int) -> tuple[int, int]:
        """The global indices of a group's examples in a window, as a half-open range.

        They are split as evenly as possible:

            window_steps 2, examples_per_batch 5, groups 3

            window 0    0 1 2 | 3 4 5 | 6 7 8 9
            window 1    10 11 12 | 13 14 15 | 16 17 18 19
        """
        num = self.window_steps * self.examples_per_batch
        first, last = (num * g // self.groups for g in (group, group + 1))
        return window * num + first, window * num + last

    def last_position(self, num_documents: int) -> int:
        """The largest position of an example with this many retrieved documents."""
        most = self.row_length - 1 + self.max_position_offset
        return most + self.max_position_gap * num_documents
