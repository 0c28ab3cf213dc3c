"""What packing is worth at the paper's lengths: part of experiments/bench_train.py."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from racm3_jax.sequences.causal_masking import CausalMaskingConfig, build_example
from racm3_jax.sequences.packing import pack
from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

LENGTH = 4096


def make_examples(count: int, rng: np.random.Generator) -> list[Any]:
    """Masked examples with K ~ U{0,1,2} documents of 1024 image ids and a caption."""
    vocab = Vocab(56_828, 8192, 1024, 512)

    def document(number: int) -> TokenizedDocument:
        # Captions of the corpora of the paper: about 30 ids, with a long tail.
        caption = int(np.clip(rng.lognormal(np.log(27), 0.45), 5, 128))
        text = rng.integers(0, vocab.num_text_ids, caption).astype(np.int32)
        image = rng.integers(0, 8192, 1024).astype(np.int32) + vocab.image_range.start
        segments = (TokenizedSegment("text", text), TokenizedSegment("image", image))
        return TokenizedDocument(str(number), segments)

    masking = CausalMaskingConfig(num_masks="poisson_clamp1", rotation_probability=0.1)
    return [
        build_example(
            document(i),
            [document(i) for _ in range(int(rng.integers(3)))],
            masking,
            vocab,
            alpha=0.1,
            max_length=4097,
            rng=rng,
        )
        for i in range(count)
    ]


def run_packing(rows: int, num_batches: int) -> dict[str, Any]:
    """Fill of batches of so many rows, where a little more is offered than fits.

    Packed by itself is what one host makes: a batch of `pipeline.rows` is as many packs
    as there are `pipeline.groups`, and larger packs come out fuller.
    """
    results: dict[str, Any] = {}
    one = _measure(rows, rows, -1, num_batches)
    results["one example a row"] = one
    for name, share, max_trim in (("best fit", 1.75, 0), ("with max_trim", 2.15, 256)):
        found = _measure(rows, round(share * rows), max_trim, num_batches)
        found["useful_ids"] = found["fill"] / one["fill"]
        found["main_ids"] = found["main_ids_a_row"] / one["main_ids_a_row"]
        results[name] = found
    return results


def _measure(
    rows: int, num_offered: int, max_trim: int, num_batches: int
) -> dict[str, float]:
    """Means over batches; `max_trim` -1 puts one example into each row."""
    rng = np.random.default_rng(0)
    fills, mains, seconds, dropped = [], [], [], []
    for _ in range(num_batches):
        examples = make_examples(num_offered, rng)
        start = time.perf_counter()
        if max_trim < 0:
            packs = [pack([example], 1, LENGTH, 0) for example in examples]
        else:
            packs = [pack(examples, rows, LENGTH, 0, max_trim)]
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
