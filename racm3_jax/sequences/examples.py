"""From main documents to masked sequences: retrieve, mix, make episodes, mask.

Every example depends only on the seed and its global index (with distractors, also on
the other examples of its search), not on the process or time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64

from racm3_jax.sequences.causal_masking import (
    CausalMaskingConfig,
    ExampleTooLong,
    build_example,
)
from racm3_jax.sequences.distractors import mix_documents
from racm3_jax.sequences.episodes import Episode, Episodes
from racm3_jax.sequences.pairing import Pairing
from racm3_jax.sequences.pipeline_config import PipelineConfig, QueryModality
from racm3_jax.sequences.variants import Variants
from racm3_jax.types import Example, Modality, Retrieved, TokenizedDocument
from racm3_jax.vocab import Vocab

# Names of the random streams; changing one changes every batch.
MASKING, RETRIEVAL, EPISODES, DISTRACTORS, PAIRING, RENAMING, POSITIONS = range(7)
AUGMENTATION = 7


class DocumentStore(Protocol):
    """The memory interface of the pipeline; called from several threads."""

    def documents(self, ids: Int64[np.ndarray, " n"]) -> Sequence[TokenizedDocument]:
        """The documents of these rows, in order."""
        ...

    def queries(
        self, ids: Int64[np.ndarray, " n"], modality: Modality, variant: int
    ) -> Float32[np.ndarray, "n d_embed"]:
        """Their text or image embeddings as queries; variant 0 is without dropout."""
        ...


class DocumentRetriever(Protocol):
    """The retriever interface of the pipeline; called from several threads."""

    def retrieve(
        self,
        queries: Float32[np.ndarray, "n d_embed"],
        nums: Int64[np.ndarray, " n"],
        mains: Sequence[TokenizedDocument | None],
    ) -> Sequence[Retrieved]:
        """At most `nums[i]` documents for query i, none of them `mains[i]`."""
        ...


class ExampleMaker:
    """Makes examples; thread-safe.

    Args:
      memory: documents and queries.
      retriever: may be None if nothing is retrieved.
      vocab: of the documents' tokens.
      masking: the CM3 objective.
      config: retrieval, sizes, seed.
      episodes: see `pipeline.make_batches`.
      pairing: see there.
      variants: see there.
    """

    def __init__(
        self,
        memory: DocumentStore,
        retriever: DocumentRetriever | None,
        vocab: Vocab,
        masking: CausalMaskingConfig,
        config: PipelineConfig,
        episodes: Episodes | None = None,
        pairing: Pairing | None = None,
        variants: Variants | None = None,
    ) -> None:
        self._memory = memory
        self._retriever = retriever
        self._vocab = vocab
        self._masking = masking
        self._config = config
        self._episodes = episodes
        self._pairing = pairing
        self._variants = variants
        # The answer of an episode is already at its end.
        self._episode_masking = dataclasses.replace(
            masking, num_masks="none", rotation_probability=0.0
        )

    def make(
        self, ids: Int64[np.ndarray, " n"], first: int
    ) -> tuple[list[Example], dict[str, float]]:
        """The examples of these main documents.

        Args:
          ids: rows of the memory.
          first: global index of the first one; the others follow.

        Returns:
          Examples, without those whose moved spans are longer than a row; and counts of
          these ("skipped"), of "retrieved" documents, "episodes", and search
          statistics.

        Raises:
          ValueError: too many examples are too long.
        """
        config = self._config
        mains = list(self._memory.documents(ids))
        paired = self._pair(ids, first)
        retrieved, ranks, found = self._retrieve(ids, mains, first, paired)
        self._show_pairs(paired, mains, retrieved, ranks, first)
        episodes = self._make_episodes(ids, mains, retrieved, ranks, first)
        self._change_images(mains, retrieved, first)
        examples: list[Example] = []
        num_skipped = 0
        for i, (main, documents) in enumerate(zip(mains, retrieved, strict=True)):
            try:
                example = build_example(
                    main,
                    documents,
                    self._episode_masking if i in episodes else self._masking,
                    self._vocab,
                    alpha=config.alpha,
                    max_length=config.row_length + 1,
                    rng=np.random.default_rng([config.seed, MASKING, first + i]),
                    ranks=ranks[i],
                    segment_order=config.segment_order,
                )
            except ExampleTooLong as error:
                num_skipped += 1
                if num_skipped > config.max_skipped_share * len(mains):
                    raise ValueError(
                        f"more than {config.max_skipped_share:.0%} of the {len(mains)} "
                        f"main documents cannot be used; the last error: {error}"
                    ) from error
                continue
            if i in episodes and self._episodes is not None:
                example = self._episodes.reweight(example, self._vocab)
            elif self._pairing is not None:
                example = self._pairing.reweight(example, main, self._vocab)
            examples.append(example)
        stats = {
            "skipped": float(num_skipped),
            "retrieved": float(sum(len(documents) for documents in retrieved)),
            "episodes": float(len(episodes)),
            **found,
        }
        return examples, stats

    def _change_images(
        self,
        mains: list[TokenizedDocument],
        retrieved: list[tuple[TokenizedDocument, ...]],
        first: int,
    ) -> None:
        """Applies one augmentation to all images of an example, in place."""
        if self._variants is None:
            return
        for i, main in enumerate(mains):
            rng = np.random.default_rng([self._config.seed, AUGMENTATION, first + i])
            number = self._variants.sample(rng)
            mains[i] = self._variants.change(main, number)
            retrieved[i] = tuple(
                self._variants.change(document, number) for document in retrieved[i]
            )

    def _pair(
        self, ids: Int64[np.ndarray, " n"], first: int
    ) -> dict[int, Int64[np.ndarray, " documents"]]:
        """Which examples get documents by class, and their rows."""
        paired: dict[int, Int64[np.ndarray, " documents"]] = {}
        if self._pairing is None:
            return paired
        for i, row in enumerate(ids.tolist()):
            rng = np.random.default_rng([self._config.seed, PAIRING, first + i])
            rows = self._pairing.sample(row, rng)
            if rows is not None:
                paired[i] = rows if self._config.retrieval else rows[:0]
        return paired

    def _show_pairs(
        self,
        paired: dict[int, Int64[np.ndarray, " documents"]],
        mains: list[TokenizedDocument],
        retrieved: list[tuple[TokenizedDocument, ...]],
        ranks: list[tuple[int, ...]],
        first: int,
    ) -> None:
        """Inserts the paired documents, with their classes renamed."""
        if self._pairing is None:
            return
        shown: dict[int, tuple[TokenizedDocument, ...]] = {}
        if paired:
            found = iter(self._memory.documents(np.concatenate([*paired.values()])))
            shown = {i: tuple(next(found) for _ in rows) for i, rows in paired.items()}
        for i, main in enumerate(mains):
            rng = np.random.default_rng([self._config.seed, RENAMING, first + i])
            if i in shown:
                ranks[i] = tuple(range(len(shown[i])))
            documents = shown.get(i, retrieved[i])
            mains[i], retrieved[i] = self._pairing.rename(main, documents, rng)

    def _make_episodes(
        self,
        ids: Int64[np.ndarray, " n"],
        mains: list[TokenizedDocument],
        retrieved: list[tuple[TokenizedDocument, ...]],
        ranks: list[tuple[int, ...]],
        first: int,
    ) -> dict[int, Episode]:
        """Turns some examples into episodes, in place; returns which."""
        if self._episodes is None:
            return {}
        episodes: dict[int, Episode] = {}
        for i, row in enumerate(ids.tolist()):
            rng = np.random.default_rng([self._config.seed, EPISODES, first + i])
            episode = self._episodes.sample(row, rng)
            if episode is not None and "image" in mains[i].modalities:
                episodes[i] = episode
        if not episodes:
            return episodes
        rows = np.concatenate([episode.rows for episode in episodes.values()])
        shown = iter(self._memory.documents(rows))
        for i, episode in episodes.items():
            retrieved[i] = tuple(
                self._episodes.label(next(shown), int(label), episode.label_first)
                for label in episode.labels
            )
            ranks[i] = tuple(range(len(retrieved[i])))
            mains[i] = self._episodes.label(
                mains[i], episode.answer, episode.label_first
            )
        return episodes

    def _retrieve(
        self,
        ids: Int64[np.ndarray, " n"],
        mains: Sequence[TokenizedDocument],
        first: int,
        paired: Collection[int] = (),
    ) -> tuple[
        list[tuple[TokenizedDocument, ...]], list[tuple[int, ...]], dict[str, float]
    ]:
        """Documents of each example and their ranks, by one search; its statistics."""
        config = self._config
        found: list[tuple[TokenizedDocument, ...]] = [()] * len(mains)
        ranks: list[tuple[int, ...]] = [()] * len(mains)
        if not config.retrieval or self._retriever is None:
            return found, ranks, {}
        nums = np.zeros(len(mains), np.int64)
        parts: list[tuple[Modality, int]] = []
        for i, main in enumerate(mains):
            rng = np.random.default_rng([config.seed, RETRIEVAL, first + i])
            nums[i] = rng.integers(config.min_documents, config.max_documents + 1)
            modality = _query_modality(main, config.query_modality, rng)
            variant = 0
            if config.num_query_variants:
                variant = 1 + int(rng.integers(config.num_query_variants))
            parts.append((modality, variant))
        nums[list(paired)] = 0
        wanted = np.flatnonzero(nums).tolist()
        if not wanted:
            return found, ranks, _describe([], nums)
        queries = self._queries(ids[wanted], [parts[i] for i in wanted])
        results = self._retriever.retrieve(
            queries, nums[wanted], [mains[i] for i in wanted]
        )
        for i, result in zip(wanted, results, strict=True):
            found[i] = tuple(result.documents)
        rngs = (
            np.random.default_rng([config.seed, DISTRACTORS, first + i])
            for i in range(len(mains))
        )
        found, ranks = mix_documents(found, mains, config, rngs)
        return found, ranks, _describe(results, nums)

    def _queries(
        self, ids: Int64[np.ndarray, " n"], parts: Sequence[tuple[Modality, int]]
    ) -> Float32[np.ndarray, "n d_embed"]:
        """One query per document, read with one call per (modality, variant)."""
        groups: dict[tuple[Modality, int], list[int]] = {}
        for i, part in enumerate(parts):
            groups.setdefault(part, []).append(i)
        pieces = [
            self._memory.queries(ids[members], *part)
            for part, members in groups.items()
        ]
        queries = np.concatenate(pieces).astype(np.float32)
        order = np.concatenate(list(groups.values()))
        return queries[np.argsort(order)]


def _describe(
    results: Sequence[Retrieved], nums: Int64[np.ndarray, " n"]
) -> dict[str, float]:
    """Mean K, mean similarity, and the fraction of queries with too few results."""
    scores = [result.scores for result in results if len(result.documents)]
    wanted = nums[nums > 0]
    short = sum(
        len(result.documents) < num
        for result, num in zip(results, wanted, strict=False)
    )
    return {
        "mean_retrieved": float(sum(len(s) for s in scores) / max(1, len(nums))),
        "mean_similarity": float(np.concatenate(scores).mean()) if scores else 0.0,
        "share_starved": float(short / max(1, len(wanted))),
    }


def _query_modality(
    main: TokenizedDocument, wanted: QueryModality, rng: np.random.Generator
) -> Modality:
    sampled: Modality = "text" if rng.random() < 0.5 else "image"
    if wanted != "both":
        sampled = wanted
    if sampled in main.modalities:
        return sampled
    return "image" if sampled == "text" else "text"
