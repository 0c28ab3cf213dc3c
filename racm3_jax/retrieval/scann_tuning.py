"""How many leaves a ScaNN tree must look into: measured, not guessed.

Text and image queries lie in different places of the space, so that a share of leaves
which serves one kind may fail the other: each kind must reach the target.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int64

from racm3_jax.retrieval.index import Index
from racm3_jax.retrieval.rows import Rows
from racm3_jax.retrieval.scann_index import ScannIndex

NUM_QUERIES = 256
_GROWTH = 1.5
_ROWS_PER_BLOCK = 1 << 15


def find_exact(
    embeddings: np.ndarray | Rows,
    queries: Float32[np.ndarray, "queries d_embed"],
    k: int,
) -> Int64[np.ndarray, "queries k"]:
    """The rows of the `k` largest inner products, best first; at most all rows.

    Streams the rows in blocks: a memory larger than the RAM can be measured.
    """
    scores = np.zeros((len(queries), 0), np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(embeddings), _ROWS_PER_BLOCK):
        block = embeddings[start : start + _ROWS_PER_BLOCK]
        new = queries @ np.asarray(block).T
        numbers = np.broadcast_to(np.arange(len(block)) + start, new.shape)
        if len(block) > k:
            best = np.argpartition(-new, k - 1, axis=1)[:, :k]
            new = np.take_along_axis(new, best, axis=1)
            numbers = np.take_along_axis(numbers, best, axis=1)
        scores = np.concatenate([scores, new], axis=1)
        ids = np.concatenate([ids, numbers], axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        scores, ids = (np.take_along_axis(x, order, axis=1) for x in (scores, ids))
    return ids


def compute_recall(
    index: Index,
    expected: Int64[np.ndarray, "queries k"],
    queries: Float32[np.ndarray, "queries d_embed"],
) -> float:
    """Share of the exact neighbours (`find_exact`) that an index finds."""
    found = index.search(queries, expected.shape[1]).ids
    hits = sum(len(set(a) & set(b)) for a, b in zip(expected, found, strict=True))
    return hits / max(1, expected.size)


def sample_queries(
    parts: Mapping[str, Rows], num_queries: int = NUM_QUERIES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Text and image parts of random documents; kinds that no document has are left out.

    Args:
      parts: embeddings by kind; rows of zeros are absent parts.
      num_queries: of each kind, at most.
      seed: of the sample.
    """
    found = {}
    for name, rows in parts.items():
        rng = np.random.default_rng([seed, len(rows)])
        taken = rng.choice(len(rows), min(4 * num_queries, len(rows)), replace=False)
        sample = rows[np.sort(taken)]
        rows.release()
        sample = sample[sample.any(axis=1)][:num_queries]
        if len(sample):
            found[name] = np.ascontiguousarray(sample, np.float32)
    return found


def tune(
    index: ScannIndex,
    path: pathlib.Path,
    embeddings: np.ndarray | Rows,
    queries: Mapping[str, np.ndarray],
    *,
    recall_target: float = 0.95,
    k: int = 10,
) -> dict[str, float]:
    """Raises `num_searched` until every kind of query reaches the target; saves it.

    Only trees have leaves; other modes look at every row, and are left as they are.

    Args:
      index: built at `path`.
      path: its directory, whose description gets the setting.
      embeddings: its rows.
      queries: by kind.
      recall_target: of the exact `k` nearest.
      k: neighbours.

    Returns:
      The recall reached, by kind.

    Raises:
      ValueError: if the target is no share.
    """
    if not 0 < recall_target <= 1:
        raise ValueError(f"recall_target must be in (0, 1]; got {recall_target}")
    expected = {name: find_exact(embeddings, rows, k) for name, rows in queries.items()}

    def measure() -> dict[str, float]:
        return {
            n: compute_recall(index, expected[n], rows) for n, rows in queries.items()
        }

    found = measure()
    if index.settings["mode"] != "tree":
        return found
    num_leaves = index.settings["num_leaves"]
    while min(found.values(), default=1.0) < recall_target:
        searched = index.settings["num_searched"]
        if searched == num_leaves:
            break
        index.settings["num_searched"] = min(num_leaves, int(searched * _GROWTH) + 1)
        found = measure()
    index.settings["recall"] = {name: round(v, 4) for name, v in found.items()}
    index.describe(path)
    return found
