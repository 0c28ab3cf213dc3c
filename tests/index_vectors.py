"""Vectors for tests of indexes: random ones say nothing about recall, so in clusters."""

from __future__ import annotations

import numpy as np

NUM_ROWS, D_EMBED = 300, 16


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def clustered(num_rows=NUM_ROWS, num_queries=20):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, D_EMBED))
    rows, queries = (
        unit(centres[rng.integers(30, size=n)] + 0.3 * rng.normal(size=(n, D_EMBED)))
        for n in (num_rows, num_queries)
    )
    return rows, queries


ROWS, QUERIES = clustered()
