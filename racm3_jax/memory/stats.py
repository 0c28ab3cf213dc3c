"""Statistics of a memory: sizes, recall, latency, duplicates."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from racm3_jax.index.streaming import find_exact
from racm3_jax.index.tuning import compute_recall
from racm3_jax.memory.format import kind_of
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Modality

NEAR = 0.95
_MODALITIES: tuple[Modality, ...] = ("text", "image")


def compute_stats(
    memory: Memory, *, num_queries: int = 200, k: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Measures a memory on sampled queries, separately for text and image queries.

    Args:
      memory: opened.
      num_queries: of each kind, sampled from the allowed documents.
      k: neighbours per query.
      seed: of the sample.

    Returns:
      "documents", "removed", "with_text", "with_image", "multimodal", "bytes" by kind
      of file, "index", and for each kind of query "recall" (fraction of the exact k
      nearest that the index finds), "latency_ms" (p50, p90, p99 of one query per call)
      and "near_duplicates" (fraction of the sampled documents whose nearest neighbour
      has a similarity of at least 0.95); documents without that modality are skipped.
      JSON-serialisable.

    Raises:
      ValueError: every document is removed.
    """
    allowed = memory.allowed_ids()
    if not len(allowed):
        raise ValueError(f"every document of the memory at {memory.path} is removed")
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(allowed, min(num_queries, len(allowed)), replace=False))
    queries_of = {}
    for modality in _MODALITIES:
        has_part = memory.part(rows, modality).any(axis=1)
        if has_part.any():
            queries_of[modality] = memory.queries(rows[has_part], modality)
    report = memory.manifest.get("report", {})
    return {
        "documents": len(allowed),
        "removed": len(memory) - len(allowed),
        "with_text": memory.manifest["num_with_modality"]["text"],
        "with_image": memory.manifest["num_with_modality"]["image"],
        "multimodal": int(memory.is_multimodal.sum()),
        "d_embed": memory.d_embed,
        "index": memory.manifest["index"],
        "bytes": count_bytes(memory),
        "build": report,
        "recall": {
            name: compute_recall(
                memory.index, find_exact(memory.embeddings, queries, k), queries
            )
            for name, queries in queries_of.items()
        },
        "latency_ms": {
            name: _latency(memory, queries, k) for name, queries in queries_of.items()
        },
        "near_duplicates": _near_duplicates(memory, rows),
    }


def count_bytes(memory: Memory) -> dict[str, int]:
    """Bytes on disk by kind of file."""
    sizes: dict[str, int] = {}
    for name, entry in memory.manifest["files"].items():
        kind = kind_of(name)
        sizes[kind] = sizes.get(kind, 0) + entry["bytes"]
    return dict(sorted(sizes.items()))


def _latency(memory: Memory, queries: np.ndarray, k: int) -> dict[str, float]:
    memory.search(queries[:1], k)  # compiles
    taken = []
    for query in queries:
        start = time.perf_counter()
        memory.search(query[None], k)
        taken.append(1000 * (time.perf_counter() - start))
    p50, p90, p99 = np.percentile(taken, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _near_duplicates(memory: Memory, rows: np.ndarray) -> float:
    found = memory.search(memory.embeddings[rows], 2)
    others = np.where(found.ids == rows[:, None], -np.inf, found.scores)
    return float((others.max(axis=1) >= NEAR).mean())
