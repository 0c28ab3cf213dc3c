"""Files allowed in a memory's folder, and the contents of its manifest."""

from __future__ import annotations

import json
import pathlib
import zipfile

import numpy as np
import pytest
from corpus_files import line, write_corpus
from memory_fakes import FakeEmbedder, FakeTokenizer

from racm3_jax import storage
from racm3_jax.memory import edit
from racm3_jax.memory import format as format_lib
from racm3_jax.memory.config import CorpusConfig, make_chunk_builder
from racm3_jax.memory.memory import Memory

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "memory" / "last_version.zip"
MODELS = (FakeTokenizer(), FakeEmbedder())


@pytest.fixture
def path(build, documents):
    memory = build(documents[:6], num_query_variants=1)
    memory.close()
    return memory.path


def rewrite_manifest(path, **changes):
    """Changes the manifest, with new checksums."""
    manifest = {**json.loads((path / "manifest.json").read_bytes()), **changes}
    manifest.pop("sha256")
    (path / "manifest.json").write_bytes(storage.encode_sealed(manifest))


def listed(path, *names):
    manifest = format_lib.read_manifest(path)
    return {**manifest["files"], **storage.describe_files(path, names)}


@pytest.mark.parametrize("name", ["from_source", "from_python"])
def test_a_memory_of_the_last_version_opens_and_grows(tmp_path, name):
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(tmp_path)
    path = tmp_path / name
    size, allowed = {"from_source": (9, 8), "from_python": (4, 4)}[name]
    with Memory.load(path, FakeEmbedder(), FakeTokenizer()) as memory:
        assert (len(memory), memory.num_allowed) == (size, allowed)
        rows = memory.allowed_ids()
        found = memory.search(memory.queries(rows, "text"), 1).ids[:, 0]
        assert found.tolist() == rows.tolist()
        fingerprint = memory.fingerprint()
        memory.remove([0])
        assert memory.num_allowed == allowed - 1
    with Memory.load(path) as memory:
        assert memory.fingerprint() == fingerprint
    source = write_corpus(tmp_path / "more", [[line(n) for n in (20, 21)]])
    maker = make_chunk_builder(CorpusConfig(num_query_variants=1), *MODELS)
    assert edit.add_documents(path, source, maker)["added"] == 2
    assert edit.verify(path)["documents"] == allowed + 1
    assert edit.compact(path) >= 1
    assert edit.verify(path)["documents"] == allowed + 1


@pytest.mark.parametrize(
    "name",
    [
        *("x.pkl", "table/../x", "index.npy", "notes.txt", ".DS_Store", "added-1/x"),
        *("other/embeddings_text-00000.npy", "added-00001/manifest.json"),
        "added-00001/added-00002/removed.npy",
    ],
)
def test_other_files_in_a_memory_are_refused(path, name):
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"cos\nsystem\n")
    with pytest.raises(
        storage.IntegrityError, match="not a file of a memory .*remove it"
    ):
        Memory.load(path)
    rewrite_manifest(path, files=listed(path, name))
    with pytest.raises(storage.IntegrityError, match="not a file of a memory"):
        Memory.load(path)


def test_leftovers_of_a_killed_writer_are_ignored(path):
    (path / ".added-00001.partial").mkdir()
    (path / ".added-00001.partial" / "half.pkl").write_bytes(b"x")
    (path / ".deny.json.partial").write_bytes(b"x")
    Memory.load(path).close()


def test_a_planted_pickle_of_the_index_is_refused_with_any_checksums(build, documents):
    memory = build(documents, index="scann")
    memory.close()
    path, name = memory.path, "index/scann/scann_docids.pkl"
    (path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/planted'\ntR.")
    description = json.loads((path / "index" / "index.json").read_bytes())
    description.pop("sha256")
    inner = name.removeprefix("index/")
    description["files"] |= storage.describe_files(path / "index", [inner])
    (path / "index" / "index.json").write_bytes(storage.encode_sealed(description))
    rewrite_manifest(path, files=listed(path, name, "index/index.json"))
    with pytest.raises(storage.IntegrityError, match=r"scann_docids\.pkl"):
        Memory.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_documents", "6"),
        ("num_documents", 0),
        pytest.param("num_documents", 7, id="column"),
        ("num_with_modality", [1]),
        ("num_with_modality", {"text": 6, "image": -1}),
        pytest.param("d_embed", 12, id="column"),
        ("num_query_variants", 2.5),
        pytest.param("num_query_variants", 2, id="column"),
        ("query_drop", "much"),
        ("index", 3),
        ("index", "../exact"),
        ("vocab", {"num_text_ids": "many"}),
        ("vocab", {"num_text_ids": 4, "unexpected": 4}),
        ("encoder_fingerprint", None),
        ("files", ["a"]),
        ("parts", []),
        ("parts", [{"prefix": "../outside/", "num_documents": 6}]),
        ("parts", [{"prefix": "", "num_documents": 3}]),
        ("deny_file", "../x"),
        ("deny_file", "manifest.json"),
        ("deny_version", -1),
        ("removed_file", "../removed.npy"),
        ("lineage", 3),
        ("rows_per_shard", "all"),
        ("report", "fine"),
    ],
)
def test_a_manifest_of_wrong_types_is_refused_in_a_sentence(
    path, field, value, request
):
    lineage = format_lib.lineage(format_lib.read_manifest(path))
    rewrite_manifest(path, **{"lineage": lineage, field: value})
    is_column = "column" in request.node.callspec.id
    words = r"column \w+ of" if is_column else field.removesuffix("s")
    with pytest.raises(ValueError, match=words):
        Memory.load(path)


def test_columns_match_the_manifest(path):
    name = "embeddings_text-00000.npy"
    rows = np.load(path / name)
    for wrong in (
        rows[:-1],
        rows.astype("<f8"),
        rows[:, :-1],
        rows[0, 0],
        np.asfortranarray(rows)[None],
        np.asarray([{}]),
    ):
        np.save(path / name, wrong, allow_pickle=True)
        rewrite_manifest(path, files=listed(path, name))
        with pytest.raises(storage.IntegrityError, match="column embeddings_text"):
            Memory.load(path)
    (path / name).unlink()
    files = {k: v for k, v in listed(path).items() if k != name}
    rewrite_manifest(path, files=files)
    with pytest.raises(storage.IntegrityError, match="column embeddings_text"):
        Memory.load(path)


@pytest.mark.parametrize("rows", ["all", [1.5], [-1], [10**9], [[1]], {"1": 2}])
def test_a_deny_list_of_wrong_types_is_refused_in_a_sentence(path, rows):
    content = json.loads((path / "deny.json").read_bytes())
    content.pop("sha256")
    (path / "deny.json").write_bytes(storage.encode_sealed({**content, "rows": rows}))
    with pytest.raises(storage.IntegrityError, match=r"deny\.json"):
        Memory.load(path)


def test_deep_json_is_refused_in_a_sentence(path):
    (path / "manifest.json").write_bytes(b'{"a":' + b"[" * 200_000)
    with pytest.raises(storage.IntegrityError, match=r"manifest\.json is corrupt"):
        Memory.load(path)
    assert not format_lib.is_memory(path)
