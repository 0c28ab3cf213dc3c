"""Readers: every format, and every kind of bad record."""

from __future__ import annotations

import base64
import json
import pathlib

import numpy as np
import pytest
from reader_files import (
    bad_images,
    encoded,
    jpeg,
    make_image,
    odd_images,
    read,
    shape,
    write_coco,
    write_tar,
)

import racm3_jax
from racm3_jax.documents import readers, store
from racm3_jax.documents.readers import ReadReport, read_documents
from racm3_jax.types import Document, Segment


def test_folder_with_sidecars(tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(["a.png", "b.png", "in/c.PNG"]):
        (tmp_path / name).write_bytes(encoded(make_image(i)))
    (tmp_path / "a.txt").write_bytes("﻿Käse\n".encode())
    (tmp_path / "b.json").write_text(
        json.dumps({"caption": "two", "url": "http://b", "score": float("nan")})
    )
    (tmp_path / "alone.txt").write_text("only words")
    (tmp_path / "notes.md").write_text("not read")
    found, report = read(f"folder:{tmp_path}")
    assert [d.id for d in found] == ["a.png", "b.png", "in/c.PNG", "alone.txt"]
    assert [d.text for d in found] == ["Käse", "two", "", "only words"]
    assert [shape(d) for d in found] == [
        ["text", "image"],
        ["text", "image"],
        ["image"],
        ["text"],
    ]
    assert found[1].source == "http://b"
    assert found[1].metadata == {"caption": "two", "url": "http://b"}
    assert found[0].images[0].shape == (4, 6, 3)
    assert report.num_bad == 0


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_folder_with_a_table(tmp_path, kind):
    (tmp_path / "x.png").write_bytes(encoded(make_image(1)))
    rows = [("x.png", "one, two"), ("gone.png", "lost"), ("../x.png", "escape")]
    if kind == "csv":
        lines = ["file_name,caption", *(f'{a},"{b}"' for a, b in rows)]
    else:
        lines = [json.dumps({"file_name": a, "text": b}) for a, b in rows]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines))
    found, report = read(str(tmp_path))
    assert [d.text for d in found] == ["one, two"]
    assert report.reasons == {"missing file": 1, "path outside the folder": 1}
    (tmp_path / f"metadata.{kind}").write_text("caption\nx" if kind == "csv" else "{}")
    with pytest.raises(ValueError, match="without a file name; one of the columns"):
        read(str(tmp_path))


def test_unusual_images_are_read(tmp_path):
    for name, data in odd_images().items():
        (tmp_path / name).write_bytes(data)
    found, report = read(f"folder:{tmp_path}")
    assert report.reasons == {} and len(found) == len(odd_images())
    by_name = {d.id: d.images[0] for d in found}
    expected = np.asarray(make_image(3))[0, 0].astype(int)
    for name in ("cmyk.jpg", "alpha.png", "broken_exif.jpg"):
        # Converted from another colour space, but not inverted and not black.
        assert (np.abs(by_name[name][0, 0] - expected) < 8).all(), name
    assert (by_name["grey16.png"] == 40_000 >> 8).all()
    assert by_name["animated.gif"].shape == (5, 5, 3)
    assert by_name["turned.jpg"].shape == (6, 4, 3)
    assert by_name["broken_exif.jpg"].shape == (4, 6, 3)


def test_bad_records_are_counted_by_reason_and_listed(tmp_path):
    for name, (data, _) in bad_images().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(encoded(make_image(1)))
    (tmp_path / "odd.png").write_bytes(encoded(make_image(2)))
    (tmp_path / "odd.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "json.png").write_bytes(encoded(make_image(2)))
    (tmp_path / "json.json").write_bytes(b"{not json")
    found, report = read(f"folder:{tmp_path};max_pixels=1e6")
    assert [d.id for d in found] == ["good.png"]
    expected = {reason: 1 for _, reason in bad_images().values()}
    assert report.reasons == {**expected, "wrong encoding": 1, "damaged JSON": 1}
    listed = {pathlib.Path(e["record"]).name: e["reason"] for e in report.listed}
    for name, (_, reason) in bad_images().items():
        assert listed[name] == reason
    with pytest.raises(ValueError, match=r"6 of 7 records are bad \(1 damaged JSON, "):
        read(f"folder:{tmp_path};max_pixels=1e6", max_bad=0.5)


def test_webdataset(tmp_path):
    members = {}
    for i in range(3):
        members[f"{i:09d}.jpg"] = jpeg(i)
        members[f"{i:09d}.txt"] = f"caption {i}".encode()
        members[f"{i:09d}.json"] = json.dumps({"url": f"http://{i}", "key": i}).encode()
    members["000000003.json"] = json.dumps({"caption": None}).encode()
    members["000000004.txt"] = b"words only"
    members["../../etc/000000005.jpg"] = jpeg(5)
    members["000000006.jpg"] = b""
    write_tar(tmp_path / "00000.tar", members)
    write_tar(tmp_path / "00001.tar", {"a.b.jpg": jpeg(7), "a.cls": b"3"})
    found, report = read(f"webdataset:{tmp_path}/*.tar")
    assert racm3_jax.read_documents is read_documents
    assert [d.text for d in found] == [
        *(f"caption {i}" for i in range(3)),
        "words only",
        "",
    ]
    assert [d.source for d in found[:3]] == [f"http://{i}" for i in range(3)]
    assert found[0].id == "00000/000000000"
    assert report.reasons == {
        "empty document": 1,
        "empty image": 1,
        "dots in a member's name": 1,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.tar", "00001.tar"]


def test_truncated_webdataset(tmp_path):
    members = {f"{i:03d}.jpg": jpeg(i) for i in range(8)}
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 5 * 1024 + 700])
    write_tar(tmp_path / "b.tar", {"x.jpg": jpeg(1)})
    (tmp_path / "c.tar").write_bytes(b"this is no tar, though it is named like one")
    found, report = read(f"webdataset:{tmp_path}/*.tar")
    assert report.reasons == {"damaged file": 2}
    assert found[-1].id == "b/x" and len(found) >= 2


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "caption": "one",
            "image": {"bytes": jpeg(1), "path": "1.jpg"},
            "url": "http://1",
        },
        {"caption": None, "image": {"bytes": jpeg(2), "path": "2.jpg"}, "url": None},
        {"caption": "no image", "image": None, "url": "http://3"},
        {"caption": "bad", "image": {"bytes": b"xx", "path": "4.jpg"}, "url": None},
        {"caption": None, "image": None, "url": None},
    ]
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    shards = readers.find_shards(f"{tmp_path}/a.parquet")
    assert [s.size for s in shards] == [2, 2, 1]
    found, report = read(f"{tmp_path}/a.parquet")
    assert [shape(d) for d in found] == [["text", "image"], ["image"], ["text"]]
    assert [d.id for d in found] == [f"a/{i:08d}" for i in range(3)]
    assert found[0].source == "http://1"
    assert report.reasons == {"not an image": 1, "empty document": 1}
    with pytest.raises(ValueError, match="has no column 'tittle'; it has caption"):
        read(f"parquet:{tmp_path}/a.parquet;text=tittle")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="b.parquet cannot be read as parquet"):
        read(f"{tmp_path}/b.parquet")


def test_without_pyarrow(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "racm3_jax\[parquet\]"'):
        read(f"parquet:{tmp_path}/a.parquet")


def test_precomputed_embeddings(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("img_emb", "text_emb", "metadata"):
        (tmp_path / name).mkdir()
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16)
    rows[2] = np.nan
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", rows)
    np.save(tmp_path / "text_emb" / "text_emb_0.npy", rows * 2)
    table = arrow.Table.from_pylist(
        [{"image_path": f"{i}.jpg", "caption": f"words {i}"} for i in range(3)]
    )
    parquet.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
    report = ReadReport(1)
    (shard,) = readers.find_shards(str(tmp_path))
    found = list(readers.read_shard(shard, report))
    assert [r.document.text for r in found] == ["words 0", "words 1"]
    expected = rows[0].astype(np.float32)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(found[0].image_embedding, expected, atol=1e-6)
    np.testing.assert_allclose(found[0].text_embedding, expected, atol=1e-3)
    assert report.reasons == {"bad embedding": 1}
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", rows[:2])
    _, report = read(str(tmp_path))
    assert report.reasons == {"damaged file": 1}


def test_jsonl(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(make_image(1)))
    inline = base64.b64encode(encoded(make_image(2))).decode()
    lines = [
        {
            "id": "a",
            "url": "http://a",
            "segments": [{"text": "x"}, {"image": "cat.png"}, {"text": "y"}],
        },
        {"texts": ["t", None], "images": [None, "cat.png"], "metadata": {"n": 1}},
        {"caption": "c", "image_base64": inline},
        {"segments": [{"image": "/etc/passwd"}]},
        {"texts": ["a"], "images": []},
        {"texts": ["a"], "images": [None, None]},
        {"caption": "c", "image_base64": "%%%"},
        {"caption": "\ud800"},
        {"caption": 5},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnull\n{'x'}\n"
    (tmp_path / "d.jsonl").write_text(text)
    found, report = read(f"{tmp_path}/d.jsonl")
    assert [shape(d) for d in found] == [
        ["text", "image", "text"],
        ["text", "image"],
        ["text", "image"],
        ["text"],
    ]
    assert [d.id for d in found[:3]] == ["a", "d/00000001", "d/00000002"]
    assert found[1].metadata == {"n": 1}
    assert report.reasons == {
        "path outside the folder": 1,
        "damaged segments": 1,
        "damaged base64": 1,
        "wrong encoding": 1,
        "no text": 1,
        "damaged JSON": 2,
    }
    assert report.listed[-1]["record"].endswith("d.jsonl:12")


def test_jsonl_is_split_into_ranges_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.jsonl, "RECORDS_PER_SHARD", 3)
    lines = [json.dumps({"text": f"zeile {i} ü"}) for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    shards = readers.find_shards(f"{tmp_path}/d.jsonl")
    assert len(shards) == 3
    found, _ = read(f"{tmp_path}/d.jsonl")
    assert [d.text for d in found] == [f"zeile {i} ü" for i in range(8)]
    assert [d.id for d in found] == [f"d/{i:08d}" for i in range(8)]


def test_coco(tmp_path):
    write_coco(tmp_path)
    found, _ = read(f"coco:{tmp_path};split=val2017")
    assert [d.id for d in found] == ["100", "101", "102", "103"]
    assert [d.text for d in found] == [f"image {i}, way 0" for i in range(4)]
    assert found[0].source.endswith("val2017/000000000100.jpg")
    assert found[0].metadata["licence"] == "Attribution License"
    assert found[0].images[0].shape == (16, 16, 3)
    each, _ = read(str(tmp_path), split="val2017", captions="each")
    assert len(each) == 8 and len({d.id for d in each}) == 8
    assert each[0].source == each[1].source
    (both, *_), _ = read(str(tmp_path), split="val2017", captions="all")
    assert shape(both) == ["text", "text", "image"]
    with pytest.raises(FileNotFoundError, match=r"captions_test\.json; give COCO's"):
        read(f"coco:{tmp_path};split=test")
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold COCO captions"):
        read(f"coco:{tmp_path};split=val2017")


def test_array_record(tmp_path):
    documents = [
        Document(
            f"d{i}", (Segment(text=f"t{i}"), Segment(image=np.asarray(make_image(i))))
        )
        for i in range(3)
    ]
    records = [store.encode_document(d) for d in documents]
    store.write_records(tmp_path / "a.array_record", [*records, b"RTOKxxxx"])
    found, report = read(f"{tmp_path}/a.array_record")
    assert [d.id for d in found] == ["d0", "d1", "d2"]
    np.testing.assert_array_equal(found[2].images[0], documents[2].images[0])
    assert report.reasons == {"unreadable": 1}


def test_flagworld():
    found, _ = read("flagworld:heldout_test;num_heldout=2")
    assert len(found) == 4 and shape(found[0]) == ["text", "image"]
    with pytest.raises(ValueError, match="heldout_test; got 'test'"):
        read("flagworld:test")


def test_wrong_sources(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'webdataset'"):
        read_documents("webdatset:x.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*none-\*\.tar"):
        read_documents(f"webdataset:{tmp_path}/none-*.tar")
    with pytest.raises(FileNotFoundError, match="holds no images and no captions"):
        read_documents(f"folder:{tmp_path}")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"webdataset:.*/\*\*/\*\.tar"):
        read_documents(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="no option 'splitt'; did you mean 'split'"):
        read_documents(f"coco:{tmp_path};splitt=val")
    with pytest.raises(ValueError, match="name=value; got 'split'"):
        read_documents(f"coco:{tmp_path};split")
    with pytest.raises(ValueError, match="does not show what kind"):
        read_documents(f"{tmp_path}/x.dat")
    with pytest.raises(ValueError, match="max_pixels is a number; got 'many'"):
        read_documents(f"folder:{tmp_path};max_pixels=many")
    with pytest.raises(ValueError, match=r"fraction in 0\.\.1; got 2"):
        ReadReport(2)


def test_too_many_bad_records_stop_early(tmp_path):
    lines = [json.dumps({"text": "good"})] * 150 + ["{"] * 500
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    report = ReadReport(0.1)
    with pytest.raises(ValueError, match=r"the first: .*d\.jsonl:151: not JSON"):
        list(read_documents(f"{tmp_path}/d.jsonl", report=report))
    assert report.num_documents == 150 and report.num_bad == 17


@pytest.mark.filterwarnings("ignore")
def test_tfds(tmp_path):
    import sys

    import tensorflow_datasets as tfds
    from tiny_captions import TinyCaptions

    builder = TinyCaptions(data_dir=str(tmp_path), file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    found, report = read(f"tfds:{builder.data_dir};split=val")
    assert report.reasons == {}
    assert sorted(d.text for d in found) == ["0 0", "1 0", "2 0"]
    assert shape(found[0]) == ["text", "image"]
    assert found[0].images[0].shape == (16, 16, 3)
    assert sorted(d.metadata["image/id"] for d in found) == [7, 8, 9]
    assert len({d.id for d in found}) == 3
    assert "tensorflow" not in sys.modules
    named, _ = read("tfds:tiny_captions", split="val[:1]", data_dir=str(tmp_path))
    assert len(named) == 1
    with pytest.raises(FileNotFoundError, match="is not prepared here"):
        read("tfds:tiny_captionz", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read"):
        read(f"tfds:{builder.data_dir};split=train")
