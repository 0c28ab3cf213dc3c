"""The input pipeline: memory and retriever in, packed batches out, in the background.

    step t
      -> global indices t*E .. t*E + E-1          E = examples_per_batch
      -> main documents                           shuffled anew each epoch, by seed
      -> K, query modality and variant of each    rng(seed, RETRIEVAL, global index)
      -> one batched search for all of them       threads; ScaNN releases the GIL
      -> masked sequences                         rng(seed, MASKING, global index)
      -> packed rows                              Batch

Step t is a pure function of (memory, main_ids, seed, t): to resume, give the step number.
Masking and retrieval draw from streams of their own, so that a twin without retrieval
sees the same main documents, masked alike, in the same order.

Grain runs it in threads of this process: worker processes would each load the index, and
their order depends on their number.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence
from typing import Protocol, Self

import grain
import numpy as np
from jaxtyping import Float32, Int64

from racm3_jax.sequences.causal_masking import (
    CausalMaskingConfig,
    ExampleTooLong,
    build_example,
)
from racm3_jax.sequences.distractors import mix_documents
from racm3_jax.sequences.episodes import Episode, Episodes
from racm3_jax.sequences.packing import pack
from racm3_jax.sequences.pairing import Pairing
from racm3_jax.sequences.pipeline_config import PipelineConfig, QueryModality
from racm3_jax.sequences.positions import shift_positions
from racm3_jax.types import Batch, Modality, Retrieved, TokenizedDocument
from racm3_jax.vocab import Vocab

# Names of the random streams; a change of any changes every batch.
MASKING, RETRIEVAL, EPISODES, DISTRACTORS, PAIRING, RENAMING, POSITIONS = range(7)

# Statistics of a step that are means over its groups; the others are sums.
_SHARES = ("fill", "mean_retrieved", "mean_similarity", "share_starved")


class DocumentStore(Protocol):
    """What the pipeline asks of a memory; calls come from several threads."""

    def documents(self, ids: Int64[np.ndarray, " n"]) -> Sequence[TokenizedDocument]:
        """The documents of these rows, in order."""
        ...

    def queries(
        self, ids: Int64[np.ndarray, " n"], modality: Modality, variant: int
    ) -> Float32[np.ndarray, "n d_embed"]:
        """Their text or image parts as queries; variant 0 is without query dropout."""
        ...


class DocumentRetriever(Protocol):
    """What the pipeline asks of a retriever; calls come from several threads."""

    def retrieve(
        self,
        queries: Float32[np.ndarray, "n d_embed"],
        nums: Int64[np.ndarray, " n"],
        mains: Sequence[TokenizedDocument | None],
    ) -> Sequence[Retrieved]:
        """At most `nums[i]` documents for query i, none of them `mains[i]`."""
        ...


class Batches:
    """Iterator of (batch, stats). Close it, or use it as a context manager.

    `close` returns once no thread uses the memory or the retriever any more.
    """

    def __init__(self, dataset: grain.MapDataset, steps: _Steps, prefetch: int) -> None:
        self._steps = steps
        options = grain.ReadOptions(
            num_threads=min(steps.config.threads, prefetch),
            prefetch_buffer_size=prefetch,
        )
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Batch, dict[str, float]]:
        if self._steps.closed:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        self._steps.close()
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_batches(
    memory: DocumentStore,
    retriever: DocumentRetriever | None,
    main_ids: Int64[np.ndarray, " n"],
    vocab: Vocab,
    masking: CausalMaskingConfig,
    config: PipelineConfig,
    *,
    start_step: int = 0,
    num_steps: int,
    host: int = 0,
    num_hosts: int = 1,
    episodes: Episodes | None = None,
    pairing: Pairing | None = None,
) -> Batches:
    """Batches of steps `start_step`, `start_step + 1`, ..., `num_steps` of them.

    Each comes with `stats`: "examples" packed, "dropped" (did not fit), "skipped" (moved
    spans longer than a row), "retrieved" documents given, "fill" (share of positions in
    use); with retrieval also "mean_retrieved" (K), "mean_similarity" of what was
    retrieved to its query, and "share_starved" of the queries that got fewer documents
    than were asked for.

    Args:
      memory: the documents, their queries.
      retriever: not needed (None) when nothing is retrieved.
      main_ids: rows of the memory that are main documents; the memory may hold more.
      vocab: that the documents were tokenised with.
      masking: the CM3 objective.
      config: sizes, retrieval, seed, threads.
      start_step: the first step; to resume, the number of steps taken.
      num_steps: how many steps follow.
      host: which part of every batch to make, from 0.
      num_hosts: into how many parts batches are split; divides `config.groups`.
      episodes: some main documents become questions about labelled demonstrations, if
        anything is retrieved at all.
      pairing: some main documents are given documents by class, not by search.

    Raises:
      ValueError: no main documents, no retriever though one is needed, or sizes below 0.
    """
    main_ids = np.asarray(main_ids, np.int64)
    if main_ids.ndim != 1 or not len(main_ids):
        raise ValueError(
            f"main_ids must be a list of at least one row; got {main_ids.shape}"
        )
    if start_step < 0 or num_steps < 0:
        raise ValueError(
            f"start_step and num_steps must be >= 0; got {start_step} and {num_steps}"
        )
    if config.retrieval and config.max_documents and retriever is None:
        raise ValueError(
            "pipeline.retrieval is on, but no retriever was given: give one, or set "
            "pipeline.retrieval=False"
        )
    if not 0 <= host < num_hosts or config.groups % num_hosts:
        raise ValueError(
            f"host {host} of {num_hosts}: the number of hosts must divide "
            f"pipeline.groups={config.groups}"
        )
    share = config.groups // num_hosts
    own = range(host * share, (host + 1) * share)
    if not config.retrieval:
        episodes = None
    steps = _Steps(memory, retriever, vocab, masking, config, own, episodes, pairing)
    last_step = start_step + num_steps
    # Not `repeat()` without a number: its length overflows in Grain at batches of 1.
    num_epochs = -(-last_step * config.examples_per_batch // len(main_ids))
    dataset = (
        grain.MapDataset.range(len(main_ids))
        .seed(config.seed)
        .shuffle()
        .repeat(max(1, num_epochs))  # shuffled anew in each
        .batch(config.examples_per_batch)
        .map(main_ids.__getitem__)
        # Before the slice, so that the index is the step whatever the start.
        .map_with_index(steps)
        .slice(slice(start_step, last_step))
    )
    return Batches(dataset, steps, config.prefetch)


class _Steps:
    """Step number and main ids -> (Batch, stats); called from Grain's threads."""

    def __init__(
        self,
        memory: DocumentStore,
        retriever: DocumentRetriever | None,
        vocab: Vocab,
        masking: CausalMaskingConfig,
        config: PipelineConfig,
        groups: range,
        episodes: Episodes | None,
        pairing: Pairing | None,
    ) -> None:
        self.groups = groups
        self.pairing = pairing
        self.memory = memory
        self.retriever = retriever
        self.vocab = vocab
        self.masking = masking
        self.config = config
        self.episodes = episodes
        # What is asked stands at the end already.
        self.asking = dataclasses.replace(
            masking, num_masks="none", rotation_probability=0.0
        )
        self.closed = False
        self._running = 0
        self._idle = threading.Condition()

    def __call__(
        self, step: int, ids: Int64[np.ndarray, " n"]
    ) -> tuple[Batch, dict[str, float]] | None:
        # Grain's `close` does not wait for its threads: refuse new work, count the old.
        with self._idle:
            if self.closed:
                return None
            self._running += 1
        try:
            return self._make(step, np.asarray(ids, np.int64))
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def close(self) -> None:
        with self._idle:
            self.closed = True
            self._idle.wait_for(lambda: self._running == 0)

    def _make(
        self, step: int, ids: Int64[np.ndarray, " n"]
    ) -> tuple[Batch, dict[str, float]]:
        """The groups of this host, one below the other."""
        size = self.config.examples_per_batch // self.config.groups
        parts, all_stats = [], []
        for group in self.groups:
            chosen = slice(group * size, (group + 1) * size)
            first = step * self.config.examples_per_batch + group * size
            batch, stats = self._make_group(step, ids[chosen], first)
            parts.append(batch)
            all_stats.append(stats)
        if len(parts) == 1:
            return parts[0], all_stats[0]
        batch = Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        sums = {name: sum(s[name] for s in all_stats) for name in all_stats[0]}
        means = {name: sums[name] / len(parts) for name in _SHARES if name in sums}
        return batch, sums | means

    def _make_group(
        self, step: int, ids: Int64[np.ndarray, " n"], first: int
    ) -> tuple[Batch, dict[str, float]]:
        config = self.config
        mains = list(self.memory.documents(ids))
        paired = self._pair(ids, first)
        retrieved, found = self._retrieve(ids, mains, first, paired)
        self._show_pairs(paired, mains, retrieved, first)
        asked = self._ask(ids, mains, retrieved, first)
        examples, num_skipped = [], 0
        for i, (main, documents) in enumerate(zip(mains, retrieved, strict=True)):
            try:
                example = build_example(
                    main,
                    documents,
                    self.asking if i in asked else self.masking,
                    self.vocab,
                    alpha=config.alpha,
                    max_length=config.row_length + 1,
                    rng=np.random.default_rng([config.seed, MASKING, first + i]),
                )
            except ExampleTooLong as error:
                num_skipped += 1
                if num_skipped > config.max_skipped_share * len(mains):
                    raise ValueError(
                        f"step {step}: more than {config.max_skipped_share:.0%} of the "
                        f"main documents cannot be used; the last one: {error}"
                    ) from error
                continue
            if i in asked and self.episodes is not None:
                example = self.episodes.weigh(example, self.vocab)
            elif self.pairing is not None:
                example = self.pairing.weigh(example, main)
            examples.append(example)
        batch, num_dropped = pack(
            examples,
            config.rows // config.groups,
            config.row_length,
            self.vocab.pad,
            max_trim=config.max_trim,
        )
        batch = shift_positions(
            batch,
            self.vocab.eod,
            max_offset=config.max_position_offset,
            max_gap=config.max_position_gap,
            rng=np.random.default_rng([config.seed, POSITIONS, first]),
        )
        stats = {
            "examples": float(len(examples) - num_dropped),
            "dropped": float(num_dropped),
            "skipped": float(num_skipped),
            "retrieved": float(sum(len(documents) for documents in retrieved)),
            "episodes": float(len(asked)),
            "fill": float((batch.segment_ids > 0).mean()),
            **found,
        }
        return batch, stats

    def _pair(
        self, ids: Int64[np.ndarray, " n"], first: int
    ) -> dict[int, Int64[np.ndarray, " documents"]]:
        """Which examples are given documents by class, and their rows."""
        paired: dict[int, Int64[np.ndarray, " documents"]] = {}
        if self.pairing is None:
            return paired
        for i, row in enumerate(ids.tolist()):
            rng = np.random.default_rng([self.config.seed, PAIRING, first + i])
            rows = self.pairing.sample(row, rng)
            if rows is not None:
                paired[i] = rows if self.config.retrieval else rows[:0]
        return paired

    def _show_pairs(
        self,
        paired: dict[int, Int64[np.ndarray, " documents"]],
        mains: list[TokenizedDocument],
        retrieved: list[tuple[TokenizedDocument, ...]],
        first: int,
    ) -> None:
        """Puts the documents of pairs in place, with the names of their classes new."""
        if self.pairing is None:
            return
        shown: dict[int, tuple[TokenizedDocument, ...]] = {}
        if paired:
            found = iter(self.memory.documents(np.concatenate([*paired.values()])))
            shown = {i: tuple(next(found) for _ in rows) for i, rows in paired.items()}
        for i, main in enumerate(mains):
            rng = np.random.default_rng([self.config.seed, RENAMING, first + i])
            documents = shown.get(i, retrieved[i])
            mains[i], retrieved[i] = self.pairing.rename(main, documents, rng)

    def _ask(
        self,
        ids: Int64[np.ndarray, " n"],
        mains: list[TokenizedDocument],
        retrieved: list[tuple[TokenizedDocument, ...]],
        first: int,
    ) -> dict[int, Episode]:
        """Turns some examples into episodes, in place; says which."""
        if self.episodes is None:
            return {}
        drawn: dict[int, Episode] = {}
        for i, row in enumerate(ids.tolist()):
            rng = np.random.default_rng([self.config.seed, EPISODES, first + i])
            episode = self.episodes.draw(row, rng)
            if episode is not None and "image" in mains[i].modalities:
                drawn[i] = episode
        if not drawn:
            return drawn
        rows = np.concatenate([episode.rows for episode in drawn.values()])
        shown = iter(self.memory.documents(rows))
        for i, episode in drawn.items():
            retrieved[i] = tuple(
                self.episodes.label(next(shown), int(label), episode.label_first)
                for label in episode.labels
            )
            mains[i] = self.episodes.label(
                mains[i], episode.answer, episode.label_first
            )
        return drawn

    def _retrieve(
        self,
        ids: Int64[np.ndarray, " n"],
        mains: Sequence[TokenizedDocument],
        first: int,
        paired: Collection[int] = (),
    ) -> tuple[list[tuple[TokenizedDocument, ...]], dict[str, float]]:
        """The documents of each example, by one search; and how the search went."""
        config = self.config
        found: list[tuple[TokenizedDocument, ...]] = [()] * len(mains)
        if not config.retrieval or self.retriever is None:
            return found, {}
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
        asking = np.flatnonzero(nums).tolist()
        if not asking:
            return found, _describe([], nums)
        queries = self._queries(ids[asking], [parts[i] for i in asking])
        results = self.retriever.retrieve(
            queries, nums[asking], [mains[i] for i in asking]
        )
        for i, result in zip(asking, results, strict=True):
            found[i] = tuple(result.documents)
        rngs = (
            np.random.default_rng([config.seed, DISTRACTORS, first + i])
            for i in range(len(mains))
        )
        found = mix_documents(found, mains, config, rngs)
        return found, _describe(results, nums)

    def _queries(
        self, ids: Int64[np.ndarray, " n"], parts: Sequence[tuple[Modality, int]]
    ) -> Float32[np.ndarray, "n d_embed"]:
        """One query a document, read with one call per (modality, variant)."""
        groups: dict[tuple[Modality, int], list[int]] = {}
        for i, part in enumerate(parts):
            groups.setdefault(part, []).append(i)
        pieces = [
            self.memory.queries(ids[members], *part) for part, members in groups.items()
        ]
        queries = np.concatenate(pieces).astype(np.float32)
        order = np.concatenate(list(groups.values()))
        return queries[np.argsort(order)]


def _describe(
    results: Sequence[Retrieved], nums: Int64[np.ndarray, " n"]
) -> dict[str, float]:
    """The mean K, the mean similarity, and the share of queries given too few."""
    scores = [result.scores for result in results if len(result.documents)]
    asked = nums[nums > 0]
    short = sum(
        len(result.documents) < num for result, num in zip(results, asked, strict=False)
    )
    return {
        "mean_retrieved": float(sum(len(s) for s in scores) / max(1, len(nums))),
        "mean_similarity": float(np.concatenate(scores).mean()) if scores else 0.0,
        "share_starved": float(short / max(1, len(asked))),
    }


def _query_modality(
    main: TokenizedDocument, wanted: QueryModality, rng: np.random.Generator
) -> Modality:
    drawn: Modality = "text" if rng.random() < 0.5 else "image"
    if wanted != "both":
        drawn = wanted
    if drawn in main.modalities:
        return drawn
    return "image" if drawn == "text" else "text"
