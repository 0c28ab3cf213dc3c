"""FAISS, besides the contract:

settings by size and width                     test_settings_follow_the_size_and_width
files of other kinds, that open more files     test_other_files_of_faiss_are_refused
threads of OpenMP                              test_threads_are_set_only_during_the_call
results that change with the number of queries test_batch_size_does_not_matter_…
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from index_vectors import QUERIES, ROWS, clustered

from racm3_jax import storage
from racm3_jax.index import faiss as faiss_index
from racm3_jax.index import registry, tuning
from racm3_jax.index.faiss import FaissConfig, FaissIndex

faiss = pytest.importorskip("faiss", reason="the extra [faiss] is not installed")
IVF = FaissConfig(mode="ivf", num_leaves=50, searched_share=0.1)


def test_settings_follow_the_size_and_width():
    resolve = faiss_index.resolve_settings
    assert resolve(FaissConfig(), 19_999, 768) == {"mode": "flat", "num_threads": 1}
    settings = resolve(FaissConfig(num_threads=2), 1_000_000, 768)
    assert settings == {
        "mode": "ivf",
        "num_threads": 2,
        "dimensions_per_code": 2,
        "num_leaves": 2000,
        "num_searched": 160,
        "num_reordered": 200,
    }
    assert resolve(FaissConfig("ivf"), 50_000, 15)["dimensions_per_code"] == 1
    graphs = range(faiss_index.FLAT_ROWS, faiss_index.GRAPH_ROWS)
    assert registry.TABLE["faiss"].fastest_at == graphs
    for num_rows in (20_000, 999_999):
        assert resolve(FaissConfig(), num_rows, 768) == {
            "mode": "hnsw",
            "num_threads": 1,
            "num_links": 32,
            "ef_search": 64,
        }
    # 384 codes of 4 bits; half precision; an id.
    assert FaissIndex.index_row_bytes(768) == 192 + 1536 + 8


@pytest.mark.parametrize("width", [15, 18])
def test_widths_that_are_not_a_multiple_of_4(tmp_path, width):
    rows, queries = (np.resize(x, (len(x), width)) for x in clustered(1000))
    index = FaissIndex.build(rows, tmp_path, FaissConfig("ivf", 10, searched_share=1))
    expected = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :5]
    assert (index.search(queries, 5).ids == expected).mean() > 0.95


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match=r"faiss\.mode must be .*; got 'tree'"):
        FaissConfig(mode="tree")
    with pytest.raises(
        ValueError, match=r"faiss\.num_links must be in 2\.\.512; got 1"
    ):
        FaissConfig(num_links=1)
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 2"):
        FaissConfig(searched_share=2)
    with pytest.raises(ValueError, match=r"faiss\.num_threads must be >= 1; got 0"):
        FaissConfig(num_threads=0)
    with pytest.raises(ValueError, match="needs >= 400 rows; there are 300"):
        FaissIndex.build(ROWS, tmp_path, FaissConfig("ivf", num_leaves=400))


def test_the_console_stays_silent(tmp_path, capfd):
    """FAISS only warns of few rows per leaf, which is our setting."""
    FaissIndex.build(ROWS, tmp_path, IVF)
    assert capfd.readouterr() == ("", "")


def test_more_leaves_and_rows_find_more(tmp_path):
    rows, queries = clustered(2000, 64)
    expected = np.argsort(-(queries @ rows.T), axis=1)[:, :10]

    def recall(**settings):
        index.settings.update(settings)
        found = index.search(queries, 10).ids
        pairs = zip(expected, found, strict=True)
        return np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])

    index = FaissIndex.build(rows, tmp_path, IVF)
    one_leaf = recall(num_searched=1, num_reordered=200)
    few_rows = recall(num_searched=50, num_reordered=20)
    assert max(one_leaf, few_rows) < 0.9
    assert recall(num_searched=50, num_reordered=200) > 0.99


def test_batch_size_does_not_matter_when_leaves_are_left_out(tmp_path):
    rows, queries = clustered(2000, 64)
    index = FaissIndex.build(rows, tmp_path, IVF)
    whole = index.search(queries, 10)
    for size in (1, 7, 20):
        parts = [index.search(queries[i : i + size], 10) for i in range(0, 64, size)]
        found = np.concatenate([p.ids for p in parts])
        np.testing.assert_array_equal(whole.ids, found)


def test_threads_are_set_only_during_the_call(tmp_path, monkeypatch):
    index = FaissIndex.build(ROWS, tmp_path, FaissConfig(num_threads=3))
    seen, search = [], index._index.search

    def watch(*arguments, **settings):
        seen.append(faiss.omp_get_max_threads())
        return search(*arguments, **settings)

    monkeypatch.setattr(index._index, "search", watch)
    before = faiss.omp_get_max_threads()
    index.search(QUERIES, 3)
    index.settings["num_threads"] = 1
    index.search(QUERIES, 3)
    assert seen == [3, 1] and faiss.omp_get_max_threads() == before


def _put(path, index):
    """Another index, with valid checksums."""
    faiss.write_index(index, str(path / "faiss.index"))
    content = json.loads((path / "index.json").read_bytes())
    del content["sha256"]
    content["files"] = storage.describe_files(path, ["faiss.index"])
    (path / "index.json").write_bytes(storage.encode_sealed(content))


def test_other_files_of_faiss_are_refused(tmp_path):
    for config in (IVF, FaissConfig("hnsw"), FaissConfig()):
        FaissIndex.build(ROWS, tmp_path, config)
        for recipe, rows, metric in (
            ("Flat", ROWS, faiss.METRIC_INNER_PRODUCT),
            ("SQfp16", ROWS, faiss.METRIC_L2),
            ("SQfp16", ROWS[:, :8].copy(), faiss.METRIC_INNER_PRODUCT),
            ("IVF20,Flat", ROWS, faiss.METRIC_INNER_PRODUCT),
            ("IVF20,Flat,RFlat", ROWS, faiss.METRIC_INNER_PRODUCT),
            ("IVF20,PQ8x4fs,RFlat", ROWS, faiss.METRIC_INNER_PRODUCT),
            ("HNSW8,Flat", ROWS, faiss.METRIC_INNER_PRODUCT),
            ("HNSW8,SQ8", ROWS, faiss.METRIC_L2),
        ):
            index = faiss.index_factory(rows.shape[1], recipe, metric)
            index.train(rows)
            index.add(rows)
            _put(tmp_path, index)
            with pytest.raises(storage.IntegrityError, match="is not a FAISS index of"):
                registry.open_index(tmp_path)


def test_files_that_faiss_cannot_read(tmp_path):
    FaissIndex.build(ROWS, tmp_path, IVF)
    file = tmp_path / "faiss.index"
    data = file.read_bytes()
    for damaged in (b"", data[:3], data[:4], data[: len(data) // 2], b"\x80" + data):
        file.write_bytes(damaged)
        with pytest.raises(storage.IntegrityError, match="faiss"):
            registry.open_index(tmp_path, verify=False)


def test_leaves_that_name_rows_which_do_not_exist(tmp_path):
    """A changed file can be opened, and gives no wrong results."""
    index = FaissIndex.build(ROWS, tmp_path, IVF)
    lists = faiss.downcast_index(index._index.base_index).invlists
    for leaf in range(IVF.num_leaves):
        ids = faiss.rev_swig_ptr(lists.get_ids(leaf), lists.list_size(leaf))
        ids[ids == 299] = 300
    with pytest.raises(storage.IntegrityError, match="is inconsistent"):
        index.search(ROWS[299:], 1)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("neighbors", lambda values: np.where(values >= 0, len(ROWS), values)),
        ("neighbors", lambda values: values[:-1]),
        ("levels", lambda values: values + 20),
        ("levels", lambda values: values * 0),
        ("offsets", lambda values: values + 1),
        ("cum_nneighbor_per_level", lambda values: values[::-1].copy()),
    ],
)
def test_graphs_with_links_that_lead_out_of_it_are_refused(tmp_path, column, change):
    index = FaissIndex.build(ROWS, tmp_path, FaissConfig("hnsw"))
    registry.open_index(tmp_path)
    vector = getattr(index._index.hnsw, column)
    values = faiss.vector_to_array(vector)
    faiss.copy_array_to_vector(change(values).astype(values.dtype), vector)
    _put(tmp_path, index._index)
    with pytest.raises(storage.IntegrityError, match="faiss"):
        registry.open_index(tmp_path)


def test_a_graph_without_its_first_row_is_refused(tmp_path):
    index = FaissIndex.build(ROWS, tmp_path, FaissConfig("hnsw"))
    for entry_point in (-1, len(ROWS)):
        index._index.hnsw.entry_point = entry_point
        _put(tmp_path, index._index)
        with pytest.raises(storage.IntegrityError, match="faiss"):
            registry.open_index(tmp_path)


def test_a_graph_is_searched_as_long_as_the_recall_needs(tmp_path):
    rows, queries = clustered(2000, 64)
    index = FaissIndex.build(rows, tmp_path, FaissConfig("hnsw", num_links=4))
    found = tuning.tune(index, tmp_path, rows, {"text": queries}, recall_target=0.99)
    tuned = index.settings["ef_search"]
    assert found["text"] >= 0.99 and 16 < tuned < 2000
    less = tuning.tune(index, tmp_path, rows, {"text": queries}, recall_target=0.9)
    assert 0.9 <= less["text"] and index.settings["ef_search"] < tuned


def test_opened_again_in_every_process(tmp_path):
    index = FaissIndex.build(ROWS, tmp_path)
    with pytest.raises(TypeError, match="cannot be sent to another process: open it"):
        copy.copy(index)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "faiss.index").mkdir()
    with pytest.raises(OSError, match="could not be written"):
        FaissIndex.build(ROWS, tmp_path)
