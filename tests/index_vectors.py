"""Vectors for tests of indexes: in clusters, as recall on random ones means nothing."""

from __future__ import annotations

import functools

import numpy as np

from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.table import TableIndex, TablePart

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


def make_table(path, rows, blocks, k):
    """The exact neighbours of blocks of queries."""
    path.mkdir(parents=True, exist_ok=True)
    exact = ExactIndex(rows)
    parts = [functools.partial(TablePart.find, exact, block, k) for block in blocks]
    TableIndex.join(parts, path, *rows.shape, settings={})
    return TableIndex.load(path)
