"""One contract for every line of the registry's table, and for settings of some:

recall, scores, order; unfilled slots; k > rows    test_finds_the_nearest, test_slots_…
one row, no queries, queries one by one            test_one_row, test_no_queries, …
rows, queries that are not finite                  test_rows_must_…, test_queries_must_…
built and opened; in another place                 test_saved_and_opened
equal in every process                             test_builds_are_equal_in_every_process
searched by threads at once                        test_threads_find_the_same
damaged files that load                            test_every_flipped_byte_is_detected
a full disk                                        test_a_full_disk_leaves_no_index
files that run code, links, any other file         test_nothing_else_may_be_in_the_folder
fields and settings of wrong types                 test_descriptions_…, test_settings_…
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from index_vectors import D_EMBED, NUM_ROWS, QUERIES, ROWS, make_table

from racm3_jax import storage
from racm3_jax.index import registry
from racm3_jax.index.contract import Backend
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.faiss import FaissConfig, FaissIndex
from racm3_jax.index.scann import ScannConfig, ScannIndex

KINDS = list(dict.fromkeys([*registry.TABLE, *registry.list_kinds()]))


def _build(kind, rows, path):
    """Any kind of the table; a sharded one has four shards."""
    return registry.build_index(kind, rows, path, rows_per_shard=90)


def _compute_table(rows, path):
    return make_table(path, rows, [QUERIES[:7], QUERIES[7:]], len(rows))


def _exact(rows, path, **settings):
    index = ExactIndex(rows, **settings)
    index.save(path)
    return index


# Kinds that are built of something else, or have settings that take other paths.
VARIANTS = {
    "table": _compute_table,
    "exact, blocks": lambda rows, path: _exact(rows, path, block_rows=64),
    "exact, devices": lambda rows, path: _exact(rows, path, devices=jax.devices()),
    "exact, both": lambda rows, path: _exact(
        rows, path, devices=jax.devices()[:3], block_rows=7
    ),
    "scann, hash": lambda rows, path: ScannIndex.build(
        rows, path, ScannConfig(mode="hash")
    ),
    "scann, tree": lambda rows, path: ScannIndex.build(
        rows, path, ScannConfig(mode="tree", num_leaves=10, searched_share=0.8)
    ),
    "faiss, ivf": lambda rows, path: FaissIndex.build(
        rows, path, FaissConfig(mode="ivf", num_leaves=10, searched_share=0.8)
    ),
    "faiss, hnsw": lambda rows, path: FaissIndex.build(
        rows, path, FaissConfig(mode="hnsw")
    ),
}
NEEDS_ROWS = ("scann, hash", "scann, tree", "faiss, ivf")


CASES = [*KINDS, *(v for v in VARIANTS if v not in KINDS)]


def _is_installed(case):
    return registry.is_installed(case.split(",")[0])


def _build_case(case, rows, path):
    build = VARIANTS.get(case)
    return build(rows, path) if build else _build(case, rows, path)


@pytest.fixture(params=CASES)
def case(request):
    if not _is_installed(request.param):
        pytest.skip(f"the library of {request.param} is not installed")
    return request.param


@pytest.fixture
def build(case):
    return functools.partial(_build_case, case)


@pytest.fixture
def index(build, tmp_path):
    return build(ROWS, tmp_path / "index")


def _edit(path, change):
    """Changes a description, with new checksums."""
    file = path / "index.json"
    content = json.loads(file.read_bytes())
    del content["sha256"]
    change(content)
    file.write_bytes(storage.encode_sealed(content))


def test_every_line_of_the_table():
    for kind in registry.TABLE:
        backend = registry.get_backend(kind)
        assert issubclass(backend, Backend) and backend.kind == kind
        assert backend.index_row_bytes(768) > 0 and backend.build_ram_factor >= 1
    assert set(KINDS) == {*registry.TABLE, *registry.list_kinds()}


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


def test_one_row(case, build, tmp_path):
    """For all kinds: `memory add` keeps the memory's kind."""
    if case in NEEDS_ROWS:
        with pytest.raises(ValueError, match="needs >= 16 rows; there are 1"):
            build(ROWS[:1], tmp_path)
        return
    found = build(ROWS[:1], tmp_path).search(QUERIES[:2], 3)
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


def test_threads_find_the_same(index):
    expected = index.search(QUERIES, 10).ids
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: index.search(QUERIES, 10), range(24)):
            np.testing.assert_array_equal(found.ids, expected)


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


def test_rows_must_be_finite(build, tmp_path):
    rows = ROWS.copy()
    rows[[7, 9], 0] = np.nan
    with pytest.raises(ValueError, match=r"row 7 has .* not finite \(2 of 300"):
        build(rows, tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        build(rows[:0], tmp_path)


def test_saved_and_opened(index, tmp_path):
    (tmp_path / "index").rename(tmp_path / "moved")
    for name in storage.list_files(tmp_path / "moved"):
        data = (tmp_path / "moved" / name).read_bytes()
        assert str(tmp_path).encode() not in data, name
    opened = registry.open_index(tmp_path / "moved", ROWS)
    assert type(opened) is type(index) and len(opened) == NUM_ROWS
    expected, found = index.search(QUERIES, 12), opened.search(QUERIES, 12)
    np.testing.assert_array_equal(expected.ids, found.ids)
    np.testing.assert_array_equal(expected.valid, found.valid)
    np.testing.assert_allclose(expected.scores, found.scores, atol=1e-6)


@pytest.fixture(scope="module")
def built_elsewhere(tmp_path_factory):
    """The indexes of all cases, built by one other process, in the reverse order."""
    folder = tmp_path_factory.mktemp("elsewhere")
    program = (
        "import pathlib, sys, test_index\n"
        "for case in sys.argv[2:]:\n"
        "    path = pathlib.Path(sys.argv[1], case)\n"
        "    test_index._build_case(case, test_index.ROWS, path)\n"
    )
    here = pathlib.Path(__file__)
    places = map(str, (here.parents[2], here.parents[1], here.parent))
    subprocess.run(
        [sys.executable, "-c", program, folder, *filter(_is_installed, CASES[::-1])],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )
    return folder


def test_builds_are_equal_in_every_process(case, index, built_elsewhere, tmp_path):
    assert _digests(tmp_path / "index") == _digests(built_elsewhere / case)


def _digests(directory):
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in storage.list_files(directory)
    }


def test_every_flipped_byte_is_detected(index, tmp_path):
    names = storage.list_files(tmp_path / "index")
    assert names
    for name in names:
        file = tmp_path / "index" / name
        data = file.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            damaged = bytearray(data)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(storage.IntegrityError, match=file.name):
                registry.open_index(tmp_path / "index", ROWS)
        file.unlink()
        with pytest.raises((storage.IntegrityError, FileNotFoundError), match=name):
            registry.open_index(tmp_path / "index", ROWS, verify=False)
        file.write_bytes(data)
    registry.open_index(tmp_path / "index", ROWS)


def test_a_full_disk_leaves_no_index(build, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(storage, "sync_file", fail)
    monkeypatch.setattr(storage, "write_file", fail)
    with pytest.raises(OSError, match="no space"):
        build(ROWS, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        registry.open_index(tmp_path)


def _folders(path):
    """The descriptions of the index and of each index in it, innermost last."""
    return sorted(file.parent for file in path.rglob("index.json"))


@pytest.fixture
def unseen(case, monkeypatch):
    """Fails when a back end is given a folder to open."""

    def fail(*_):
        raise AssertionError("a library was given the folder")

    monkeypatch.setattr(registry.get_backend(case.split(",")[0]), "_open", fail)


NAMES = ("scann/scann_docids.pkl", "scann/int8_dataset.npy", "x", ".x", "a/b/c.npy")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_may_be_in_the_folder(index, unseen, tmp_path, name):
    """Listed or not, with any checksums."""
    path = tmp_path / "index"
    for folder in _folders(path):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises(storage.IntegrityError, match=file.name):
            registry.open_index(path, ROWS)
        # Listed by every description on its path, innermost first.
        for owner in reversed([f for f in _folders(path) if file.is_relative_to(f)]):

            def list_all(content, owner=owner):
                names = [n for n in storage.list_files(owner) if n != "index.json"]
                content["files"] = storage.describe_files(owner, names)

            _edit(owner, list_all)
        for verify in (True, False):
            with pytest.raises(storage.IntegrityError, match="it is not opened"):
                registry.open_index(path, ROWS, verify=verify)
        return


def test_links_are_not_followed(index, unseen, tmp_path):
    path = tmp_path / "index"
    for name in storage.list_files(path):
        file, other = path / name, tmp_path / "other"
        file.rename(other)
        file.symlink_to(other)
        with pytest.raises((storage.IntegrityError, FileNotFoundError), match="index"):
            registry.open_index(path, ROWS)
        file.unlink()
        other.rename(file)
    (path / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(storage.IntegrityError, match="'link', a link"):
        registry.open_index(path, ROWS)
    (path / "link").unlink()
    os.mkfifo(path / "pipe")
    with pytest.raises(storage.IntegrityError, match="'pipe', a link or no"):
        registry.open_index(path, ROWS)


WRONG_FIELDS = {
    "kind": (3, None, ["exact"], "nonsense", "exact_sharded", "table_sharded"),
    "num_rows": ("300", True, 0, -1, 2.5, None),
    "d_embed": ("16", False, 0, None),
    "settings": ([], None, "mode"),
    "files": (
        [],
        None,
        {"../x": {"bytes": 1, "sha256": "0" * 64}},
        {"/x": {"bytes": 1, "sha256": "0" * 64}},
        {"x": {"bytes": "1", "sha256": "0" * 64}},
        {"x": {"bytes": 1, "sha256": 5}},
        {"x": 5},
    ),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_descriptions_are_checked(index, unseen, tmp_path, field):
    path = tmp_path / "index"
    before = (path / "index.json").read_bytes()
    for value in WRONG_FIELDS[field]:
        _edit(path, lambda content, value=value: content.update({field: value}))
        with pytest.raises(storage.IntegrityError) as error:
            registry.open_index(path, ROWS)
        assert "rebuild the index" in str(error.value) and str(path) in str(error.value)
        (path / "index.json").write_bytes(before)


def test_settings_are_checked(index, tmp_path):
    """Every setting of a search, of every index in the folder."""
    for folder in _folders(tmp_path / "index"):
        before = (folder / "index.json").read_bytes()
        content = json.loads(before)
        if content["kind"] in registry.TABLE:
            backend = registry.get_backend(content["kind"])
            size = content["num_rows"], content["d_embed"]
            names = backend.allowed_settings(content["settings"], *size)
        else:
            names = ["starts"]
        for name in names:
            for value in (None, "x", [], -1, 2.5, True, 10**30, {"a": 1}):
                _edit(folder, lambda c, n=name, v=value: c["settings"].update({n: v}))
                with pytest.raises(storage.IntegrityError, match=f'"{name}" must be'):
                    registry.open_index(tmp_path / "index", ROWS, verify=False)
            (folder / "index.json").write_bytes(before)


def test_an_index_of_other_rows_is_detected(index, case, tmp_path):
    """The description has another number of rows than the files."""
    path = tmp_path / "index"
    if case == "table" or case.startswith("exact"):
        with pytest.raises(
            ValueError, match=r"\[300, 16\] embeddings; got \[299, 16\]"
        ):
            registry.open_index(path, ROWS[1:])
        return
    for num_rows in (299, 301):
        _edit(path, lambda content, n=num_rows: content.update(num_rows=n))
        with pytest.raises(storage.IntegrityError, match=r" rows "):
            registry.open_index(path)


def test_a_deep_description(tmp_path):
    (tmp_path / "index.json").write_bytes(b'{"a":' * 100_000)
    with pytest.raises(storage.IntegrityError, match=r"index\.json"):
        registry.open_index(tmp_path)


def test_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        registry.open_index(tmp_path / "none")


def test_kinds(monkeypatch):
    with pytest.raises(ValueError, match='"auto" or one of "scann".*; got \'hnsw\''):
        registry.choose_kind("hnsw", 10)
    with pytest.raises(ValueError, match="got 'table'"):
        registry.choose_kind("table", 10)
    installed = {"scann", "faiss"}
    monkeypatch.setattr(
        registry, "is_installed", lambda kind: kind in installed or kind == "exact"
    )
    assert registry.choose_kind("auto", 10) == "exact"
    for num_rows, kind in ((10_000, "scann"), (50_000, "faiss"), (2_000_000, "scann")):
        assert registry.choose_kind("auto", num_rows) == kind
    installed.remove("scann")
    assert registry.choose_kind("auto", 10_000) == "faiss"
    installed.remove("faiss")
    assert registry.choose_kind("auto", 50_000) == "exact"


def test_a_library_that_is_not_installed(monkeypatch, tmp_path):
    ScannIndex.build(ROWS, tmp_path)
    for name, advice in (("scann", "Linux"), ("faiss", "pip install faiss-cpu")):
        for module in (name, f"{name}.scann_ops.py"):
            monkeypatch.setitem(sys.modules, module, None)
        for kind in (name, f"{name}_sharded"):
            with pytest.raises(ValueError, match=advice):
                registry.choose_kind(kind, 10_000)
    with pytest.raises(ValueError, match="ScaNN cannot be imported here"):
        registry.open_index(tmp_path)
    assert registry.choose_kind("auto", 10_000) == "exact"


def test_a_build_is_split_to_fit_the_memory():
    row_bytes = 4 * 16 * ScannIndex.build_ram_factor
    fit = registry.fit_ram
    assert fit("scann", 5000, 16, 5000 * row_bytes) == ("scann", None)
    assert fit("scann", 5000, 16, 2000 * row_bytes) == ("scann_sharded", 2000)
    assert fit("scann_sharded", 5000, 16, 1e9) == ("scann_sharded", 5000)
    assert fit("scann", 5000, 16, -1) == ("scann_sharded", registry.MIN_ROWS)
    assert fit("exact", 5000, 16, 0) == ("exact", None)
