"""One tuner for every back end that has settings."""

from __future__ import annotations

import numpy as np
import pytest
from index_vectors import clustered

from racm3_jax.index import registry, streaming, tuning
from racm3_jax.index.faiss import FaissConfig, FaissIndex
from racm3_jax.index.scann import ScannConfig, ScannIndex

# A tree of this many leaves.
TREES = {
    "scann": lambda rows, path, leaves: ScannIndex.build(
        rows, path, ScannConfig("tree", leaves, searched_share=0.02)
    ),
    "faiss": lambda rows, path, leaves: FaissIndex.build(
        rows, path, FaissConfig("ivf", leaves, searched_share=0.02)
    ),
}


@pytest.fixture(params=TREES)
def build(request):
    if not registry.is_installed(request.param):
        pytest.skip(f"the library of {request.param} is not installed")
    return TREES[request.param]


def test_a_tree_is_tuned_to_a_recall_target(build, tmp_path):
    rows, queries = clustered(2000, 64)
    index = build(rows, tmp_path, 60)
    expected = streaming.find_exact(rows, queries, 10)
    before = tuning.compute_recall(index, expected, queries)
    kinds = {"text": queries, "image": rows[:32]}
    reached = tuning.tune(index, tmp_path, rows, kinds, recall_target=0.95)
    # Rescoring in bfloat16 bounds what 16 dimensions can reach, at about 0.965.
    assert before < 0.95 <= min(reached.values()) and set(reached) == set(kinds)
    assert 1 < index.settings["num_searched"] < 60
    opened = registry.open_index(tmp_path)
    np.testing.assert_array_equal(
        opened.search(queries, 10).ids, index.search(queries, 10).ids
    )
    assert tuning.compute_recall(opened, expected, queries) == reached["text"]
    again = build(rows, tmp_path / "again", 60)
    tuning.tune(again, tmp_path / "again", rows, kinds, recall_target=0.95)
    assert again.settings == index.settings
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 2"):
        tuning.tune(index, tmp_path, rows, kinds, recall_target=2)


def test_tuning_rescores_more_where_leaves_do_not_help(build, tmp_path, monkeypatch):
    """Coarse codes, all leaves searched already: only rescoring is left."""
    monkeypatch.setattr(tuning, "_MOST_REORDERED", 0.5)
    monkeypatch.setattr(tuning, "_FIRST_LEAVES", 1)
    rows, queries = clustered(2000, 64)
    index = build(rows, tmp_path, 10)
    index.settings["num_reordered"] = 10
    reached = tuning.tune(index, tmp_path, rows, {"text": queries}, recall_target=0.95)
    assert reached["text"] >= 0.95
    assert 10 < index.settings["num_reordered"] <= 1000
    assert type(index).load(tmp_path).settings == index.settings


def test_hashing_without_a_tree_rescores_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_MOST_REORDERED", 0.5)
    rows, queries = clustered(2000, 64)
    index = ScannIndex.build(rows, tmp_path, ScannConfig("hash", num_reordered=10))
    reached = tuning.tune(index, tmp_path, rows, {"text": queries}, recall_target=0.95)
    assert reached["text"] >= 0.95
    assert 10 < ScannIndex.load(tmp_path).settings["num_reordered"] <= 1000


def test_a_target_out_of_reach_is_reported(build, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tuning, "_MOST_REORDERED", 0)
    rows, queries = clustered(2000, 64)
    index = build(rows, tmp_path, 10)
    index.settings["num_reordered"] = 10
    kinds = {"text": queries}
    with caplog.at_level("WARNING", "absl"):
        reached = tuning.tune(index, tmp_path, rows, kinds, recall_target=1.0)
    assert reached["text"] < 1.0 and index.settings["num_searched"] == 10
    assert 'lower the recall target, or use index="exact"' in caplog.text


@pytest.mark.parametrize("kind", registry.list_kinds())
def test_a_small_index_has_nothing_to_tune(kind, tmp_path):
    if not registry.is_installed(kind):
        pytest.skip(f"the library of {kind} is not installed")
    rows, queries = clustered()

    def tune(index, path, rows):
        before = (path / "index.json").read_bytes()
        found = tuning.tune(index, path, rows, {"text": queries}, recall_target=0.9)
        assert found["text"] > 0.99
        assert (path / "index.json").read_bytes() == before

    registry.build_index(kind, rows, tmp_path, rows_per_shard=200, tune=tune)
