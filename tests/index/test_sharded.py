"""Shards of any back end that does not need others, merged exactly."""

from __future__ import annotations

import numpy as np
import pytest
from index_vectors import QUERIES, ROWS

from racm3_jax import storage
from racm3_jax.index import registry
from racm3_jax.index.sharded import SUFFIX, ShardedIndex, merge_neighbours
from racm3_jax.types import Neighbours

KINDS = [k for k in registry.list_kinds() if k.endswith(SUFFIX)]


@pytest.fixture(params=KINDS)
def kind(request):
    if not registry.is_installed(request.param):
        pytest.skip(f"the library of {request.param} is not installed")
    return request.param


@pytest.fixture
def backend(kind):
    return registry.get_backend(kind)


def test_shards_merge_to_what_one_index_returns(backend, tmp_path):
    """Four shards: two in each of two independent readers."""
    whole = backend.build(ROWS, tmp_path / "one").search(QUERIES, 12)
    ShardedIndex.build(backend, ROWS, tmp_path / "four", rows_per_shard=75)
    parts = [
        ShardedIndex.load(backend, tmp_path / "four", only=n).search(QUERIES, 12)
        for n in ([0, 2], [1, 3])
    ]
    merged = merge_neighbours(parts, 12)
    for expected, found in zip(whole, merged, strict=True):
        np.testing.assert_array_equal(expected, found)
    with pytest.raises(ValueError, match=r"has shards 0\.\.3; got \[4\]"):
        ShardedIndex.load(backend, tmp_path / "four", only=[4])


def test_every_shard_is_tuned(kind, tmp_path):
    tuned = []

    def tune(index, path, rows):
        tuned.append((len(index), path.name, len(rows)))
        index.settings["recall"] = {"text": 1.0}
        index.describe(path)

    registry.build_index(kind, ROWS, tmp_path, 160, tune)
    assert tuned == [(160, "shard-00000", 160), (140, "shard-00001", 140)]
    opened = registry.open_index(tmp_path)
    assert len(opened) == 300
    assert [i.settings["recall"] for _, i in opened._shards] == [{"text": 1.0}] * 2


def test_a_damaged_shard_is_detected_without_reading_it(backend, tmp_path):
    ShardedIndex.build(backend, ROWS, tmp_path, rows_per_shard=150)
    file = tmp_path / "shard-00001" / "index.json"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(storage.IntegrityError, match="shard-00001"):
        ShardedIndex.load(backend, tmp_path, only=[0])


def test_a_shard_of_another_kind(kind, backend, tmp_path):
    ShardedIndex.build(backend, ROWS, tmp_path, rows_per_shard=150)
    for other in (registry.get_backend(k) for k in KINDS if k != kind):
        with pytest.raises(ValueError, match=f'"{kind}"; this opens "{other.kind}_sh'):
            ShardedIndex.load(other, tmp_path)


def test_swapped_shards(backend, tmp_path):
    ShardedIndex.build(backend, ROWS, tmp_path, rows_per_shard=160)
    (tmp_path / "shard-00000").rename(tmp_path / "x")
    (tmp_path / "shard-00001").rename(tmp_path / "shard-00000")
    (tmp_path / "x").rename(tmp_path / "shard-00001")
    with pytest.raises(
        storage.IntegrityError, match=r"\[140, 16\] rows .* \[160, 16\]"
    ):
        ShardedIndex.load(backend, tmp_path, verify=False)


def test_wrong_sizes(backend, tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard must be >= 1; got 0"):
        ShardedIndex.build(backend, ROWS, tmp_path, rows_per_shard=0)
    with pytest.raises(ValueError, match="at least one shard"):
        ShardedIndex([])


def test_merging_is_by_score_then_id_and_empty_slots_last():
    a = Neighbours(
        np.array([[4, 1, -1]]), np.float32([[0.9, 0.7, -np.inf]]), np.bool_([[1, 1, 0]])
    )
    b = Neighbours(
        np.array([[7, 8, -1]]), np.float32([[0.9, 0.8, -np.inf]]), np.bool_([[1, 1, 0]])
    )
    assert merge_neighbours([b, a], 3).ids.tolist() == [[4, 7, 8]]
    wide = merge_neighbours([a, b], 7)
    assert wide.ids.tolist() == [[4, 7, 8, 1, -1, -1, -1]]
    assert wide.valid.sum() == 4 and np.isneginf(wide.scores[0, 4:]).all()
