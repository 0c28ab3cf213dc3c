"""One contract for every index, and ScaNN's traps:

settings (768-d in blocks of 3; modes by size)   test_settings_follow_the_size
builds that differ from process to process       test_scann_builds_are_equal_in_every_process
rows, queries that are not finite                test_rows_must_be_finite, test_queries_…
unfilled slots that say row 0; k > rows          test_slots_that_cannot_be_filled_are_marked
no queries; fewer rows than leaves               test_no_queries, test_one_row
k above what is reordered                        test_scann_returns_more_than_it_reorders
a search while rows are added                    test_memory_edit: …_while_documents_are_added
absolute paths                                   test_scann_can_be_moved
pickled ids                                      test_scann_refuses_pickled_ids
damaged files that load                          test_every_flipped_byte_is_noticed
a disk that is full                              test_a_full_disk_leaves_no_index
results that change with the number of queries   test_batch_size_does_not_matter_…
searchers in other processes                     test_scann_is_opened_anew_in_every_process
recall, by kind of query                         test_a_tree_is_tuned_to_a_recall_target
builds that need too much RAM; shards            test_shards_merge_…, test_every_shard_is_tuned
TensorFlow that is installed                     test_tensorflow_is_hidden_…
"""

from __future__ import annotations

import copy
import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from racm3_jax import storage
from racm3_jax.index import registry, tuning
from racm3_jax.index import scann as scann_index
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.mesh import MeshExactIndex
from racm3_jax.index.scann import ScannConfig, ScannIndex
from racm3_jax.index.sharded import ShardedIndex, merge_neighbours
from racm3_jax.index.table import TableIndex

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
    "scann-sharded": lambda rows, path: ShardedIndex.build(
        rows, path, rows_per_shard=90
    ),
    "exact-mesh": lambda rows, path: MeshExactIndex(rows),
    "table": lambda rows, path: TableIndex.compute(
        ExactIndex(rows), [QUERIES[:7], QUERIES[7:]], len(rows), D_EMBED
    ),
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
    opened = registry.open_index(tmp_path, ROWS)
    expected, found = index.search(QUERIES, 12), opened.search(QUERIES, 12)
    np.testing.assert_array_equal(expected.ids, found.ids)
    np.testing.assert_array_equal(expected.valid, found.valid)
    np.testing.assert_allclose(expected.scores, found.scores, atol=1e-6)


def test_every_flipped_byte_is_noticed(index, tmp_path):
    index.save(tmp_path)
    names = storage.list_files(tmp_path)
    assert names
    for name in names:
        file = tmp_path / name
        data = file.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            damaged = bytearray(data)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(storage.IntegrityError, match=file.name):
                registry.open_index(tmp_path, ROWS)
        file.write_bytes(data)
    registry.open_index(tmp_path, ROWS)


def test_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        registry.open_index(tmp_path / "none")


def test_exact_index_wants_its_rows(tmp_path):
    ExactIndex(ROWS).save(tmp_path)
    with pytest.raises(ValueError, match="pass the embeddings"):
        registry.open_index(tmp_path)
    with pytest.raises(ValueError, match=r"\[300, 16\] embeddings; got \[299, 16\]"):
        registry.open_index(tmp_path, ROWS[1:])


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
    with pytest.raises(storage.IntegrityError, match=r"scann_docids\.pkl"):
        registry.open_index(tmp_path)


def test_scann_returns_more_than_it_reorders(tmp_path):
    config = ScannConfig(mode="hash", num_reordered=20)
    found = ScannIndex.build(ROWS, config, tmp_path).search(QUERIES, 100)
    assert found.valid.all()


def test_scann_builds_are_equal_in_every_process(tmp_path):
    ScannIndex.build(ROWS, TREE, tmp_path / "here")
    program = (
        "import sys, numpy as np\n"
        "from racm3_jax.index.scann import ScannConfig, ScannIndex\n"
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
        for name in storage.list_files(directory)
    }


def test_scann_can_be_moved(tmp_path):
    index = ScannIndex.build(ROWS, TREE, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    for name in storage.list_files(tmp_path / "there"):
        data = (tmp_path / "there" / name).read_bytes()
        assert str(tmp_path).encode() not in data, name
    opened = registry.open_index(tmp_path / "there")
    np.testing.assert_array_equal(
        opened.search(QUERIES, 5).ids, index.search(QUERIES, 5).ids
    )


def test_scann_is_opened_anew_in_every_process(tmp_path):
    index = ScannIndex.build(ROWS, ScannConfig(), tmp_path)
    with pytest.raises(TypeError, match="cannot be sent to another process: open it"):
        copy.copy(index)  # asks as pickling does


def test_a_full_disk_leaves_no_index(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(storage, "sync_file", fail)
    with pytest.raises(OSError, match="no space"):
        ScannIndex.build(ROWS, ScannConfig(), tmp_path)
    assert storage.list_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        registry.open_index(tmp_path)


def test_every_shard_is_tuned(tmp_path):
    tuned = []

    def tune(index, path, rows):
        tuned.append((len(index), path.name, len(rows)))
        index.settings["recall"] = {"text": 1.0}
        index.describe(path)

    registry.build_index("scann_sharded", ROWS, tmp_path, 160, tune)
    assert tuned == [(160, "shard-00000", 160), (140, "shard-00001", 140)]
    opened = registry.open_index(tmp_path)
    assert len(opened) == 300
    assert [i.settings["recall"] for _, i in opened._shards] == [{"text": 1.0}] * 2


@pytest.mark.parametrize("block", [7, 1 << 15])
def test_exact_rows_in_blocks(monkeypatch, block):
    monkeypatch.setattr(tuning, "_ROWS_PER_BLOCK", block)
    found = tuning.find_exact(ROWS, QUERIES, 9)
    np.testing.assert_array_equal(found, ExactIndex(ROWS).search(QUERIES, 9).ids)
    assert tuning.find_exact(ROWS[:3], QUERIES, 9).shape == (20, 3)


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
        registry.choose_kind("faiss", 10)
    assert registry.choose_kind("auto", 10) == "exact"
    assert registry.choose_kind("auto", 10_000) == "scann"


def test_shards_merge_to_what_one_index_returns(tmp_path):
    """Four shards, two of them in each of two readers that know nothing of another."""
    whole = ScannIndex.build(ROWS, ScannConfig(), tmp_path / "one").search(QUERIES, 12)
    ShardedIndex.build(ROWS, tmp_path / "four", rows_per_shard=75)
    parts = [
        ShardedIndex.load(tmp_path / "four", only=numbers).search(QUERIES, 12)
        for numbers in ([0, 2], [1, 3])
    ]
    merged = merge_neighbours(parts, 12)
    for expected, found in zip(whole, merged, strict=True):
        np.testing.assert_array_equal(expected, found)
    with pytest.raises(ValueError, match=r"has shards 0\.\.3; got \[4\]"):
        ShardedIndex.load(tmp_path / "four", only=[4])


def test_a_damaged_shard_is_noticed_when_it_is_not_read(tmp_path):
    ShardedIndex.build(ROWS, tmp_path, rows_per_shard=150)
    file = tmp_path / "shard-00001" / "index.json"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(storage.IntegrityError, match="shard-00001"):
        ShardedIndex.load(tmp_path, only=[0])


def test_exact_on_eight_devices_equals_numpy():
    import jax

    assert jax.device_count() == 8
    rows = np.concatenate([ROWS, ROWS[:5]])  # 305 rows: padding, and ties
    found = MeshExactIndex(rows).search(QUERIES, 9)
    scores = QUERIES @ rows.T
    order = np.lexsort((np.broadcast_to(np.arange(305), scores.shape), -scores))[:, :9]
    np.testing.assert_allclose(
        found.scores, np.take_along_axis(scores, order, 1), atol=1e-6
    )
    assert np.mean(found.ids == order) > 0.99
    tied = MeshExactIndex(np.repeat(ROWS[:2], 12, axis=0)).search(ROWS[:1], 12)
    assert tied.ids.tolist() == [list(range(12))]


def test_table_and_its_fallback(tmp_path):
    exact = ExactIndex(ROWS)
    TableIndex.compute(exact, [QUERIES], 6, D_EMBED).save(tmp_path)
    alone = TableIndex.load(tmp_path)
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


def test_a_tree_is_tuned_to_a_recall_target(tmp_path):
    rows, queries = _clustered(2000, 64)
    config = ScannConfig(mode="tree", num_leaves=60, searched_share=0.02)
    index = ScannIndex.build(rows, config, tmp_path)
    expected = ExactIndex(rows).search(queries, 10).ids
    before = tuning.compute_recall(index, expected, queries)
    kinds = {"text": queries, "image": rows[:32]}
    reached = tuning.tune(index, tmp_path, rows, kinds, recall_target=0.95)
    # Reordering in bfloat16 bounds what 16 dimensions can reach, at about 0.965.
    assert before < 0.95 <= min(reached.values()) and set(reached) == set(kinds)
    assert 1 < index.settings["num_searched"] < 60
    opened = registry.open_index(tmp_path)
    np.testing.assert_array_equal(
        opened.search(queries, 10).ids, index.search(queries, 10).ids
    )
    assert tuning.compute_recall(opened, expected, queries) == reached["text"]
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 2"):
        tuning.tune(index, tmp_path, rows, kinds, recall_target=2)


def test_tuning_rescores_more_where_leaves_do_not_help(tmp_path, monkeypatch):
    """Coarse hashing, all leaves searched already: only rescoring is left."""
    monkeypatch.setattr(tuning, "_MOST_REORDERED", 0.5)
    rows, queries = _clustered(2000, 64)
    for mode in ("tree", "hash"):
        config = ScannConfig(mode=mode, num_leaves=10, searched_share=1.0)
        index = ScannIndex.build(rows, config, tmp_path / mode)
        index.settings["num_reordered"] = 10
        reached = tuning.tune(
            index, tmp_path / mode, rows, {"text": queries}, recall_target=0.95
        )
        assert reached["text"] >= 0.95
        assert 10 < index.settings["num_reordered"] <= 1000
        assert ScannIndex.load(tmp_path / mode).settings == index.settings


def test_a_target_out_of_reach_is_said(tmp_path, caplog):
    rows, queries = _clustered(2000, 64)
    config = ScannConfig(mode="tree", num_leaves=10, num_reordered=10)
    index = ScannIndex.build(rows, config, tmp_path)
    kinds = {"text": queries}
    with caplog.at_level("WARNING", "absl"):
        reached = tuning.tune(index, tmp_path, rows, kinds, recall_target=1.0)
    assert reached["text"] < 1.0 and index.settings["num_searched"] == 10
    assert 'lower the recall target, or use index="exact"' in caplog.text


def test_cost_counts_leaves_and_rescored_rows():
    tree = {
        "mode": "tree",
        "dimensions_per_block": 2,
        "num_leaves": 100,
        "num_searched": 5,
        "num_reordered": 10,
    }
    # A tenth of 1,000 rows of 4 bytes, and 10 rows of 32 bytes from anywhere.
    assert tuning.compute_cost(tree, 1000, 16) == 400 + 3 * 320
    hashed = {"mode": "hash", "dimensions_per_block": 2, "num_reordered": 10}
    assert tuning.compute_cost(hashed, 1000, 16) == 4000 + 3 * 320
