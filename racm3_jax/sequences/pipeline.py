"""The input pipeline: from memory and retriever to packed batches, in the background.

    window w = steps w*W .. w*W + W-1               W = window_steps
      -> its global indices, split over groups      `PipelineConfig.index_range`
      -> main documents                             shuffled in each epoch, by seed
      step by step, for each group of rows:
      -> K, query modality and variant of each      rng(seed, RETRIEVAL, global index)
      -> one batched search for all of them         threads; ScaNN releases the GIL
      -> masked sequences                           rng(seed, MASKING, global index)
      -> packed rows                               what does not fit goes first next time

One group's examples a b c ... over a window of three steps of two rows:

    step 0    takes a b c d    rows  a a b b b .    c c c d d d
    step 1    takes e f g      rows  e e e e f f    . . . . . .     g waits
    step 2    takes h i        rows  g g g g g .    h h h h h .     i is dropped

A step takes its fraction of the window's examples, but with the waiting ones at most an
eighth more than that: examples that will not fit are never retrieved. The rows of a
window are thus a function of (memory, main_ids, config, window), and so are those of a
step: to resume, give the step number; earlier steps of its window are made again.

Rows belong to shards of the batch, not to hosts: a host makes those that the sharding
assigns to it (`rows`), and they do not depend on the number of hosts.

Masking and retrieval use separate random streams, so that a baseline without retrieval
sees the same main documents with the same masks in the same order.

Grain runs it in threads of this process: worker processes would each load the index, and
their order would depend on their number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Self

import grain
import numpy as np
from jaxtyping import Int64

from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.episodes import Episodes
from racm3_jax.sequences.examples import (
    POSITIONS,
    DocumentRetriever,
    DocumentStore,
    ExampleMaker,
)
from racm3_jax.sequences.packing import pack
from racm3_jax.sequences.pairing import Pairing
from racm3_jax.sequences.pipeline_config import PipelineConfig
from racm3_jax.sequences.positions import shift_positions
from racm3_jax.sequences.variants import Variants
from racm3_jax.types import Batch, Example
from racm3_jax.vocab import Vocab

# Statistics of a step that are averaged over its groups; the others are summed.
_SHARES = ("fill", "mean_retrieved", "mean_similarity", "share_starved")
# A step processes its fraction of the examples, plus waiting ones up to this factor.
_MOST_WAITING = 1 / 8

Step = tuple[Batch, dict[str, float]]


class Batches:
    """Iterator of (batch, stats). Close it, or use it as a context manager.

    `close` returns when no thread uses the memory or the retriever any more.
    """

    def __init__(
        self, dataset: grain.MapDataset, windows: _Windows, config: PipelineConfig
    ) -> None:
        self._windows = windows
        ahead = -(-config.prefetch // config.window_steps)
        options = grain.ReadOptions(
            num_threads=min(config.threads, config.prefetch),
            prefetch_buffer_size=max(ahead, config.threads) if ahead else 0,
        )
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._made: Iterator[Step] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        while not self._windows.closed:
            step = next(self._made, None)
            if step is not None:
                return step
            self._made = iter(next(self._iterator))
        raise StopIteration

    def close(self) -> None:
        self._windows.close()
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
    rows: Sequence[int] | Int64[np.ndarray, " rows"] | None = None,
    episodes: Episodes | None = None,
    pairing: Pairing | None = None,
    variants: Variants | None = None,
) -> Batches:
    """Batches of steps `start_step`, `start_step + 1`, ..., `num_steps` of them.

    Each comes with `stats` of the groups that this host makes: "examples" packed,
    "waiting" for the next step, "dropped" (did not fit in their window, retrieved or
    not), "skipped" (moved spans longer than a row), "retrieved" documents, "fill"
    (fraction of used positions); with retrieval also "mean_retrieved" (K),
    "mean_similarity" of retrieved documents to their query, and "share_starved"
    (fraction of the queries that got fewer documents than requested).

    Args:
      memory: documents and queries.
      retriever: may be None if nothing is retrieved.
      main_ids: rows of the memory that are main documents; the memory may have more.
      vocab: of the documents' tokens.
      masking: the CM3 objective.
      config: sizes, retrieval, seed, threads.
      start_step: the first step; to resume, the number of steps taken.
      num_steps: number of steps.
      rows: which rows of every batch to make, in this order; all by default. A process
        of a training makes those of `sharding.local_rows`.
      episodes: turns some main documents into k-shot queries, if anything is retrieved.
      pairing: gives some main documents context documents by class, not by search.
      variants: augmented images; each example samples one augmentation for all of its
        images.

    Raises:
      ValueError: no main documents, a missing retriever, negative sizes, or rows that
        the batch does not have.
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
    own = _own_rows(rows, config)
    maker = ExampleMaker(
        memory,
        retriever,
        vocab,
        masking,
        config,
        episodes if config.retrieval else None,
        pairing,
        variants,
    )
    steps = range(start_step, start_step + num_steps)
    windows = _Windows(maker, _Order(main_ids, config.seed), config, own, steps, vocab)
    size = config.window_steps
    dataset = grain.MapDataset.range(
        start_step // size, -(-steps.stop // size) if num_steps else start_step // size
    ).map(windows)
    return Batches(dataset, windows, config)


def _own_rows(
    rows: Sequence[int] | Int64[np.ndarray, " rows"] | None, config: PipelineConfig
) -> Int64[np.ndarray, " rows"]:
    own = np.arange(config.rows) if rows is None else np.asarray(rows, np.int64)
    if own.ndim != 1 or not len(own) or own.min() < 0 or own.max() >= config.rows:
        raise ValueError(
            f"rows must be some of 0..{config.rows - 1} (pipeline.rows={config.rows}); "
            f"got {own.tolist()}"
        )
    return own


class _Order:
    """Maps global indices to main documents; shuffled in each epoch."""

    def __init__(self, main_ids: Int64[np.ndarray, " n"], seed: int) -> None:
        self._main_ids = main_ids
        # Endless: reading by index needs no `repeat`, whose length may overflow.
        self._shuffled = grain.MapDataset.range(len(main_ids)).seed(seed).shuffle()

    def read(self, first: int, last: int) -> Int64[np.ndarray, " n"]:
        places = [self._shuffled[i] for i in range(first, last)]
        return self._main_ids[np.array(places, np.int64)]


class _Windows:
    """Index of a window -> its steps; called from Grain's threads."""

    def __init__(
        self,
        maker: ExampleMaker,
        order: _Order,
        config: PipelineConfig,
        rows: Int64[np.ndarray, " rows"],
        steps: range,
        vocab: Vocab,
    ) -> None:
        self._maker = maker
        self._order = order
        self._config = config
        self._steps = steps
        self._vocab = vocab
        group_rows = config.rows // config.groups
        self._groups, inverse = np.unique(rows // group_rows, return_inverse=True)
        # The positions of these rows in the concatenated groups.
        self._places = inverse * group_rows + rows % group_rows
        self.closed = False
        self._running = 0
        self._idle = threading.Condition()

    def __call__(self, window: int) -> list[Step]:
        # Grain's `close` does not wait for its threads: refuse new calls, count running
        # ones.
        with self._idle:
            self._running += 1
        try:
            return list(self._make(int(window)))
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def close(self) -> None:
        with self._idle:
            self.closed = True
            self._idle.wait_for(lambda: self._running == 0)

    def _make(self, window: int) -> Iterator[Step]:
        """The requested steps of a window; stops early after `close`."""
        size = self._config.window_steps
        groups = [self._fill(window, int(group)) for group in self._groups]
        for step in range(window * size, min((window + 1) * size, self._steps.stop)):
            if self.closed:
                return
            try:
                parts = [next(group) for group in groups]
            except ValueError as error:
                raise ValueError(f"step {step}: {error}") from error
            if step in self._steps:
                yield self._join(parts)

    def _join(self, parts: Sequence[Step]) -> Step:
        """The rows of this host from its groups."""
        all_stats = [stats for _, stats in parts]
        fields = zip(*(batch for batch, _ in parts), strict=True)
        batch = Batch(*(np.concatenate(field)[self._places] for field in fields))
        # A group without new examples in this step has no search statistics.
        names = {name: None for stats in all_stats for name in stats}
        found = {name: [s[name] for s in all_stats if name in s] for name in names}
        return batch, {
            name: sum(values) / len(values) if name in _SHARES else sum(values)
            for name, values in found.items()
        }

    def _fill(self, window: int, group: int) -> Iterator[Step]:
        """The rows of one group, for each step of a window."""
        config = self._config
        begin, end = config.index_range(window, group)
        share = (end - begin) / config.window_steps
        most = int(np.ceil(share * (1 + _MOST_WAITING)))
        taken = begin
        waiting: list[Example] = []
        for number in range(1, config.window_steps + 1):
            due = begin + (end - begin) * number // config.window_steps
            upto = max(taken, min(due, taken + most - len(waiting)))
            made: list[Example] = []
            stats: dict[str, float] = {}
            if upto > taken:
                made, stats = self._maker.make(self._order.read(taken, upto), taken)
            examples = waiting + made
            taken = upto
            is_last = number == config.window_steps
            batch, left = pack(
                examples,
                config.rows // config.groups,
                config.row_length,
                self._vocab.pad,
                config.max_trim,
                max_examples=config.max_examples,
                overtake=not is_last,
            )
            waiting = [examples[i] for i in left]
            key = [config.seed, POSITIONS, window, group, number]
            batch = shift_positions(
                batch,
                self._vocab.eod,
                max_offset=config.max_position_offset,
                max_gap=config.max_position_gap,
                rng=np.random.default_rng(key),
            )
            yield (
                batch,
                {
                    "examples": float(len(examples) - len(waiting)),
                    "waiting": 0.0 if is_last else float(len(waiting)),
                    "dropped": float(len(waiting) + end - taken) if is_last else 0.0,
                    "fill": float((batch.segment_ids > 0).mean()),
                    "skipped": 0.0,
                    "retrieved": 0.0,
                    "episodes": 0.0,
                    **stats,
                },
            )
