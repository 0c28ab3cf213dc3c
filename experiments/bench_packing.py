"""Gain of packing at the paper's lengths: part of experiments/bench_train.py."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from racm3_jax.sequences.causal_masking import CausalMaskingConfig, build_example
from racm3_jax.sequences.packing import pack
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.types import Retrieved, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

LENGTH = 4096


MASKING = CausalMaskingConfig(num_masks="poisson_clamp1", rotation_probability=0.1)


def make_document(
    vocab: Vocab, number: int, rng: np.random.Generator
) -> TokenizedDocument:
    """1024 image tokens and a caption."""
    # Captions of the corpora of the paper: about 30 tokens, with a long tail.
    caption = int(np.clip(rng.lognormal(np.log(27), 0.45), 5, 128))
    text = rng.integers(0, vocab.num_text_ids, caption).astype(np.int32)
    image = rng.integers(0, 8192, 1024).astype(np.int32) + vocab.image_range.start
    segments = (TokenizedSegment("text", text), TokenizedSegment("image", image))
    return TokenizedDocument(str(number), segments)


def make_examples(count: int, rng: np.random.Generator) -> list[Any]:
    """Masked examples with K ~ U{0,1,2} documents."""
    vocab = Vocab(56_828, 8192, 1024, 512)
    return [
        build_example(
            make_document(vocab, i, rng),
            [make_document(vocab, i, rng) for _ in range(int(rng.integers(3)))],
            MASKING,
            vocab,
            alpha=0.1,
            max_length=4097,
            rng=rng,
        )
        for i in range(count)
    ]


def run_packing(rows: int, num_batches: int) -> dict[str, Any]:
    """Fill of batches of `rows` rows, with slightly more examples than fit.

    "in windows" is used in training: examples that do not fit wait for the next step of
    their window, and images of retrieved documents lose up to 256 tokens per row.
    """
    results: dict[str, Any] = {}
    one = _measure(rows, rows, False, num_batches)
    results["one example a row"] = one
    results["best fit"] = _measure(rows, round(1.75 * rows), True, num_batches)
    results["in windows"] = _measure_windows(rows, num_batches)
    for name in ("best fit", "in windows"):
        found = results[name]
        found["useful_ids"] = found["fill"] / one["fill"]
        found["main_ids"] = found["main_ids_a_row"] / one["main_ids_a_row"]
    return results


def _measure_windows(rows: int, num_batches: int) -> dict[str, float]:
    """The groups and windows of configs/racm3_2b7.py, with its examples per row."""
    config = PipelineConfig(
        rows=rows,
        row_length=LENGTH,
        examples_per_batch=round(504 / 256 * rows),
        max_trim=256,
        groups=max(1, rows // 32),
        window_steps=32,
        prefetch=0,
    )
    memory = _Memory(np.random.default_rng(0))
    vocab, masking = memory.vocab, MASKING
    num_steps = config.window_steps * -(-num_batches // config.window_steps)
    args = (memory, memory, np.arange(1 << 16), vocab, masking, config)
    fills, mains, stats, seconds = [], [], [], []
    with make_batches(*args, num_steps=num_steps) as batches:
        start = time.perf_counter()
        for batch, found in batches:
            fills.append(found["fill"])
            mains.append(int(batch.is_main.sum()) / rows)
            stats.append(found)
        seconds.append((time.perf_counter() - start) / num_steps)
    offered = num_steps * config.examples_per_batch
    packed = sum(s["examples"] for s in stats)
    return {
        "fill": float(np.mean(fills)),
        "lowest_fill": float(np.min(fills)),
        "main_ids_a_row": float(np.mean(mains)),
        "dropped": sum(s["dropped"] for s in stats) / offered,
        "retrieved_for_nothing": (memory.num_read - packed) / offered,
        "seconds_a_batch": seconds[0],
    }


class _Memory:
    """Documents like the paper's corpus, made on demand."""

    vocab = Vocab(56_828, 8192, 1024, 512)

    def __init__(self, rng: np.random.Generator) -> None:
        self._shown = [make_document(self.vocab, i, rng) for i in range(2000)]
        self.num_read = 0

    def documents(self, ids: Any) -> list[TokenizedDocument]:
        self.num_read += len(ids)
        return [self._shown[i % len(self._shown)] for i in ids]

    def queries(self, ids: Any, modality: str, variant: int) -> np.ndarray:
        return np.asarray(ids, np.float32)[:, None]

    def retrieve(self, queries: Any, nums: Any, mains: Any) -> list[Retrieved]:
        found = []
        for query, num in zip(queries[:, 0].astype(int), nums, strict=True):
            ids = query + 1 + np.arange(num)
            shown = tuple(self._shown[i % len(self._shown)] for i in ids)
            found.append(Retrieved(ids, np.ones(num, np.float32), shown))
        return found


def _measure(
    rows: int, num_offered: int, packed: bool, num_batches: int
) -> dict[str, float]:
    """Means over separate batches; without `packed`, one example per row."""
    rng = np.random.default_rng(0)
    fills, mains, seconds, dropped = [], [], [], []
    for _ in range(num_batches):
        examples = make_examples(num_offered, rng)
        start = time.perf_counter()
        if packed:
            packs = [pack(examples, rows, LENGTH, 0)]
        else:
            packs = [pack([example], 1, LENGTH, 0) for example in examples]
        seconds.append(time.perf_counter() - start)
        filled = sum(int((batch.segment_ids > 0).sum()) for batch, _ in packs)
        fills.append(filled / rows / LENGTH)
        mains.append(sum(int(batch.is_main.sum()) for batch, _ in packs) / rows)
        dropped.append(sum(len(waiting) for _, waiting in packs) / num_offered)
    return {
        "fill": float(np.mean(fills)),
        "lowest_fill": float(np.min(fills)),
        "main_ids_a_row": float(np.mean(mains)),
        "dropped": float(np.mean(dropped)),
        "seconds_a_batch": statistics.median(seconds),
    }
