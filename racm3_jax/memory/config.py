"""Settings of a memory build."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from racm3_jax.documents.readers import ReadReport, read_documents
from racm3_jax.index import registry
from racm3_jax.index.contract import IndexKind
from racm3_jax.memory import filters
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder
from racm3_jax.memory.parts import ChunkBuilder

Deduplicate = Literal["none", "exact", "near"]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Settings of a memory build.

    Attributes:
      index: kind of index; "auto" depends on the size and `max_ram_gb`.
      num_query_variants: queries with dropout per document, for a training; each embeds
        text and image once more.
      query_drop: fraction of a query that is dropped.
      seed: of the dropout.
      max_bad: fraction of bad records above which the build stops.
      recall_target: recall@10 to which the index is tuned, for text and for image
        queries.
      max_ram_gb: RAM limit of the index build, which is sharded to fit; 0: no limit.
      deduplicate: drop documents with equal text and pixels ("exact"), also those with
        near-duplicate images ("near"), or "none".
      opt_out: file of ids and URL patterns that must not be used.
      held_out: sources of evaluation documents.
      max_nsfw: maximum NSFW score; None turns the filter off.
      max_watermark: maximum watermark score.
    """

    index: IndexKind | Literal["auto"] = "auto"
    num_query_variants: int = 0
    query_drop: float = 0.2
    seed: int = 0
    max_bad: float = 0.1
    recall_target: float = 0.95
    max_ram_gb: float = 0.0
    deduplicate: Deduplicate = "exact"
    opt_out: str = ""
    held_out: tuple[str, ...] = ()
    max_nsfw: float | None = None
    max_watermark: float | None = None

    def __post_init__(self) -> None:
        registry.choose_kind(self.index, 1)
        ReadReport(self.max_bad)
        if self.deduplicate not in get_args(Deduplicate):
            raise ValueError(
                f'deduplicate must be "none", "exact" or "near"; got '
                f"{self.deduplicate!r}"
            )
        if not 0 < self.recall_target <= 1:
            raise ValueError(
                f"recall_target must be in (0, 1]; got {self.recall_target}"
            )
        if not 0 <= self.query_drop < 1:
            raise ValueError(f"query_drop must be in [0, 1); got {self.query_drop}")
        if self.num_query_variants < 0 or self.max_ram_gb < 0:
            raise ValueError("num_query_variants and max_ram_gb must be >= 0")


def make_chunk_builder(
    config: CorpusConfig, tokenizer: DocumentTokenizer, embedder: Embedder | str
) -> ChunkBuilder:
    """The models and filters of a build."""
    held_out = None
    if config.held_out:
        held_out = filters.HeldOut()
        for source in config.held_out:
            for document in read_documents(source, max_bad=config.max_bad):
                held_out.add(document)
    return ChunkBuilder(
        tokenizer,
        embedder,
        config.num_query_variants,
        config.query_drop,
        config.seed,
        filters.OptOut.read(config.opt_out) if config.opt_out else None,
        held_out,
        filters.ScoreLimits(config.max_nsfw, config.max_watermark),
    )


def encoder_name(embedder: Embedder | str) -> str:
    """The fingerprint of the encoder."""
    return embedder if isinstance(embedder, str) else embedder.fingerprint()
