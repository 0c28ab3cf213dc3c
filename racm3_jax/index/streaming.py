"""Exact search of rows that do not need to fit in RAM: NumPy, block by block.

For results that must not depend on an index: the ground truth of recall, and all rows
similar to an image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64

from racm3_jax.index.rows import Rows

_ROWS_PER_BLOCK = 1 << 15
_SCORES_PER_BLOCK = 1 << 25


def _score_blocks(
    embeddings: np.ndarray | Rows, queries: Float32[np.ndarray, "queries d_embed"]
) -> Iterator[tuple[int, Float32[np.ndarray, "queries block"]]]:
    """First row of every block, and the inner products with its rows."""
    size = max(1, min(_ROWS_PER_BLOCK, _SCORES_PER_BLOCK // max(1, len(queries))))
    for start in range(0, len(embeddings), size):
        block = np.asarray(embeddings[start : start + size])
        yield start, queries @ block.T


def find_exact(
    embeddings: np.ndarray | Rows,
    queries: Float32[np.ndarray, "queries d_embed"],
    k: int,
) -> Int64[np.ndarray, "queries k"]:
    """The rows of the `k` largest inner products, best first; at most all rows."""
    scores = np.zeros((len(queries), 0), np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    for start, new in _score_blocks(embeddings, queries):
        numbers = np.broadcast_to(np.arange(new.shape[1]) + start, new.shape)
        if new.shape[1] > k:
            best = np.argpartition(-new, k - 1, axis=1)[:, :k]
            new = np.take_along_axis(new, best, axis=1)
            numbers = np.take_along_axis(numbers, best, axis=1)
        scores = np.concatenate([scores, new], axis=1)
        ids = np.concatenate([ids, numbers], axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        scores, ids = (np.take_along_axis(x, order, axis=1) for x in (scores, ids))
    return ids


def find_similar(
    embeddings: np.ndarray | Rows,
    queries: Float32[np.ndarray, "queries d_embed"],
    min_similarity: float,
) -> tuple[Int64[np.ndarray, " found"], Float32[np.ndarray, " found"]]:
    """Rows whose largest inner product with a query is at least `min_similarity`.

    Returns:
      Rows, ascending, and those inner products.
    """
    rows, similarities = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for start, scores in _score_blocks(embeddings, queries):
        best = scores.max(axis=0)
        near = np.flatnonzero(best >= min_similarity)
        rows.append(near + start)
        similarities.append(best[near])
    return np.concatenate(rows), np.concatenate(similarities)
