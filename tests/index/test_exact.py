"""Exact search: on one device, on all, and streamed."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from index_vectors import QUERIES, ROWS, unit

from racm3_jax.index import registry, streaming
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.rows import Rows, RowsWriter


@pytest.mark.parametrize("block_rows", [3, 1 << 16])
@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_equals_numpy_and_ties_go_to_the_lower_row(num_devices, block_rows):
    devices = jax.devices()[:num_devices]
    rows = np.concatenate([ROWS, ROWS[:5]])  # 305 rows: padding, and ties
    found = ExactIndex(rows, devices, block_rows).search(QUERIES, 9)
    scores = QUERIES @ rows.T
    order = np.lexsort((np.broadcast_to(np.arange(305), scores.shape), -scores))[:, :9]
    np.testing.assert_allclose(
        found.scores, np.take_along_axis(scores, order, 1), atol=1e-6
    )
    assert np.mean(found.ids == order) > 0.99
    tied = ExactIndex(np.repeat(ROWS[:2], 12, axis=0), devices, block_rows)
    assert tied.search(ROWS[:1], 12).ids.tolist() == [list(range(12))]


def test_placement_of_rows():
    """One device by default; of several, each has an equal number of whole blocks."""
    alone = ExactIndex(ROWS)
    assert alone._blocks.shape == (1, 300, 16)
    assert alone._blocks.devices() == {jax.devices()[0]}
    shared = ExactIndex(ROWS, jax.devices(), block_rows=16)
    # 38 rows of each of 8 devices are three blocks of 16.
    assert shared._blocks.shape == (24, 16, 16)
    assert {s.data.shape for s in shared._blocks.addressable_shards} == {(3, 16, 16)}


def test_rows_of_several_files(tmp_path):
    writer = RowsWriter(tmp_path, "x", (16,), np.float32, rows_per_shard=70)
    writer.append(ROWS)
    writer.close()
    rows = Rows([tmp_path / name for name in writer.shards])
    found = ExactIndex(rows, jax.devices()[:2], block_rows=64).search(QUERIES, 5)
    expected = ExactIndex(ROWS).search(QUERIES, 5)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_an_exact_index_needs_its_rows(tmp_path):
    ExactIndex(ROWS).save(tmp_path)
    with pytest.raises(ValueError, match="pass the embeddings"):
        registry.open_index(tmp_path)


@pytest.mark.parametrize("block", [7, 1 << 15])
def test_exact_rows_in_blocks(monkeypatch, block):
    monkeypatch.setattr(streaming, "_ROWS_PER_BLOCK", block)
    found = streaming.find_exact(ROWS, QUERIES, 9)
    np.testing.assert_array_equal(found, ExactIndex(ROWS).search(QUERIES, 9).ids)
    assert streaming.find_exact(ROWS[:3], QUERIES, 9).shape == (20, 3)


@pytest.mark.parametrize("scores", [1, 60, 1 << 25])
def test_all_rows_above_a_similarity(monkeypatch, scores):
    monkeypatch.setattr(streaming, "_SCORES_PER_BLOCK", scores)
    best = (ROWS @ QUERIES[:2].T).max(axis=1)
    rows, similarities = streaming.find_similar(ROWS, QUERIES[:2], 0.8)
    assert rows.tolist() == np.flatnonzero(best >= 0.8).tolist() and len(rows) > 3
    np.testing.assert_allclose(similarities, best[rows], atol=1e-6)
    far = unit(-ROWS.sum(axis=0, keepdims=True))
    assert streaming.find_similar(ROWS, far, 0.99)[0].shape == (0,)
