"""Memories: round trips, damage, mismatched encoders, building."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
from memory_fakes import D_EMBED, FakeEmbedder, FakeTokenizer, make_document

from racm3_jax import storage
from racm3_jax.memory import builder, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Segment


def _bytes_of(path):
    return {name: (path / name).read_bytes() for name in storage.list_files(path)}


def test_documents_round_trip(build, documents):
    memory = build(documents)
    expected = list(FakeTokenizer().tokenize(documents))
    ids = np.asarray([3, 0, 39, 3])
    assert len(memory) == 40
    for row, found in zip(ids, memory.documents(ids), strict=True):
        assert found.id == expected[row].id
        assert dict(found.metadata) == expected[row].metadata
        for a, b in zip(found.segments, expected[row].segments, strict=True):
            assert a.modality == b.modality
            np.testing.assert_array_equal(a.tokens, b.tokens)
    assert memory.metadata([5])[0]["nation"] == 1
    assert memory.documents(np.zeros(0, np.int64)) == []


def test_embeddings_round_trip(build, documents):
    memory = build(documents)
    text, image, document = FakeEmbedder().embed_documents(documents)
    np.testing.assert_array_equal(memory.embeddings[:], document)
    np.testing.assert_array_equal(memory.text_embeddings[:], text)
    np.testing.assert_array_equal(np.asarray(memory.image_embeddings), image)
    assert memory.embeddings[np.zeros((2, 3), int)].shape == (2, 3, D_EMBED)
    assert memory.d_embed == D_EMBED


def test_queries(build, documents):
    memory = build(documents)
    ids = np.arange(40)
    text, image, _ = FakeEmbedder().embed_documents(documents)
    np.testing.assert_allclose(memory.queries(ids, "text", 0), text, atol=1e-6)
    np.testing.assert_allclose(memory.queries(ids, "image", 0), image, atol=1e-6)
    seen = [memory.queries(ids, "text", variant) for variant in (0, 1, 2)]
    for queries in seen:
        np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
        assert ((queries * text).sum(axis=1) > 0.9).all()
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[1], seen[2])
    assert memory.queries(ids[:0], "image", 1).shape == (0, D_EMBED)
    with pytest.raises(ValueError, match=r"variant 3 does not exist.*0\.\.2"):
        memory.queries(ids, "text", 3)
    with pytest.raises(ValueError, match='"text" or "image"; got \'sound\''):
        memory.queries(ids, "sound", 0)
    with pytest.raises(IndexError, match=r"row 40 does not exist.*rows 0\.\.39"):
        memory.queries(np.asarray([40]), "text", 0)


def test_documents_with_one_modality(build):
    pair = make_document(0).segments
    memory = build(
        [
            make_document(0),
            make_document(1, segments=pair[:1]),
            make_document(2, segments=pair[1:]),
            make_document(3, segments=(*pair, pair[1], Segment(text=""))),
        ]
    )
    assert memory.is_multimodal.tolist() == [True, False, False, True]
    assert memory.manifest["num_with_modality"] == {"text": 3, "image": 3}
    assert not memory.image_embeddings[1].any()
    for variant in (0, 1):
        np.testing.assert_array_equal(
            memory.queries([1, 2], "image", variant)[0],
            memory.queries([1], "text", variant)[0],
        )
        np.testing.assert_array_equal(
            memory.queries([1, 2], "text", variant)[1],
            memory.queries([2], "image", variant)[0],
        )


def test_images_of_several_sizes(build):
    pair = make_document(5).segments
    larger = Segment(image=np.repeat(np.repeat(pair[1].image, 3, 0), 3, 1))
    memory = build([make_document(5), make_document(6, segments=(*pair, larger))])
    for variant in (0, 1):
        first, second = memory.queries([0, 1], "image", variant)
        assert first @ second > 0.9


def test_parts_change_nothing(build, documents, monkeypatch):
    whole = build(documents, "whole", num_query_variants=0)
    monkeypatch.setattr(builder, "PART_DOCUMENTS", 7)
    parts = build(documents, "parts", num_query_variants=0)
    assert _bytes_of(whole.path) == _bytes_of(parts.path)
    assert whole.num_query_variants == 0


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_equal_documents_give_equal_files(build, documents, index):
    first, second = (build(documents, name, index=index) for name in "ab")
    assert _bytes_of(first.path) == _bytes_of(second.path)
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != build(documents[:-1], "c").fingerprint()


def test_it_has_no_pickles_and_can_be_moved(build, documents, tmp_path):
    memory = build(documents, index="scann")
    for name, data in _bytes_of(memory.path).items():
        assert not name.endswith((".pkl", ".pickle"))
        assert str(tmp_path).encode() not in data
    expected = memory.search(memory.queries([7], "text"), 5)
    shutil.move(memory.path, tmp_path / "elsewhere")
    with Memory.load(tmp_path / "elsewhere") as moved:
        found = moved.search(moved.queries([7], "text"), 5)
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert moved.documents(found.ids[0])[0].id == "doc-7"


def test_progress_counts_documents(build, documents, monkeypatch):
    counts = []
    monkeypatch.setattr(builder, "PART_DOCUMENTS", 15)
    build(documents, progress=counts.append)
    assert counts == [15, 30, 40]


# Damage


@pytest.fixture
def small(build, documents):
    """A small memory, which can be damaged at every byte."""
    memory = build(documents[:20], index="scann")
    memory.close()
    return memory.path


def _damaged_places(name, size):
    if name in (format_lib.MANIFEST_FILE, format_lib.DENY_FILE):
        return range(0, size, 61)
    return sorted({0, 9, size // 4, size // 2, size - 1})


def test_every_flipped_byte_of_a_memory_is_detected(small):
    names = storage.list_files(small)
    assert len(names) >= 13
    silent = []
    for name in names:
        file = small / name
        data = file.read_bytes()
        for place in _damaged_places(name, len(data)):
            for bit in (1, 128):
                damaged = bytearray(data)
                damaged[place] ^= bit
                file.write_bytes(damaged)
                try:
                    Memory.load(small).close()
                    silent.append((name, place))
                except (ValueError, FileNotFoundError) as error:
                    assert file.name in str(error) or "format version" in str(error)
                    assert "rebuild it" in str(error)
        file.write_bytes(data)
    assert silent == []
    Memory.load(small).close()


def test_every_byte_of_json_with_checksums_counts(small):
    data = (small / "manifest.json").read_bytes()
    assert storage.decode_sealed(data, "manifest.json", "")["num_documents"] == 20
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(storage.IntegrityError, match=r"manifest\.json is corrupt"):
            storage.decode_sealed(bytes(damaged), "manifest.json", "")


def test_missing_and_truncated_files_are_detected(small):
    for name in storage.list_files(small):
        file = small / name
        data = file.read_bytes()
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=file.name):
            Memory.load(small)
        file.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=f"{file.name} is corrupt"):
            Memory.load(small)
        file.write_bytes(data)


def test_a_planted_pickle_is_refused(small):
    (small / "index" / "scann" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(storage.IntegrityError, match=r"scann_docids\.pkl"):
        Memory.load(small)


def test_paths_of_the_manifest_are_inside_the_folder(small, tmp_path):
    manifest = format_lib.read_manifest(small)
    (tmp_path / "outside.npy").write_bytes(b"x")
    manifest["files"]["../outside.npy"] = {"bytes": 1, "sha256": "0"}
    (small / "manifest.json").write_bytes(storage.encode_sealed(manifest))
    with pytest.raises(storage.IntegrityError, match="not a file of a memory"):
        Memory.load(small)


# Mismatches


def test_another_encoder_is_refused(small):
    Memory.load(small, embedder="encoder-1", tokenizer=FakeTokenizer()).close()
    with pytest.raises(
        ValueError,
        match=r"built with encoder encoder-1, but the embedder given is encoder-2: "
        r".*rebuild it",
    ):
        Memory.load(small, embedder=FakeEmbedder("encoder-2"))
    with pytest.raises(ValueError, match="tokenizer tokenizer-1, .* is tokenizer-2"):
        Memory.load(small, tokenizer="tokenizer-2")


def test_a_missing_memory(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no memory at"):
        Memory.load(tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"is not a memory \(it has no manifest"
    ):
        Memory.load(tmp_path)


def test_folders_of_something_else_are_not_to_be_removed(tmp_path):
    (tmp_path / "cat.jpg").touch()
    for text in (None, "{}", "[]", '{"name": "an app"}'):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(
            (ValueError, FileNotFoundError), match="is not a memory .* give the folder"
        ) as caught:
            Memory.load(tmp_path)
        assert "remove" not in str(caught.value)


def test_another_format_version(small):
    file = small / "manifest.json"
    manifest = json.loads(file.read_bytes())
    manifest["format_version"] = 2
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="format version 2; this racm3 reads version 1"
    ):
        Memory.load(small)


# Building


def test_a_failed_build_leaves_nothing(build, documents, tmp_path):
    def breaking():
        yield from documents[:30]
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"):
        build(breaking())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_keeps_the_old_memory(build, documents, monkeypatch):
    memory = build(documents)
    before = _bytes_of(memory.path)
    with pytest.raises(FileExistsError, match=r"already: .*overwrite=True"):
        build(documents)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(writer.registry, "build_index", fail)
    with pytest.raises(OSError, match="no space left"):
        build(documents[:10], overwrite=True)
    assert _bytes_of(memory.path) == before
    monkeypatch.undo()
    assert len(build(documents[:10], overwrite=True)) == 10
    assert os.listdir(memory.path.parent) == ["memory"]


def test_foreign_directories_are_not_replaced(build, documents, tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "thesis.txt").write_text("ten years")
    with pytest.raises(FileExistsError, match="is not a memory, so it is left alone"):
        build(documents, overwrite=True)


def test_bad_documents_and_embeddings(build, documents, tmp_path):
    with pytest.raises(ValueError, match="there are no documents"):
        build([])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"query_drop must be in \[0, 1\); got 1"):
        build(documents, query_drop=1)

    class Broken(FakeEmbedder):
        def embed_documents(self, documents):
            text, image, document = super().embed_documents(documents)
            document[4] = np.nan
            return text, image, document

    with pytest.raises(ValueError, match="embedding of document 'doc-4' has norm nan"):
        build(documents, embedder=Broken())


def test_building_needs_no_models(tmp_path, documents):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, D_EMBED))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = np.repeat(rows[:, None], 3, axis=1)
    writer.write_memory(
        [
            writer.MemoryChunk(
                list(FakeTokenizer().tokenize(documents)),
                *(rows, rows, rows, queries, queries),
            )
        ],
        path=tmp_path / "memory",
        vocab=FakeTokenizer.vocab,
        tokenizer_fingerprint="t",
        encoder_fingerprint="e",
    )
    with Memory.load(tmp_path / "memory", embedder="e", tokenizer="t") as memory:
        assert memory.num_query_variants == 3
        assert memory.manifest["index"] == "exact"
        assert memory.vocab == FakeTokenizer.vocab
        assert "40 documents, 40 allowed" in repr(memory)


def test_the_split_of_every_row_is_a_column(build, documents):
    splits = ["train", "heldout", "", None]
    for i, document in enumerate(documents):
        split = splits[i % 4]
        if split is not None:
            document.metadata["split"] = split
    memory = build(documents)
    expected = [format_lib.hash_name(splits[i % 4] or "") for i in range(40)]
    assert memory.split_hashes.tolist() == expected
    assert expected[2] == expected[3] == 0
