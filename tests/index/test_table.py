"""Precomputed neighbours."""

from __future__ import annotations

import json

import numpy as np
import pytest
from index_vectors import NUM_ROWS, QUERIES, ROWS, make_table

from racm3_jax import storage
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.table import TableIndex


def test_table_and_its_fallback(tmp_path):
    exact = ExactIndex(ROWS)
    alone = make_table(tmp_path, ROWS, [QUERIES], 6)
    assert (alone.width, alone.num_queries, len(alone)) == (6, 20, NUM_ROWS)
    wide = alone.search(QUERIES, 9)
    assert wide.valid.sum(axis=1).tolist() == [6] * 20
    with pytest.raises(ValueError, match="query 1 is not in the table of 20"):
        alone.search(np.stack([QUERIES[0], ROWS[0]]), 3)
    backed = TableIndex.load(tmp_path, fallback=exact)
    mixed = np.concatenate([QUERIES[:2], ROWS[:2], QUERIES[2:3]])
    for k in (3, 9):
        expected, found = exact.search(mixed, k), backed.search(mixed, k)
        np.testing.assert_array_equal(expected.ids, found.ids)
        np.testing.assert_allclose(expected.scores, found.scores, atol=1e-6)


def test_a_table_is_built_from_queries(tmp_path):
    with pytest.raises(ValueError, match="computed from queries"):
        TableIndex.build(ROWS, tmp_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("keys.npy", np.zeros(20, np.float32)),
        ("keys.npy", np.zeros((20, 2), np.uint64)),
        ("keys.npy", np.zeros(0, np.uint64)),
        ("keys.npy", np.zeros(19, np.uint64)),
        ("ids.npy", np.zeros((20, 6), np.int32)),
        ("ids.npy", np.zeros((20, 5), np.int64)),
        ("scores.npy", np.zeros(20, np.float32)),
        ("scores.npy", np.array([[None] * 6] * 20)),
        ("ids.npy", b"\x93NUMPY\x01\x00"),
        ("ids.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{'descr'"),
        ("ids.npy", b"PK\x03\x04"),
        ("ids.npy", b""),
    ],
    ids=str,
)
def test_arrays_of_other_shapes_and_types(tmp_path, name, array):
    make_table(tmp_path, ROWS, [QUERIES], 6)
    if isinstance(array, bytes):
        (tmp_path / name).write_bytes(array)
    else:
        np.save(tmp_path / name, array)
    content = json.loads((tmp_path / "index.json").read_bytes())
    del content["sha256"]
    content["files"] = storage.describe_files(tmp_path, content["files"])
    (tmp_path / "index.json").write_bytes(storage.encode_sealed(content))
    with pytest.raises(storage.IntegrityError, match="rebuild the index"):
        TableIndex.load(tmp_path)


def test_rows_that_do_not_exist_are_refused(tmp_path):
    make_table(tmp_path, ROWS, [QUERIES], 6)
    ids = np.load(tmp_path / "ids.npy")
    ids[:, 3:] = [300, -7, 10**15]
    np.save(tmp_path / "ids.npy", ids)
    found = TableIndex.load(tmp_path, verify=False).search(QUERIES, 6)
    assert found.valid.tolist() == [[True] * 3 + [False] * 3] * 20
    assert (found.ids[:, 3:] == -1).all()
