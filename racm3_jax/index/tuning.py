"""Tunes how many leaves a search visits and how many rows it rescores, by measurement.

Rows outside the searched leaves are lost, and so are those that the coded scores rank
too low; either can limit the recall, whatever the other setting. One tuner serves all
back ends, which define the cost of settings and what can be raised. Text and image
queries are in different regions of the space, so a fraction of leaves that is enough
for one kind may not be for the other: each kind must reach the target.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float32, Int64

from racm3_jax.index.contract import Backend, Index
from racm3_jax.index.rows import Rows
from racm3_jax.index.streaming import find_exact

NUM_QUERIES = 256
_FIRST_LEAVES = 0.01
_LEAVES_GROWTH = 1.5
_REORDER_GROWTH = 2
# Maximum fraction of the rows that is rescored.
_MOST_REORDERED = 0.02
# Rescored rows are read at random: per byte they take three times as long as the
# coded rows of a leaf, which are contiguous (measured, 768 dimensions).
_SCATTERED = 3


def compute_recall(
    index: Index,
    expected: Int64[np.ndarray, "queries k"],
    queries: Float32[np.ndarray, "queries d_embed"],
) -> float:
    """Fraction of the exact neighbours (`find_exact`) that an index finds."""
    found = index.search(queries, expected.shape[1]).ids
    hits = sum(len(set(a) & set(b)) for a, b in zip(expected, found, strict=True))
    return hits / max(1, expected.size)


def sample_queries(
    parts: Mapping[str, Rows], num_queries: int = NUM_QUERIES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Text and image embeddings of random documents; absent kinds are omitted.

    Args:
      parts: embeddings by kind; zero rows are absent.
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


def search_few_leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A hundredth of the leaves: few leaves with many rescored rows may be cheapest."""
    if "num_leaves" not in settings:
        return {}
    return {"num_searched": max(1, round(_FIRST_LEAVES * settings["num_leaves"]))}


def search_or_rescore_more(
    settings: Mapping[str, Any], num_rows: int
) -> list[dict[str, Any]]:
    """One step in each direction: `num_searched` of `num_leaves`, `num_reordered`."""
    steps: list[dict[str, Any]] = []
    num_leaves = settings.get("num_leaves", 0)
    if num_leaves and settings["num_searched"] < num_leaves:
        more = int(settings["num_searched"] * _LEAVES_GROWTH) + 1
        steps.append({"num_searched": min(num_leaves, more)})
    reordered = settings["num_reordered"]
    most = min(num_rows, max(reordered, int(_MOST_REORDERED * num_rows)))
    if reordered < most:
        steps.append({"num_reordered": min(most, reordered * _REORDER_GROWTH)})
    return steps


def count_bytes(
    settings: Mapping[str, Any], coded_bytes: float, rescored_bytes: float
) -> float:
    """Bytes that one query reads, weighted by locality.

    Args:
      settings: "num_reordered", and for a tree "num_leaves" and "num_searched".
      coded_bytes: of all rows.
      rescored_bytes: of one row.
    """
    searched = settings.get("num_searched", 1) / settings.get("num_leaves", 1)
    rescored = settings["num_reordered"] * rescored_bytes
    return coded_bytes * searched + _SCATTERED * rescored


def tune(
    index: Backend,
    path: pathlib.Path,
    embeddings: np.ndarray | Rows,
    queries: Mapping[str, np.ndarray],
    *,
    recall_target: float = 0.95,
    k: int = 10,
) -> dict[str, float]:
    """Raises the settings until every kind of query reaches the target; saves them.

    It starts with `cheapest_settings`. Each step takes the one of `costlier_settings`
    with the largest gain of recall per cost (`compute_cost`). The same rows and queries
    give the same settings. An index without settings is only measured.

    Args:
      index: built at `path`.
      path: its directory; the settings are written to its description.
      embeddings: its rows.
      queries: by kind.
      recall_target: of the exact `k` nearest.
      k: neighbours.

    Returns:
      The recall by kind; below the target, with a warning, if no setting can be raised
      any more.

    Raises:
      ValueError: the target is not in (0, 1].
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

    cheapest = index.cheapest_settings()
    found = measure(cheapest or {})
    if cheapest is None:
        return found
    while worst(found) < recall_target:
        now = dict(index.settings)
        steps = index.costlier_settings()
        if not steps:
            break
        recalls = [measure(now | step) for step in steps]
        gains = [
            (worst(recall) - worst(found))
            / (index.compute_cost(now | step) - index.compute_cost(now))
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
