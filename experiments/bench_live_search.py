"""Benchmark: cost of live search per training step, and waiting times for batches.

    python experiments/bench_live_search.py --out=bench_live_search --num_steps=1000

A ScaNN memory of clustered vectors, the training pipeline with its threads and
prefetch, and a step that takes `--step_seconds`: with `--step=idle` the host only
waits, as for an accelerator; with `--step=busy` NumPy computes meanwhile, as in
training on a CPU. Every step is timed from batch to batch, with live search and with
the same neighbours precomputed (`table`), alternating every 50 steps. A step counts as
starved if its batch comes more than 5 ms after the request. Writes `results.json` and
`waits.png`. Tiny form: --num_rows=2000 --num_steps=4 --step_seconds=0.05.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.memory import neighbours, writer
from racm3_jax.memory.chunks import MemoryChunk
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import Batches, PipelineConfig, make_batches
from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=512, num_image_codes=512, image_length=64, num_sentinels=16)
# A table of all queries and 512 candidates would take gigabytes without need.
STRATEGY = StrategyConfig(max_candidates=64)
STARVED_SECONDS = 0.005
STEPS_PER_TURN = 50
CHUNK = 2048


def make_chunks(num_rows: int, d_embed: int) -> Iterator[MemoryChunk]:
    """Documents with a caption and an image, 20 around every centre."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, num_rows // 20), d_embed), np.float32)

    def near(owners: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal((len(owners), d_embed), np.float32)
        rows = centres[owners] + 0.7 * noise
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    for start in range(0, num_rows, CHUNK):
        numbers = np.arange(start, min(num_rows, start + CHUNK))
        documents = []
        for number in numbers:
            text = rng.integers(0, 512, 16, np.int32)
            image = VOCAB.image_tokens(rng.integers(0, 512, 64, np.int32))
            segments = (
                TokenizedSegment("text", text),
                TokenizedSegment("image", image),
            )
            documents.append(TokenizedDocument(f"d{number}", segments, "", {}))
        owners = numbers % len(centres)
        text, image = near(owners), near(owners)
        document = text + image
        document /= np.linalg.norm(document, axis=1, keepdims=True)
        queries = [np.stack([near(owners)], axis=1) for _ in range(2)]
        yield MemoryChunk(documents, text, image, document, *queries)


class TimedMemory(Memory):
    """Counts the CPU time of searches in all threads."""

    search_seconds = 0.0
    _search_lock = threading.Lock()

    def search(self, queries: np.ndarray, k: int) -> Any:
        start = time.thread_time()
        found = super().search(queries, k)
        with self._search_lock:
            self.search_seconds += time.thread_time() - start
        return found


def open_batches(
    memory: Memory, arguments: argparse.Namespace, main_ids: np.ndarray
) -> Batches:
    config = PipelineConfig(
        rows=arguments.examples * 3 // 4,
        row_length=272,
        examples_per_batch=arguments.examples,
        num_query_variants=1,
    )
    return make_batches(
        memory,
        Retriever(memory, STRATEGY),
        main_ids,
        VOCAB,
        CausalMaskingConfig(),
        config,
        num_steps=arguments.num_steps,
    )


def run_step(kind: str, seconds: float, busy: np.ndarray) -> None:
    """A step of `seconds`; the host waits, or computes."""
    if kind == "idle":
        time.sleep(seconds)
        return
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        busy @ busy


def take_steps(
    batches: Batches, number: int, arguments: argparse.Namespace, busy: np.ndarray
) -> tuple[list[float], list[float], list[Any]]:
    """Waiting times, step times and checksums of the next `number` batches."""
    waits, steps, sums = [], [], []
    for _ in range(number):
        start = time.perf_counter()
        batch, _ = next(batches)
        waits.append(time.perf_counter() - start)
        run_step(arguments.step, arguments.step_seconds, busy)
        steps.append(time.perf_counter() - start)
        sums.append([int(np.asarray(field).sum()) for field in batch])
    return waits, steps, sums


def measure(memories: dict[str, TimedMemory], arguments: argparse.Namespace) -> Any:
    """Steps of both kinds, alternating, so that a busy machine slows both equally."""
    busy = np.random.default_rng(1).standard_normal((256, 256), np.float32)
    main_ids = np.arange(min(arguments.main_documents, arguments.num_rows))
    kinds = {n: open_batches(m, arguments, main_ids) for n, m in memories.items()}
    waits: dict[str, list[float]] = {name: [] for name in kinds}
    steps: dict[str, list[float]] = {name: [] for name in kinds}
    sums: dict[str, list[Any]] = {name: [] for name in kinds}
    for batches in kinds.values():
        next(batches)  # the first one is made on demand
    time.sleep(arguments.fill_seconds)
    done = 1
    while done < arguments.num_steps:
        number = min(STEPS_PER_TURN, arguments.num_steps - done)
        for name, batches in kinds.items():
            found = take_steps(batches, number, arguments, busy)
            for kept, new in zip((waits, steps, sums), found, strict=True):
                kept[name] += new
        done += number
    for batches in kinds.values():
        batches.close()
    if sums["live"] != sums["table"]:
        raise RuntimeError("live search and the table gave different batches")
    return waits, steps


def summarise(
    name: str, waits: list[float], steps: list[float], memory: TimedMemory
) -> dict[str, Any]:
    return {
        "steps": len(steps),
        "step_ms": 1000 * float(np.mean(steps)),
        "wait_ms": {
            f"p{p}": 1000 * float(np.percentile(waits, p)) for p in (50, 99, 100)
        },
        "waiting_share": sum(waits) / sum(steps),
        "starved": int(np.sum(np.asarray(waits) > STARVED_SECONDS)),
        "search_cpu_ms_per_step": 1000 * memory.search_seconds / (len(steps) + 1),
    }


def plot(path: Path, waits: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3))
    for name, seconds in waits.items():
        axes.plot(1000 * np.asarray(seconds), linewidth=0.7, label=name)
    axes.axhline(1000 * STARVED_SECONDS, color="grey", linestyle=":", label="starved")
    axes.set(xlabel="step", ylabel="wait for the batch (ms)", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench_live_search"))
    parser.add_argument("--num_rows", type=int, default=30_000)
    parser.add_argument("--main_documents", type=int, default=4_000)
    parser.add_argument("--d_embed", type=int, default=256)
    parser.add_argument(
        "--num_steps", type=int, default=1001, help="the first is not timed"
    )
    parser.add_argument("--examples", type=int, default=32, help="of a batch")
    parser.add_argument("--step", choices=("idle", "busy"), default="idle")
    parser.add_argument("--step_seconds", type=float, default=0.2)
    parser.add_argument(
        "--fill_seconds", type=float, default=2.0, help="before the first"
    )
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True)
    writer.write_memory(
        make_chunks(arguments.num_rows, arguments.d_embed),
        path=out / "memory",
        vocab=VOCAB,
        tokenizer_fingerprint="none",
        encoder_fingerprint="none",
        index="scann",
    )
    live = TimedMemory.load(out / "memory")
    table = TimedMemory.load(out / "memory")
    # The table has the index's results for every query of training.
    neighbours.compute_neighbours(
        live, out / "table", STRATEGY.max_candidates, engine="memory"
    )
    table.use_table(out / "table", fallback=False)
    live.search_seconds = 0.0
    memories = {"live": live, "table": table}
    waits, steps = measure(memories, arguments)
    found = {n: summarise(n, waits[n], steps[n], memories[n]) for n in memories}
    results = {
        "rows": arguments.num_rows,
        "d_embed": arguments.d_embed,
        "examples_per_step": arguments.examples,
        "step": arguments.step,
        "step_seconds": arguments.step_seconds,
        "load_average": os.getloadavg(),
        **found,
        "cost_share": found["live"]["step_ms"] / found["table"]["step_ms"] - 1,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(out / "waits.png", waits)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
