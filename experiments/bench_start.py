"""Benchmark: time and RAM until the first batch of a training with a large memory.

    python experiments/bench_start.py --out=bench_start --num_rows=10_000_000

Makes a memory of many small documents (with embeddings of width 8: this measures
columns of numbers, not vectors), then opens it in a separate process, finds the main
documents and makes one batch without retrieval. Writes `results.json`: seconds of each,
resident memory not mapped from files, and for comparison the cost of reading splits
from the records, extrapolated from `--num_read` of them. Tiny form: --num_rows=2000
--num_read=1000.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.memory import writer
from racm3_jax.memory.chunks import MemoryChunk
from racm3_jax.memory.memory import Memory
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab
from racm3_jax.wiring.rows import find_main_rows

VOCAB = Vocab(num_text_ids=512, num_image_codes=512, image_length=64, num_sentinels=16)
CHUNK, WIDTH = 1 << 16, 8


def make_chunks(num_rows: int) -> Iterator[MemoryChunk]:
    rng = np.random.default_rng(0)
    text = TokenizedSegment("text", np.arange(8, dtype=np.int32))
    image = TokenizedSegment("image", VOCAB.image_tokens(np.arange(64, dtype=np.int32)))
    for start in range(0, num_rows, CHUNK):
        numbers = range(start, min(num_rows, start + CHUNK))
        documents = [
            TokenizedDocument(
                str(i), (text, image), metadata={"split": "train" if i % 10 else "test"}
            )
            for i in numbers
        ]
        rows = rng.standard_normal((len(documents), WIDTH), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        hashes = np.arange(start, start + len(documents), dtype=np.uint64)
        yield MemoryChunk(
            documents,
            *(rows, rows, rows, rows[:, None], rows[:, None]),
            content_hashes=hashes,
            image_hashes=hashes,
        )


def read_resident() -> dict[str, float]:
    """Resident bytes of this process: anonymous, and mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        name: int(found[key].split()[0]) * 1024
        for name, key in (("own", "RssAnon"), ("mapped", "RssFile"), ("peak", "VmHWM"))
    }


def start(path: Path, workdir: Path, num_read: int) -> dict[str, Any]:
    """Times what a training does before its first step."""
    results: dict[str, Any] = {"before": read_resident()}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        results[f"{name}_seconds"], begin = now - begin, now

    memory = Memory.load(path)
    lap("load")
    main_ids = find_main_rows(memory, workdir)
    lap("main_rows")
    config = PipelineConfig(8, 272, 12, retrieval=False, window_steps=1, prefetch=0)
    masking = CausalMaskingConfig()
    batches = make_batches(memory, None, main_ids, VOCAB, masking, config, num_steps=1)
    with batches:
        next(batches)
    lap("first_batch")
    results["after"] = read_resident()
    results["num_main"] = len(main_ids)
    memory.metadata(np.arange(num_read))
    lap("read")
    results["read_all_seconds"] = results.pop("read_seconds") / num_read * len(memory)
    return results


def main(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    path = out / f"memory-{arguments.num_rows}"
    if arguments.child:
        print(json.dumps(start(path, out / "run", arguments.num_read)))
        return
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if not path.exists():
        writer.write_memory(
            make_chunks(arguments.num_rows),
            path=path,
            vocab=VOCAB,
            tokenizer_fingerprint="none",
            encoder_fingerprint="none",
            index="exact",
        )
    print(f"memory of {arguments.num_rows:,} rows: {time.perf_counter() - begin:.0f} s")
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child"],
        capture_output=True,
        check=True,
        text=True,
    )
    results = {"num_rows": arguments.num_rows, **json.loads(done.stdout)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--num_rows", type=int, default=10_000_000)
    parser.add_argument("--num_read", type=int, default=20_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    main(parser.parse_args())
