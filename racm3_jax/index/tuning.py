"""How many leaves ScaNN must look into, and how many rows it must rescore: measured.

Rows that are not in a searched leaf are lost, and so are those that the hashed scores
rank too low; either can bound the recall, whatever the other is set to. Text and image
queries lie in different places of the space, so that a share of leaves which serves one
kind may fail the other: each kind must reach the target.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float32, Int64

from racm3_jax.index.contract import Index
from racm3_jax.index.rows import Rows
from racm3_jax.index.scann import ScannIndex

NUM_QUERIES = 256
_FIRST_LEAVES = 0.01
_LEAVES_GROWTH = 1.5
_REORDER_GROWTH = 2
# Of the rows, the largest share that is rescored.
_MOST_REORDERED = 0.02
# A rescored row is read from anywhere: per byte it takes three times as long as the
# hashed rows of a leaf, which lie side by side (measured, 768 dimensions).
_SCATTERED = 3
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


def compute_cost(settings: Mapping[str, Any], num_rows: int, d_embed: int) -> float:
    """Bytes that one query reads, weighted: a clock would differ from run to run."""
    hashed = num_rows * (d_embed / settings["dimensions_per_block"]) / 2
    if settings["mode"] == "tree":
        # SOAR puts every row into two leaves.
        hashed *= 2 * settings["num_searched"] / settings["num_leaves"]
    return hashed + _SCATTERED * settings["num_reordered"] * 2 * d_embed


def tune(
    index: ScannIndex,
    path: pathlib.Path,
    embeddings: np.ndarray | Rows,
    queries: Mapping[str, np.ndarray],
    *,
    recall_target: float = 0.95,
    k: int = 10,
) -> dict[str, float]:
    """Raises the settings until every kind of query reaches the target; saves them.

    A tree begins with a hundredth of its leaves, whatever it was built for. Each step
    raises either `num_searched` (of a tree) or `num_reordered`: the one whose recall
    grows most for its cost (`compute_cost`). The same rows and queries give the same
    settings. "brute_force" has none, and is left as it is.

    Args:
      index: built at `path`.
      path: its directory, whose description gets the settings.
      embeddings: its rows.
      queries: by kind.
      recall_target: of the exact `k` nearest.
      k: neighbours.

    Returns:
      The recall reached, by kind; below the target, which is logged, where every leaf is
      searched and a fiftieth of the rows rescored.

    Raises:
      ValueError: if the target is no share.
    """
    if not 0 < recall_target <= 1:
        raise ValueError(f"recall_target must be in (0, 1]; got {recall_target}")
    expected = {name: find_exact(embeddings, rows, k) for name, rows in queries.items()}

    def measure(settings: Mapping[str, Any]) -> dict[str, float]:
        index.settings.update(settings)
        return {
            n: compute_recall(index, expected[n], rows) for n, rows in queries.items()
        }

    def worst(recalls: Mapping[str, float]) -> float:
        return min(recalls.values(), default=1.0)

    if index.settings["mode"] == "brute_force":
        return measure({})
    if index.settings["mode"] == "tree":
        # Few leaves with many rows rescored may be the cheapest.
        first = max(1, round(_FIRST_LEAVES * index.settings["num_leaves"]))
        index.settings["num_searched"] = first
    found = measure({})
    shape = (len(embeddings), embeddings.shape[1])
    while worst(found) < recall_target:
        now = dict(index.settings)
        steps = _next_settings(now, len(embeddings))
        if not steps:
            break
        recalls = [measure(now | step) for step in steps]
        gains = [
            (worst(recall) - worst(found))
            / (compute_cost(now | step, *shape) - compute_cost(now, *shape))
            for recall, step in zip(recalls, steps, strict=True)
        ]
        best = int(np.argmax(gains))
        found = recalls[best]
        index.settings.update(now | steps[best])
    index.settings["recall"] = {name: round(v, 4) for name, v in found.items()}
    index.describe(path)
    if worst(found) < recall_target:
        logging.warning(
            "the index at %s reaches a recall@%d of %s, not %g: lower the recall target, "
            'or use index="exact"',
            *(path, k, index.settings["recall"], recall_target),
        )
    return found


def _next_settings(settings: Mapping[str, Any], num_rows: int) -> list[dict[str, int]]:
    """What may be raised, and to what."""
    steps = []
    if settings["mode"] == "tree" and settings["num_searched"] < settings["num_leaves"]:
        more = int(settings["num_searched"] * _LEAVES_GROWTH) + 1
        steps.append({"num_searched": min(settings["num_leaves"], more)})
    most = min(
        num_rows, max(settings["num_reordered"], int(_MOST_REORDERED * num_rows))
    )
    if settings["num_reordered"] < most:
        more = settings["num_reordered"] * _REORDER_GROWTH
        steps.append({"num_reordered": min(most, more)})
    return steps
