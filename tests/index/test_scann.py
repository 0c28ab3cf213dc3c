"""ScaNN's traps, besides those of the contract:

settings (768-d in blocks of 3; modes by size)   test_settings_follow_the_size
k above what is reordered                        test_more_is_returned_than_is_reordered
pickled ids; assets that name other files        test_pickled_ids_…, test_assets_…
results that change with the number of queries   test_batch_size_does_not_matter_…
searchers in other processes                     test_opened_again_in_every_process
TensorFlow that is installed                     test_tensorflow_is_hidden_…
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys

import numpy as np
import pytest
from index_vectors import QUERIES, ROWS, clustered

from racm3_jax import storage
from racm3_jax.index import registry
from racm3_jax.index import scann as scann_index
from racm3_jax.index.scann import ScannConfig, ScannIndex

TREE = ScannConfig(mode="tree", num_leaves=10, searched_share=0.8)


def test_the_format_of_the_last_version(tmp_path):
    """Its files open, since fields, settings and names are still the same."""
    ScannIndex.build(ROWS, tmp_path, TREE)
    content = json.loads((tmp_path / "index.json").read_bytes())
    files, names = content.pop("files"), "ah_codebook.pb bfloat16_dataset.npy "
    names += "datapoint_to_token.npy hashed_dataset.npy hashed_dataset_soar.npy "
    names += "scann_assets.pbtxt scann_config.pb serialized_partitioner.pb"
    assert list(files) == [f"scann/{name}" for name in names.split()]
    assert len(content.pop("sha256")) == 64
    assert content == {
        "format": "racm3-index",
        "format_version": 1,
        "kind": "scann",
        "num_rows": 300,
        "d_embed": 16,
        "settings": {
            "mode": "tree",
            "dimensions_per_block": 2,
            "anisotropic_threshold": 0.2,
            "num_reordered": 200,
            "num_leaves": 10,
            "num_searched": 8,
            "soar_lambda": 1.5,
        },
    }


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore")  # ScaNN leaves the file of ids open
def test_pickled_ids_are_never_read(tmp_path):
    """ScaNN would unpickle them, which runs their author's code."""
    path, ran = tmp_path / "index", tmp_path / "ran"
    ScannIndex.build(ROWS, path)
    with open(path / "scann" / "scann_docids.pkl", "wb") as file:
        pickle.dump(_Payload(ran), file)
    names = [name for name in storage.list_files(path) if name != "index.json"]
    for listed in (False, True):
        if listed:
            content = json.loads((path / "index.json").read_bytes())
            del content["sha256"]
            content["files"] = storage.describe_files(path, names)
            (path / "index.json").write_bytes(storage.encode_sealed(content))
        for load in (registry.open_index, ScannIndex.load):
            for verify in (True, False):
                with pytest.raises(storage.IntegrityError, match=r"scann_docids\.pkl"):
                    load(path, verify=verify)
    assert not ran.exists()
    scann_index.import_scann().load_searcher(
        str(path / "scann"), assets_backcompat_shim=False
    )
    assert ran.exists()  # the file was not a no-op


def test_assets_name_the_files_of_an_index_only(tmp_path):
    ScannIndex.build(ROWS, tmp_path, TREE)
    file = tmp_path / "scann" / "scann_assets.pbtxt"
    before = file.read_text()
    for wrong in ("../../secret.npy", "/etc/passwd", "x.npy"):
        file.write_text(before.replace("hashed_dataset.npy", wrong))
        with pytest.raises(storage.IntegrityError, match="lists files that our"):
            registry.open_index(tmp_path, verify=False)
    file.write_text(before + 'asset_path: "x"\n')
    with pytest.raises(storage.IntegrityError, match="lists files that our"):
        registry.open_index(tmp_path, verify=False)


def test_files_that_scann_cannot_read(tmp_path):
    ScannIndex.build(ROWS, tmp_path)
    (tmp_path / "scann" / "scann_config.pb").write_bytes(b"\xff" * 100)
    with pytest.raises(storage.IntegrityError, match="cannot be opened as an index of"):
        registry.open_index(tmp_path, verify=False)


def test_batch_size_does_not_matter_when_leaves_are_left_out(tmp_path):
    rows, queries = clustered(2000, 64)
    config = ScannConfig(mode="tree", num_leaves=50, searched_share=0.1)
    index = ScannIndex.build(rows, tmp_path, config)
    whole = index.search(queries, 10)
    for size in (1, 7):
        parts = [index.search(queries[i : i + size], 10) for i in range(0, 64, size)]
        found = np.concatenate([p.ids for p in parts])
        np.testing.assert_array_equal(whole.ids, found)


def test_more_is_returned_than_is_reordered(tmp_path):
    config = ScannConfig(mode="hash", num_reordered=20)
    found = ScannIndex.build(ROWS, tmp_path, config).search(QUERIES, 100)
    assert found.valid.all()


def test_opened_again_in_every_process(tmp_path):
    index = ScannIndex.build(ROWS, tmp_path)
    with pytest.raises(TypeError, match="cannot be sent to another process: open it"):
        copy.copy(index)  # asks as pickling does


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
    # Two leaves a row, 256 blocks of 4 bits in each; half precision; an id.
    assert ScannIndex.index_row_bytes(768) == 256 + 1536 + 8


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"scann\.mode must be .*; got 'trees'"):
        ScannConfig(mode="trees")
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 0"):
        ScannConfig(searched_share=0)


def test_cost_counts_leaves_and_rescored_rows():
    tree = {
        "mode": "tree",
        "dimensions_per_block": 2,
        "num_leaves": 100,
        "num_searched": 5,
        "num_reordered": 10,
    }
    index = ScannIndex(None, 1000, 16, tree)
    # A tenth of 1,000 rows of 4 bytes, and 10 rows of 32 bytes from anywhere.
    assert index.compute_cost(tree) == 400 + 3 * 320
    hashed = {"mode": "hash", "dimensions_per_block": 2, "num_reordered": 10}
    assert index.compute_cost(hashed) == 4000 + 3 * 320
