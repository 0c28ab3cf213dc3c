"""One contract for every index."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from racm3_jax.retrieval import backends, integrity, scann_index
from racm3_jax.retrieval.exact_index import ExactIndex
from racm3_jax.retrieval.scann_index import ScannConfig, ScannIndex

NUM_ROWS, D_EMBED = 300, 16
TREE = ScannConfig(mode="tree", num_leaves=10, searched_share=0.8)


def _unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _clustered(num_rows=NUM_ROWS, num_queries=20):
    """Random vectors say nothing about recall: rows and queries lie in clusters."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, D_EMBED))
    rows, queries = (
        _unit(centres[rng.integers(30, size=n)] + 0.3 * rng.normal(size=(n, D_EMBED)))
        for n in (num_rows, num_queries)
    )
    return rows, queries


ROWS, QUERIES = _clustered()
BUILDERS = {
    "exact": lambda rows, path: ExactIndex(rows),
    "exact-blocks": lambda rows, path: ExactIndex(rows, block_rows=64),
    "scann": lambda rows, path: ScannIndex.build(rows, ScannConfig(), path),
    "scann-hash": lambda rows, path: ScannIndex.build(
        rows, ScannConfig(mode="hash"), path
    ),
    "scann-tree": lambda rows, path: ScannIndex.build(rows, TREE, path),
}


@pytest.fixture(params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture
def index(kind, tmp_path):
    return BUILDERS[kind](ROWS, tmp_path)


def test_finds_the_nearest(index):
    expected = np.argsort(-(QUERIES @ ROWS.T), axis=1, kind="stable")[:, :10]
    found = index.search(QUERIES, 10)
    assert len(index) == NUM_ROWS
    assert found.valid.all()
    recall = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(expected, found.ids, strict=True)]
    )
    assert recall >= 0.95
    exact = np.einsum("qd,qkd->qk", QUERIES, ROWS[found.ids])
    np.testing.assert_allclose(found.scores, exact, atol=1e-2)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_dtypes_and_shapes(index):
    found = index.search(QUERIES[:3], 7)
    assert found.ids.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert found.valid.dtype == bool
    assert all(x.shape == (3, 7) for x in found)


def test_slots_that_cannot_be_filled_are_marked(index):
    found = index.search(QUERIES, NUM_ROWS + 5)
    assert not found.valid[:, NUM_ROWS:].any()
    assert found.valid[:, 0].all()
    assert (found.ids[~found.valid] == -1).all()
    assert np.isneginf(found.scores[~found.valid]).all()
    for ids, valid in zip(found.ids, found.valid, strict=True):
        assert len(set(ids[valid])) == valid.sum()
        assert (np.diff(valid.astype(int)) <= 0).all()


def test_one_row(kind, tmp_path):
    if kind in ("scann-hash", "scann-tree"):
        with pytest.raises(ValueError, match="needs >= 16 rows; there are 1"):
            BUILDERS[kind](ROWS[:1], tmp_path)
        return
    found = BUILDERS[kind](ROWS[:1], tmp_path).search(QUERIES[:2], 3)
    assert found.ids.tolist() == [[0, -1, -1]] * 2


def test_no_queries(index):
    found = index.search(np.zeros((0, D_EMBED), np.float32), 4)
    assert all(x.shape == (0, 4) for x in found)


def test_batch_size_does_not_matter(index):
    whole = index.search(QUERIES, 10)
    parts = [index.search(QUERIES[i : i + 3], 10) for i in range(0, len(QUERIES), 3)]
    np.testing.assert_array_equal(whole.ids, np.concatenate([p.ids for p in parts]))
    np.testing.assert_allclose(
        whole.scores, np.concatenate([p.scores for p in parts]), atol=1e-6
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_must_be_finite(index, value):
    queries = QUERIES.copy()
    queries[3, 2] = value
    with pytest.raises(ValueError, match=r"query 3 has values that are not finite"):
        index.search(queries, 5)


def test_queries_must_fit(index):
    with pytest.raises(ValueError, match=r"float\[queries, 16\].*got \[20, 15\]"):
        index.search(QUERIES[:, :15], 5)
    with pytest.raises(ValueError, match="k must be >= 1; got 0"):
        index.search(QUERIES, 0)


def test_rows_must_be_finite(kind, tmp_path):
    rows = ROWS.copy()
    rows[[7, 9], 0] = np.nan
    with pytest.raises(ValueError, match=r"row 7 has .* not finite \(2 of 300"):
        BUILDERS[kind](rows, tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        BUILDERS[kind](rows[:0], tmp_path)


def test_saved_and_opened(index, tmp_path):
    index.save(tmp_path)
    opened = backends.open_index(tmp_path, ROWS)
    expected, found = index.search(QUERIES, 12), opened.search(QUERIES, 12)
    np.testing.assert_array_equal(expected.ids, found.ids)
    np.testing.assert_array_equal(expected.valid, found.valid)
    np.testing.assert_allclose(expected.scores, found.scores, atol=1e-6)


def test_every_flipped_byte_is_noticed(index, tmp_path):
    index.save(tmp_path)
    names = integrity.list_files(tmp_path)
    assert names
    for name in names:
        file = tmp_path / name
        data = file.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            damaged = bytearray(data)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(integrity.IntegrityError, match=file.name):
                backends.open_index(tmp_path, ROWS)
        file.write_bytes(data)
    backends.open_index(tmp_path, ROWS)


def test_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        backends.open_index(tmp_path / "none")


def test_exact_index_wants_its_rows(tmp_path):
    ExactIndex(ROWS).save(tmp_path)
    with pytest.raises(ValueError, match="pass the embeddings"):
        backends.open_index(tmp_path)
    with pytest.raises(ValueError, match=r"\[300, 16\] embeddings; got \[299, 16\]"):
        backends.open_index(tmp_path, ROWS[1:])


def test_batch_size_does_not_matter_when_leaves_are_left_out(tmp_path):
    rows, queries = _clustered(2000, 64)
    config = ScannConfig(mode="tree", num_leaves=50, searched_share=0.1)
    index = ScannIndex.build(rows, config, tmp_path)
    whole = index.search(queries, 10)
    for size in (1, 7):
        parts = [index.search(queries[i : i + size], 10) for i in range(0, 64, size)]
        found = np.concatenate([p.ids for p in parts])
        np.testing.assert_array_equal(whole.ids, found)


def test_ties_go_to_the_lower_row():
    rows = np.repeat(ROWS[:2], 4, axis=0)
    found = ExactIndex(rows, block_rows=3).search(ROWS[:1], 4)
    assert found.ids.tolist() == [[0, 1, 2, 3]]


def test_scann_refuses_pickled_ids(tmp_path):
    ScannIndex.build(ROWS, ScannConfig(), tmp_path)
    (tmp_path / "scann" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(integrity.IntegrityError, match=r"scann_docids\.pkl"):
        backends.open_index(tmp_path)


def test_scann_returns_more_than_it_reorders(tmp_path):
    config = ScannConfig(mode="hash", num_reordered=20)
    found = ScannIndex.build(ROWS, config, tmp_path).search(QUERIES, 100)
    assert found.valid.all()


def test_scann_builds_are_equal_in_every_process(tmp_path):
    ScannIndex.build(ROWS, TREE, tmp_path / "here")
    program = (
        "import sys, numpy as np\n"
        "from racm3_jax.retrieval.scann_index import ScannConfig, ScannIndex\n"
        "config = ScannConfig(mode='tree', num_leaves=10, searched_share=0.8)\n"
        "ScannIndex.build(np.load(sys.argv[1]), config, sys.argv[2])\n"
    )
    np.save(tmp_path / "rows.npy", ROWS)
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "rows.npy", tmp_path / "there"],
        check=True,
        capture_output=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    digests = [_digests(tmp_path / place) for place in ("here", "there")]
    assert digests[0] == digests[1]


def _digests(directory):
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in integrity.list_files(directory)
    }


def test_tensorflow_is_hidden_only_while_scann_is_imported(monkeypatch):
    stand_in = object()
    monkeypatch.setitem(sys.modules, "tensorflow", stand_in)
    scann_index.import_scann()
    assert sys.modules["tensorflow"] is stand_in
    monkeypatch.delitem(sys.modules, "tensorflow")
    scann_index.import_scann()
    assert "tensorflow" not in sys.modules


def test_settings_follow_the_size():
    modes = [
        scann_index.resolve_settings(ScannConfig(), n, 768)["mode"]
        for n in (1_000, 50_000, 1_000_000)
    ]
    assert modes == ["brute_force", "hash", "tree"]
    settings = scann_index.resolve_settings(ScannConfig(), 1_000_000, 768)
    assert settings["dimensions_per_block"] == 3
    assert settings["num_leaves"] == 2000
    assert settings["num_searched"] == 160


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"scann\.mode must be .*; got 'trees'"):
        ScannConfig(mode="trees")
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 0"):
        ScannConfig(searched_share=0)
    with pytest.raises(ValueError, match='"exact", "scann" or "auto"; got \'faiss\''):
        backends.choose_kind("faiss", 10)
    assert backends.choose_kind("auto", 10) == "exact"
    assert backends.choose_kind("auto", 10_000) == "scann"
