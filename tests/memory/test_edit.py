"""Changing memories: addition, removal, compaction, verification."""

from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest
from corpus_files import forty, line, write_corpus
from memory_fakes import FakeEmbedder, FakeTokenizer

from racm3_jax import storage
from racm3_jax.index import registry
from racm3_jax.index.folder import read_description
from racm3_jax.memory import edit
from racm3_jax.memory.builder import CorpusConfig, build_memory, make_chunk_builder
from racm3_jax.memory.memory import Memory, hash_name

MODELS = (FakeTokenizer(), FakeEmbedder())


@pytest.fixture(params=["exact", "scann"])
def config(request):
    return CorpusConfig(index=request.param, num_query_variants=2)


@pytest.fixture
def path(tmp_path, config):
    build_memory(
        forty(tmp_path / "in"),
        tokenizer=MODELS[0],
        embedder=MODELS[1],
        path=tmp_path / "memory",
        config=config,
    )
    return tmp_path / "memory"


def add(path, config, numbers, **more):
    source = write_corpus(path.parent / "more", [[line(n, **more) for n in numbers]])
    return edit.add_documents(path, source, make_chunk_builder(config, *MODELS))


def own_rows(memory, rows=None):
    rows = np.arange(len(memory)) if rows is None else np.asarray(rows)
    return memory.search(memory.queries(rows, "text"), 1).ids[:, 0].tolist()


def test_added_documents_are_found_at_once(path, config):
    with Memory.load(path) as before:
        counts = add(path, config, [40, 41, 42, 3])
        assert counts["added"] == 3 and counts["filtered"] == {"exact duplicate": 1}
        assert len(before) == 40 and own_rows(before) == list(range(40))
    with Memory.load(path) as memory:
        assert len(memory) == 43
        assert own_rows(memory) == list(range(43))
        assert memory.find(["doc-0", "doc-42"]).tolist() == [0, 42]
        mixed = [42, 0, 41, 39, 42]
        assert [d.id for d in memory.documents(mixed)] == [f"doc-{i}" for i in mixed]
        assert memory.manifest["num_with_modality"] == {"text": 43, "image": 43}
        assert memory.queries([42], "image", 2).shape == (1, 128)
    assert add(path, config, [50, 51])["added"] == 2
    assert add(path, config, [50], id="other")["filtered"] == {"exact duplicate": 1}
    with Memory.load(path) as memory:
        assert own_rows(memory) == list(range(45))
    assert edit.verify(path)["documents"] == 45


def test_searching_while_documents_are_added(path, config):
    """ScaNN crashes when its index changes during a search: ours never changes."""
    with Memory.load(path) as memory:
        queries = memory.queries(np.arange(40), "text")
        stop, found = threading.Event(), []

        def search():
            while not stop.is_set():
                found.append(memory.search(queries, 1).ids[:, 0].tolist())

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            add(path, config, [40, 41])
            memory.remove([39])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert len(found) >= 2 and all(f[:39] == list(range(39)) for f in found)
    with Memory.load(path) as memory:
        assert len(memory) == 42


def test_compaction_and_addition_keep_the_settings_of_the_build(tmp_path, monkeypatch):
    asked = []
    real = edit.writer.write_part

    def write_part(*arguments, **settings):
        asked.append((settings["rows_per_shard"], settings["recall_target"]))
        return real(*arguments, **settings)

    config = CorpusConfig("exact", num_query_variants=1, recall_target=0.9)
    source, path = forty(tmp_path / "in"), tmp_path / "memory"
    tokenizer, embedder = MODELS
    build_memory(
        source, tokenizer=tokenizer, embedder=embedder, path=path, config=config
    )
    monkeypatch.setattr(edit.writer, "write_part", write_part)
    add(path, config, [40])
    edit.compact(path)
    assert asked == [(None, 0.9)] * 2


def test_equal_to_a_memory_built_at_once(path, config, tmp_path):
    add(path, config, range(40, 48))
    source = write_corpus(
        tmp_path / "all", [[line(i) for i in range(s, s + 8)] for s in range(0, 48, 8)]
    )
    build_memory(
        source,
        tokenizer=MODELS[0],
        embedder=MODELS[1],
        path=tmp_path / "whole",
        config=config,
    )
    with Memory.load(path) as grown, Memory.load(tmp_path / "whole") as whole:
        queries = whole.queries(np.arange(48), "image")
        for a, b in zip(
            grown.search(queries, 9), whole.search(queries, 9), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_removal_holds_across_adding_and_compaction(path, config):
    with Memory.load(path) as memory:
        memory.remove([4, 5])
        add(path, config, range(40, 44))
        with Memory.load(path) as grown:
            assert grown.num_allowed == 42
            grown.remove([41])
        # The older reader is notified of the removal of a row that it does not have.
        assert memory.num_allowed == 38
        assert memory.remove([6]) == 1
    assert edit.verify(path) == {
        **edit.verify(path),
        "documents": 40,
        "removed": 4,
    }
    assert edit.compact(path) == 4
    assert edit.verify(path)["removed"] == 0
    with Memory.load(path) as memory:
        gone = memory.find(["doc-4", "doc-5", "doc-6", "doc-41"])
        assert gone.tolist() == [-1] * 4
        assert len(memory) == memory.num_allowed == 40
        assert own_rows(memory) == list(range(40))
        assert memory.find(["doc-43"]).tolist() == [39]
    gone = hash_name("doc-4").to_bytes(8, "little")
    for name in storage.list_files(path):
        # so that it is not added again
        kept_out = name == "compacted-00002/removed.npy"
        assert (gone in (path / name).read_bytes()) == kept_out
    top = sorted(os.listdir(path))
    assert top == ["compacted-00002", "deny-00002.json", "manifest.json"]
    assert add(path, config, [60])["added"] == 1
    with Memory.load(path) as memory:
        memory.remove([0])
        assert memory.num_allowed == 40
    assert edit.compact(path) == 1
    assert len(Memory.load(path)) == 40


def test_removed_documents_are_not_added_again_with_their_source(path, config):
    with Memory.load(path) as memory:
        memory.remove([4, 5])
    edit.compact(path)
    counts = add(path, config, [3, 4, 40])
    assert counts["added"] == 1
    assert counts["filtered"] == {"exact duplicate": 1, "removed before": 1}
    # The same document by another name, and after a further compaction.
    with Memory.load(path) as memory:
        memory.remove(memory.find(["doc-7"]))
    edit.compact(path)
    renamed = write_corpus(
        path.parent / "renamed", [[line(n, id=f"new-{n}") for n in (5, 7)]]
    )
    maker = make_chunk_builder(config, *MODELS)
    counts = edit.add_documents(path, renamed, maker)
    assert (counts["added"], counts["filtered"]) == (0, {"removed before": 2})
    counts = edit.add_documents(path, renamed, maker, restore=True)
    assert (counts["added"], counts["filtered"]) == (2, {})
    assert edit.verify(path)["documents"] == 40


def test_a_reader_opened_before_a_compaction_gets_an_error(path, config):
    with Memory.load(path) as memory:
        memory.remove([1])
        edit.compact(path)
        with pytest.raises(storage.IntegrityError, match="open it again"):
            memory.search(memory.embeddings[:1], 1)
        with pytest.raises(ValueError, match="open it again"):
            memory.remove([2])


@pytest.mark.parametrize("change", ["add", "compact"])
def test_a_change_that_fails_leaves_nothing(path, config, monkeypatch, change):
    with Memory.load(path) as memory:
        memory.remove([1])
    before = {n: (path / n).read_bytes() for n in storage.list_files(path)}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(edit.format_lib, "write_manifest", fail)
    with pytest.raises(OSError, match="no space"):
        add(path, config, [70]) if change == "add" else edit.compact(path)
    monkeypatch.undo()
    after = {n: (path / n).read_bytes() for n in storage.list_files(path)}
    # The deny list of a compaction has its own name, and is used from the next change on.
    assert {n: after[n] for n in before} == before
    assert set(after) - set(before) <= {"deny-00001.json"}
    with Memory.load(path) as memory:
        assert memory.num_allowed == 39
    assert edit.compact(path) == 1
    assert edit.verify(path)["documents"] == 39
    assert not [n for n in os.listdir(path.parent) if n.startswith(".")]


def test_leftovers_of_a_killed_writer_are_named_and_deleted(path, config):
    (path / "added-00001").mkdir()
    (path / "added-00001" / "modalities-00000.npy").write_bytes(b"half")
    (path / ".compacted-00001.partial").mkdir()
    (path / ".deny.json.partial").write_bytes(b"half")
    words = r"added-00001/.*run racm3 memory remove --compact --memory="
    with pytest.raises(storage.IntegrityError, match=words):
        edit.verify(path)
    assert edit.compact(path) == 0
    assert edit.verify(path)["documents"] == 40
    assert sorted(os.listdir(path)) == sorted(
        {name.split("/")[0] for name in storage.list_files(path)}
    )


def test_adding_keeps_the_kind_of_index(path, config):
    add(path, config, [40, 41])
    with Memory.load(path) as memory:
        assert {
            json.loads((path / prefix / "index" / "index.json").read_text())["kind"]
            for prefix in ("", "added-00001")
        } == {memory.manifest["index"]}


def test_a_second_folder_with_the_same_names(path, config):
    """Every camera counts from IMG_0001: an equal id is not a duplicate."""
    counts = add(path, config, [50, 51], id="doc-3")
    assert (counts["added"], counts["renamed"], counts["filtered"]) == (2, 2, {})
    with Memory.load(path) as memory:
        ids = [d.id for d in memory.documents([40, 41])]
        assert all(i.startswith("doc-3#") for i in ids) and len(set(ids)) == 2
        assert memory.find(["doc-3", *ids]).tolist() == [3, 40, 41]
    again = add(path, config, [50, 51], id="doc-3")
    assert (again["added"], again["filtered"]) == (0, {"exact duplicate": 2})


def test_an_older_deny_list_is_detected(path, config):
    with Memory.load(path) as memory:
        memory.remove([1])
        older = (path / "deny.json").read_bytes()
        memory.remove([2])
        (path / "deny.json").write_bytes(older)
    with pytest.raises(storage.IntegrityError, match="older than .*version 1 of 2"):
        Memory.load(path)


def test_finding_what_to_remove(path, config):
    with Memory.load(path) as memory:
        assert edit.find_urls(memory, "http://site3/*").tolist() == [*range(3, 40, 4)]
        assert edit.find_urls(memory, "doc-7").tolist() == [7]
        query = memory.image_embeddings[[9]][0]
        rows, scores = edit.find_similar_images(memory, query)
        assert rows.tolist() == [9] and scores[0] > 0.999
        rows, scores = edit.find_similar_images(memory, query, 0.5)
        assert rows[0] == 9 and {8, 10, 11} <= set(rows.tolist())
        assert (np.diff(scores) <= 0).all()
        memory.remove([9])
        assert 9 not in edit.find_similar_images(memory, query, 0.5)[0]


def test_other_models_and_an_empty_rest_are_refused(path, config):
    maker = make_chunk_builder(config, FakeTokenizer(), FakeEmbedder("encoder-2"))
    with pytest.raises(ValueError, match="built with encoder encoder-1"):
        edit.add_documents(path, f"jsonl:{path}/x", maker)
    maker = make_chunk_builder(CorpusConfig(num_query_variants=1), *MODELS)
    with pytest.raises(ValueError, match="has 2 query variants; got 1"):
        edit.add_documents(path, f"jsonl:{path}/x", maker)
    with Memory.load(path) as memory:
        memory.remove(np.arange(40))
    with pytest.raises(ValueError, match="nothing would be left"):
        edit.compact(path)


@pytest.mark.parametrize("kind", registry.list_kinds())
def test_added_documents_and_compaction_keep_the_kind_of_index(tmp_path, kind):
    if not registry.is_installed(kind):
        pytest.skip(f"the library of {kind} is not installed")
    config = CorpusConfig(index=kind, num_query_variants=2)
    path, models = tmp_path / "memory", {"tokenizer": MODELS[0], "embedder": MODELS[1]}
    build_memory(forty(tmp_path / "in"), path=path, config=config, **models)
    add(path, config, [40])
    for folder in ("added-00001", "compacted-00002"):
        assert read_description(path / folder / "index").kind == kind
        with Memory.load(path) as memory:
            assert own_rows(memory) == list(range(41 if "added" in folder else 40))
            assert memory.manifest["index"] == kind
            memory.remove([0])
        edit.compact(path)
