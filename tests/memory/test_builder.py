"""Memories of sources on disk: resuming, merging, filters, deduplication."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from corpus_files import forty, line, write_corpus
from memory_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax import storage
from racm3_jax.documents.readers import Record, read_documents
from racm3_jax.memory import builder, filters, merge
from racm3_jax.memory.builder import CorpusConfig, build_memory, make_chunk_builder
from racm3_jax.memory.memory import Memory
from racm3_jax.memory.stats import compute_stats
from racm3_jax.types import Document, Segment

LARGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
EXACT = CorpusConfig(index="exact", num_query_variants=2)


def bytes_of(path):
    return {name: (path / name).read_bytes() for name in storage.list_files(path)}


def build(source, path, config=EXACT, **more) -> Memory:
    models = {"tokenizer": FakeTokenizer(), "embedder": FakeEmbedder(), **more}
    build_memory(source, path=path, config=config, **models)
    return Memory.load(path)


def test_a_source_becomes_a_memory(tmp_path):
    seen = []
    with build(
        forty(tmp_path / "in"),
        tmp_path / "memory",
        progress=lambda *counts: seen.append(counts),
    ) as memory:
        assert len(memory) == 40
        assert memory.find(["doc-0", "doc-39"]).tolist() == [0, 39]
        assert memory.documents([7])[0].source == "http://site3/7"
        report = memory.manifest["report"]
        assert report["read"] == 40 and report["bad"] == {}
        assert report["leakage"] == {
            "itself": 40,
            "same source": 0,
            "exact copy": 0,
            "near copy": 0,
        }
        assert memory.content_hashes is not None
        assert len(set(memory.content_hashes.tolist())) == 40
        found = memory.search(memory.queries(np.arange(40), "text"), 1)
        assert found.ids[:, 0].tolist() == list(range(40))
    assert [c[0] for c in seen][-1] == 40 and seen[-1][1] == seen[-1][2]
    assert sorted(os.listdir(tmp_path)) == ["in", "memory"]


def test_full_images_are_not_kept():
    class Fitting:
        fit_images = staticmethod(lambda images: [image[:2, :2] for image in images])

    class FittingTokenizer(Fitting, FakeTokenizer):
        pass

    class FittingEmbedder(Fitting, FakeEmbedder):
        pass

    document = make_document(3, segments=(Segment("a b"), Segment(image=LARGE)))
    maker = make_chunk_builder(EXACT, FittingTokenizer(), FittingEmbedder())
    prepared = maker.prepare(Record(document))
    fitted = prepared.record.document
    assert fitted.text == "a b" and fitted.metadata == document.metadata
    assert [i.shape for i in (*fitted.images, *prepared.to_embed.images)] == [
        (2, 2, 3)
    ] * 2
    assert prepared.num_bytes == 24
    # Of what was read, not of what the models see.
    assert prepared.content_hash == filters.hash_content(document)
    assert prepared.image_hash == filters.hash_image(LARGE) != 0
    (chunk,) = maker.chunks([prepared], 0, {})
    assert chunk.content_hashes is not None and chunk.image_hashes is not None
    assert chunk.content_hashes.tolist() == [prepared.content_hash]
    assert chunk.image_hashes.tolist() == [prepared.image_hash]


def test_coco_as_downloaded_becomes_a_memory(tmp_path):
    from PIL import Image

    root = tmp_path / "coco"
    for name in ("annotations", "val2017"):
        (root / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(6):
        file = f"{i:012d}.jpg"
        Image.new("RGB", (48, 32), (40 * i, 90, 200 - 30 * i)).save(
            root / "val2017" / file
        )
        images.append({"id": i, "file_name": file, "license": 1, "coco_url": f"u/{i}"})
        for way in range(2):
            caption = f"picture{i} seen way{way}"
            number = 2 * i + way
            annotations.append({"id": number, "image_id": i, "caption": caption})
    licenses = [{"id": 1, "name": "CC BY"}]
    content = {"images": images, "annotations": annotations, "licenses": licenses}
    file = root / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps(content))
    source = f"coco:{root};split=val2017;captions=each"
    with build(source, tmp_path / "memory") as memory:
        assert len(memory) == 12 and memory.is_multimodal.all()
        assert memory.manifest["report"]["leakage"]["same source"] == 12
        query = FakeEmbedder().embed_texts(["picture4 seen way1"])
        (document,) = memory.documents(memory.search(query, 1).ids[0])
        assert document.source == "u/4" and document.metadata["licence"] == "CC BY"


def test_killed_and_run_again_gives_the_same_memory(tmp_path):
    source = forty(tmp_path / "in")
    build(source, tmp_path / "whole").close()
    program = pathlib.Path(__file__).parents[1] / "corpus_files.py"
    arguments = [source, str(tmp_path / "memory"), "2"]
    killed = subprocess.run([sys.executable, program, *arguments], check=False)
    assert killed.returncode == -9
    work = builder.work_directory(tmp_path / "memory")
    assert (work / "part-00001").is_dir() and not (work / "part-00002").is_dir()
    assert not (tmp_path / "memory").exists()

    class Counting(FakeEmbedder):
        documents = 0

        def embed_documents(self, documents):
            self.documents += len(documents)
            return super().embed_documents(documents)

    embedder = Counting()
    build(source, tmp_path / "memory", embedder=embedder).close()
    assert embedder.documents == 20
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["in", "memory", "whole"]


def test_killed_while_merging(tmp_path, monkeypatch):
    source = forty(tmp_path / "in")
    build(source, tmp_path / "whole").close()

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(builder.writer.registry, "build_index", die)
    with pytest.raises(Killed):
        build(source, tmp_path / "memory")
    monkeypatch.undo()
    assert [n for n in os.listdir(tmp_path) if n.endswith(".partial")]
    build(source, tmp_path / "memory").close()
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["in", "memory", "whole"]


def test_several_builders_share_the_work(tmp_path):
    source = forty(tmp_path / "in")
    build(source, tmp_path / "whole").close()
    errors = []

    def run():
        try:
            models = {"tokenizer": FakeTokenizer(), "embedder": FakeEmbedder()}
            build_memory(source, path=tmp_path / "memory", config=EXACT, **models)
        except FileExistsError:
            pass  # the others had finished before it began
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "whole")


class FailsAt(FakeEmbedder):
    """Fails at its n-th call, as with a full disk or a refused setting."""

    def __init__(self, calls: int, error: Exception):
        super().__init__()
        self.calls, self.error = calls, error

    def embed_documents(self, documents):
        self.calls -= 1
        if not self.calls:
            raise self.error
        return super().embed_documents(documents)


def test_another_build_at_the_same_place_is_refused(tmp_path):
    source, path = forty(tmp_path / "in"), tmp_path / "memory"
    full = OSError("no space left")
    other = dataclasses.replace(EXACT, seed=3)
    # Nothing is built yet: another build may begin.
    with pytest.raises(OSError, match="no space"):
        build(source, path, embedder=FailsAt(1, full))
    with pytest.raises(OSError, match="no space"):
        build(source, path, other, embedder=FailsAt(2, full))
    with pytest.raises(ValueError, match="unfinished build that differs in settings"):
        build(source, path)
    # Settings of the merge do not matter to the parts.
    near = dataclasses.replace(other, deduplicate="near", max_bad=0.5)
    with pytest.raises(OSError, match="no space"):
        build(source, path, near, embedder=FailsAt(2, full))
    (tmp_path / "in" / "004.jsonl").write_text(line(40) + "\n")
    with pytest.raises(ValueError, match=r"differs in shards: .* remove that folder"):
        build(source, path, other)


def test_a_refused_build_does_not_block_a_corrected_one(tmp_path):
    source, path = forty(tmp_path / "in"), tmp_path / "memory"
    refused = FailsAt(2, ValueError("this embedder does not fit"))
    with pytest.raises(ValueError, match="does not fit"):
        build(source, path, embedder=refused)
    with build(source, path, dataclasses.replace(EXACT, seed=3)) as memory:
        assert len(memory) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "memory"]


def test_python_builds_what_the_command_builds(tmp_path):
    documents = list(read_documents(forty(tmp_path / "in")))
    models = {"tokenizer": FakeTokenizer(), "embedder": FakeEmbedder()}
    settings = {"index": "exact", "num_query_variants": 2}
    copies = [dataclasses.replace(d, id=f"copy-{d.id}") for d in documents]
    seen = []
    with Memory.build(
        iter([*documents, *copies]),
        path=tmp_path / "memory",
        progress=seen.append,
        **models,
        **settings,
    ) as memory:
        report = memory.manifest["report"]
        assert len(memory) == 40 and report["duplicates"] == {"exact": 40, "near": 0}
        assert report["leakage"]["exact copy"] == 0 and report["read"] == 80
        assert memory.find([d.id for d in documents]).tolist() == list(range(40))
    assert seen[-1] == 80
    with Memory.build(
        forty(tmp_path / "in"), path=tmp_path / "b", **models, **settings
    ) as b:
        assert b.id_hashes.tolist() == memory.id_hashes.tolist()
        assert b.content_hashes.tolist() == memory.content_hashes.tolist()


def test_a_build_from_python_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "PART_DOCUMENTS", 10)
    documents = list(read_documents(forty(tmp_path / "in")))
    settings = {"tokenizer": FakeTokenizer(), "index": "exact", "num_query_variants": 1}
    whole = {**settings, "embedder": FakeEmbedder(), "path": tmp_path / "whole"}
    Memory.build(documents, **whole).close()
    with pytest.raises(OSError, match="no space"):
        broken = FailsAt(4, OSError("no space left"))
        Memory.build(documents, path=tmp_path / "m", embedder=broken, **settings)
    resumed = FailsAt(99, OSError())
    Memory.build(documents, path=tmp_path / "m", embedder=resumed, **settings).close()
    assert resumed.calls == 98  # only the last part
    assert bytes_of(tmp_path / "m") == bytes_of(tmp_path / "whole")
    # Other documents at the same place are not taken for those of the broken build.
    with pytest.raises(OSError, match="no space"):
        broken = FailsAt(4, OSError("no space left"))
        Memory.build(documents, path=tmp_path / "n", embedder=broken, **settings)
    other = documents[5:]
    with Memory.build(
        other, path=tmp_path / "n", embedder=FakeEmbedder(), **settings
    ) as memory:
        assert [d.id for d in memory.documents(np.arange(35))] == [d.id for d in other]


def test_documents_with_equal_ids_and_different_content_are_kept(tmp_path):
    lines = [[line(n, id="IMG_0001") for n in (0, 1, 2, 1)], [line(3, id="IMG_0001")]]
    source = write_corpus(tmp_path / "in", lines)
    with build(source, tmp_path / "memory") as memory:
        ids = [d.id for d in memory.documents(np.arange(len(memory)))]
        report = memory.manifest["report"]
        assert report["renamed"] == 3 and report["duplicates"]["exact"] == 1
    hashes = [memory.content_hashes[i] for i in (1, 2, 3)]
    assert ids == ["IMG_0001", *(f"IMG_0001#{h:016x}"[:17] for h in hashes)]
    assert memory.find(ids).tolist() == [0, 1, 2, 3]
    # The same documents without deduplication: a copy has its own id, too.
    plain = dataclasses.replace(EXACT, deduplicate="none")
    with build(source, tmp_path / "all", plain) as memory:
        ids = [d.id for d in memory.documents(np.arange(len(memory)))]
        assert len(set(ids)) == 5 and ids[3] == f"{ids[1]}-2"


def test_bad_and_filtered_records_are_counted(tmp_path):
    scores = {"pwatermark": 0.1, "punsafe": 0.1}
    lines = [line(i, **scores) for i in range(20)]
    lines[3] = "{no json"
    lines[6] = line(6, pwatermark=0.1, punsafe=0.7)
    lines[7] = line(7, pwatermark=0.9, punsafe=0.1)
    for number, name in ((0, "doc-0"), (1, "copy of 1"), (2, "copy of 2")):
        lines.append(line(number, id=name, **scores))
    source = write_corpus(tmp_path / "in", [lines])
    held_out = write_corpus(tmp_path / "eval", [[line(8, id="test-8", url="")]])
    (tmp_path / "opt_out").write_text("# opt-outs\nhttp://site1/*\ndoc-4\n")
    config = dataclasses.replace(
        EXACT,
        opt_out=str(tmp_path / "opt_out"),
        held_out=(held_out,),
        max_nsfw=0.5,
        max_watermark=0.5,
    )
    with build(source, tmp_path / "memory", config) as memory:
        report = memory.manifest["report"]
        assert report["bad"] == {"damaged JSON": 1}
        assert report["filtered"] == {
            "evaluation document": 1,
            "nsfw": 1,
            "opted out": 7,
            "watermark": 1,
        }
        assert report["duplicates"]["exact"] == 2
        sources = [d.source for d in memory.documents(np.arange(len(memory)))]
        assert not any(s.startswith("http://site1") for s in sources)
        assert memory.find(["doc-4", "doc-8", "copy of 1"]).tolist() == [-1, -1, -1]
        assert len(memory) == 10
    bad = (tmp_path / "memory.bad_records.jsonl").read_text()
    assert json.loads(bad)["record"].endswith("000.jsonl:4")


def test_evaluation_documents_are_recognised_by_content(tmp_path):
    """Not by their ids: two folders can both have an image 1."""
    held_out = filters.HeldOut()
    text = Document("notes/1", (Segment(text="a held-out text"),))
    held_out.add(dataclasses.replace(text, source="http://site/1"))
    assert held_out.matches(dataclasses.replace(text, id="other"))
    other = Document("notes/1", (Segment(text="another text"),))
    assert not held_out.matches(other)
    assert held_out.matches(dataclasses.replace(other, source="http://site/1"))


def test_too_many_bad_records_stop_the_build(tmp_path):
    source = write_corpus(tmp_path / "in", [[line(0), "{", "{"]])
    with pytest.raises(ValueError, match=r"2 of 3 records are bad \(2 damaged JSON\)"):
        build(source, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize(("mode", "num"), [("none", 6), ("exact", 5), ("near", 3)])
def test_duplicates(tmp_path, mode, num):
    import base64

    from PIL import Image

    smooth = np.zeros((64, 64, 3), np.uint8)
    smooth[:, 32:] = (200, 10, 70)
    smooth[40:, :20] = 250
    rescaled = np.asarray(Image.fromarray(smooth).resize((32, 32)))

    def entry(name, caption, image):
        data = base64.b64encode(corpus_build_png(image)).decode()
        return line(0, id=name, caption=caption, image_base64=data)

    class SameImages(FakeEmbedder):
        def embed_images(self, images, drop=0.0, rng=None):
            return self._embed([("nation", "scene")] * len(images), "image", drop, rng)

    lines = [
        entry("a", "nation0 on scene0", smooth),
        entry("b", "nation0 on scene1", smooth),  # near: same image, other words
        entry("c", "nation0 on scene0", smooth),  # exact
        entry("d", "nation0 on scene2", rescaled),  # near: another size
        entry("e", "nation1 on scene0", 255 - smooth),
        entry("f", "nation2 on scene0", np.full((8, 8, 3), 9, np.uint8)),
    ]
    config = dataclasses.replace(EXACT, deduplicate=mode)
    source = write_corpus(tmp_path / "in", [lines[:3], lines[3:]])
    with build(source, tmp_path / "m", config, embedder=SameImages()) as memory:
        assert memory.manifest["report"]["duplicates"] == {
            "exact": 1,
            "near": 2,
        }
        assert len(memory) == num
        assert memory.find(["a", "e", "f"]).min() >= 0
        exact, near = {"none": (2, 4), "exact": (0, 3), "near": (0, 0)}[mode]
        assert memory.manifest["report"]["leakage"] == {
            "itself": num,
            "same source": num,
            "exact copy": exact,
            "near copy": near,
        }


def corpus_build_png(image):
    from racm3_jax.documents.images import encode_png

    return encode_png(np.ascontiguousarray(image))


def test_max_ram_splits_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(merge.registry, "MIN_ROWS", 16)
    monkeypatch.setattr(merge, "_resident_bytes", lambda: 0)
    config = dataclasses.replace(EXACT, index="scann", max_ram_gb=4 * 128 * 5 * 16e-9)
    with build(forty(tmp_path / "in"), tmp_path / "memory", config) as memory:
        assert memory.manifest["index"] == "scann_sharded"
        assert (memory.path / "index" / "shard-00002").is_dir()
        found = memory.search(memory.queries(np.arange(40), "text"), 3)
    with build(forty(tmp_path / "in"), tmp_path / "exact") as exact:
        expected = exact.search(exact.queries(np.arange(40), "text"), 3)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_precomputed_embeddings_become_a_memory(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("img_emb", "metadata"):
        (tmp_path / "clip" / name).mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float16)
    np.save(tmp_path / "clip" / "img_emb" / "img_emb_0.npy", rows)
    table = arrow.Table.from_pylist([{"caption": f"words {i}"} for i in range(5)])
    parquet.write_table(table, tmp_path / "clip" / "metadata" / "metadata_0.parquet")
    source = f"embeddings:{tmp_path}/clip"
    with build(source, tmp_path / "memory", embedder="clip-b") as memory:
        assert memory.d_embed == 16 and len(memory) == 5
        assert memory.manifest["encoder_fingerprint"] == "clip-b"
        assert memory.manifest["num_with_modality"] == {"text": 0, "image": 0}
        query = rows[3:4].astype(np.float32)
        assert memory.search(query / np.linalg.norm(query), 1).ids[0, 0] == 3
        # No document can be queried by a text part: no figure of them is NaN.
        assert np.isfinite(memory.queries(np.arange(5), "text")).all()
        stats = compute_stats(memory, num_queries=5, k=2)
        assert list(stats["recall"]) == ["image"] and stats["recall"]["image"] == 1
    # Embeddings are never exchanged for those of another encoder without a word.
    with pytest.raises(ValueError, match=r"width 16 .* width is 128: .*name:ENCODER"):
        build(source, tmp_path / "other")


def test_documents_with_equal_captions_and_different_embeddings_are_kept(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("img_emb", "metadata"):
        (tmp_path / "clip" / name).mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    rows[3] = rows[2]
    np.save(tmp_path / "clip" / "img_emb" / "img_emb_0.npy", rows)
    table = arrow.Table.from_pylist([{"caption": "a dog"}] * 4)
    parquet.write_table(table, tmp_path / "clip" / "metadata" / "metadata_0.parquet")
    source = f"embeddings:{tmp_path}/clip"
    with build(source, tmp_path / "memory", embedder="clip-b") as memory:
        assert (
            len(memory) == 3 and memory.manifest["report"]["duplicates"]["exact"] == 1
        )


def test_perceptual_hash_and_filters():
    assert filters.hash_image(np.full((9, 9, 3), 200, np.uint8)) == 0
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 250
    assert filters.hash_image(image) == filters.hash_image(image[::2, ::2])
    assert filters.hash_image(image) != filters.hash_image(image[:, ::-1])
    hashes = np.asarray([7, 3, 7, 0, 0, 3], np.uint64)
    assert filters.find_first(hashes).tolist() == [True, True, False, True, True, False]
    document = Document("a", (Segment(image=image),))
    assert filters.hash_content(document) != filters.hash_content(
        Document("a", (Segment(text="x"), Segment(image=image)))
    )
    limits = filters.ScoreLimits(nsfw=0.5, watermark=0.5)
    rows = np.asarray([[1.0, 0], [0, 1], [0, 0]])
    found = limits.rejected(
        [
            document,
            document,
            Document("b", (Segment(text="x"),), metadata={"NSFW": "NSFW"}),
        ],
        rows,
        lambda texts: np.asarray([[0.0, 1], [1, 0]]),
    )
    assert found == [None, "nsfw", "nsfw"]
    assert limits.rejected([document], rows[1:2], None) == [None]


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match='"exact" or "near"; got \'all\''):
        CorpusConfig(deduplicate="all")
    with pytest.raises(FileNotFoundError, match="there is no opt-out file"):
        build(forty(tmp_path / "in"), tmp_path / "m", CorpusConfig(opt_out="none"))
    with pytest.raises(ValueError, match=r"no documents are left of jsonl:"):
        (tmp_path / "o").write_text("*\n")
        config = CorpusConfig(opt_out=str(tmp_path / "o"))
        build(forty(tmp_path / "in"), tmp_path / "n", config)
    with pytest.raises(ValueError, match=r"; bad: 1 damaged JSON: .*000\.jsonl:1: not"):
        source = write_corpus(tmp_path / "bad", [["{"]])
        build(source, tmp_path / "n", CorpusConfig(max_bad=1.0))
