"""Sharded rows on disk."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.index.rows import Rows, RowsWriter


def _write(directory, rows, sizes, rows_per_shard=4):
    writer = RowsWriter(directory, "x", rows.shape[1:], rows.dtype, rows_per_shard)
    start = 0
    for size in sizes:
        writer.append(rows[start : start + size])
        start += size
    writer.close()
    return writer


@pytest.mark.parametrize("sizes", [[10], [3, 3, 4], [1] * 10, [4, 0, 4, 2], [9, 1]])
def test_rows_are_read_as_appended(tmp_path, sizes):
    expected = np.arange(60, dtype=np.float32).reshape(10, 3, 2)
    writer = _write(tmp_path, expected, sizes)
    assert writer.num_rows == 10
    assert writer.shards == ["x-00000.npy", "x-00001.npy", "x-00002.npy"]
    rows = Rows([tmp_path / shard for shard in writer.shards])
    assert rows.shape == (10, 3, 2)
    np.testing.assert_array_equal(np.asarray(rows), expected)
    np.testing.assert_array_equal(rows[:], expected)
    np.testing.assert_array_equal(rows[3:9], expected[3:9])
    ids = np.asarray([[9, 0, 4], [3, 3, -1]])
    np.testing.assert_array_equal(rows[ids], expected[ids])
    np.testing.assert_array_equal(rows[5], expected[5])
    assert [len(shard) for shard in rows.shards()] == [4, 4, 2]


def test_one_shard_is_a_plain_npy_file(tmp_path):
    expected = np.arange(6, dtype=np.uint64)
    writer = _write(tmp_path, expected, [2, 4], rows_per_shard=100)
    np.testing.assert_array_equal(np.load(tmp_path / "x-00000.npy"), expected)
    assert Rows([tmp_path / writer.shards[0]])[2] == 2


def test_no_rows(tmp_path):
    writer = _write(tmp_path, np.zeros((0, 5), np.float16), [])
    rows = Rows([tmp_path / shard for shard in writer.shards])
    assert len(rows) == 0
    assert rows[:].shape == (0, 5)


def test_rows_of_another_shape_are_refused(tmp_path):
    writer = RowsWriter(tmp_path, "x", (3,), np.float32)
    with pytest.raises(ValueError, match=r"x holds rows of shape \(3,\); got \(2,\)"):
        writer.append(np.zeros((1, 2)))


def test_released_rows_are_read_again(tmp_path):
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    writer = RowsWriter(tmp_path, "x", (4,), "<f4", rows_per_shard=4)
    writer.append(rows)
    writer.close()
    opened = Rows([tmp_path / name for name in writer.shards])
    for _ in range(2):
        np.testing.assert_array_equal(opened[2:9], rows[2:9])
        opened.release()
