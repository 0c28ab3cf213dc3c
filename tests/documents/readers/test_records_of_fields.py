"""JSONL, parquet and COCO: captions and images in every common form."""

from __future__ import annotations

import base64
import bz2
import datetime
import decimal
import gzip
import json
import lzma

import numpy as np
import pytest
from reader_files import encoded, jpeg, make_image, read, shape, write_coco

from racm3_jax.documents.readers import fields, jsonl, parquet
from racm3_jax.documents.readers.image_fields import decode_base64, read_images
from racm3_jax.documents.readers.records import (
    BadRecord,
    LeftOut,
    RawRecord,
    ReadReport,
    Record,
    Shard,
    read_shard,
    read_shard_ahead,
)

CONVERSATION = """{"image": "1.jpg", "conversations": [
{"from": "human", "value": "<image>\\nDescribe"}, {"from": "gpt", "value": "a red card"}
]}""".replace("\n", "")
TEXT = base64.b64encode(jpeg(1)).decode()


def forms_of_images() -> dict[str, object]:
    """Every way to give one image, or two, in a record next to `1.jpg` and `2.jpg`."""
    return {
        "image": "1.jpg",
        "images": ["1.jpg", "2.jpg"],
        "file_name": "1.jpg",
        "Image": {"path": "1.jpg"},
        "img": {"bytes": None, "path": "1.jpg"},
        "image_path": "./1.jpg",
        "image_base64": TEXT,
        "image ": f"data:image/jpeg;base64,{TEXT}",
        "jpg": TEXT,
        "bytes": {"image_base64": base64.encodebytes(jpeg(1)).decode()},
    }


def test_forms_of_images_in_jsonl(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [
        json.dumps({"caption": field, field: value})
        for field, value in forms_of_images().items()
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, report = read(f"jsonl:{tmp_path}/a.jsonl")
    assert report.num_bad == 0 and report.left_out == {}
    assert {d.text: len(d.images) for d in found} == {
        name.strip(): 2 if name == "images" else 1 for name in forms_of_images()
    }
    expected = found[0].images[0]
    for document in found:
        np.testing.assert_array_equal(document.images[0], expected)
        assert len(json.dumps(document.metadata)) < 120


def test_forms_of_images_in_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    values = [
        *forms_of_images().items(),
        ("image", jpeg(1)),
        ("image", {"bytes": jpeg(1), "path": "gone.jpg"}),
        ("images", [jpeg(1), jpeg(2)]),
        ("images", [{"bytes": jpeg(1)}, {"bytes": jpeg(2)}]),
    ]
    for number, (field, value) in enumerate(values):
        rows = [{"caption": "x", field: value, "price": decimal.Decimal("2.5")}]
        writer.write_table(
            arrow.Table.from_pylist(rows), tmp_path / f"{number}.parquet"
        )
        found, report = read(f"parquet:{tmp_path}/{number}.parquet")
        assert report.num_bad == 0 and report.left_out == {}
        assert len(found[0].images) == (2 if field == "images" else 1)
        assert found[0].metadata["price"] == 2.5
        assert field == "image" or field not in found[0].metadata


def test_images_of_an_unknown_form_are_counted(tmp_path):
    wrong = [5, True, [1, 2], [["x"], 3], {"path": 4}, "gone.jpg", "data:;base64,%%"]
    lines = [json.dumps({"caption": "x", "image": value}) for value in wrong]
    lines += [json.dumps({"caption": "x", "image": "https://example.org/1.jpg"})]
    lines += [json.dumps({"caption": "words", "path": "notes.md", "file": 3})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, report = read(f"jsonl:{tmp_path}/a.jsonl")
    assert report.reasons == {
        "image of an unknown form": 5,
        "missing file": 1,
        "damaged base64": 1,
        "image is a URL": 1,
    }
    # The path of a text file is not an image.
    assert [d.text for d in found] == ["words"]


def test_base64():
    data = bytes(range(256))
    for text in (
        base64.b64encode(data).decode(),
        base64.encodebytes(data).decode(),
        base64.urlsafe_b64encode(data).decode().rstrip("="),
    ):
        assert decode_base64(text) == data
    with pytest.raises(BadRecord, match="not base64"):
        decode_base64("%%%")
    assert read_images(float("nan"), None) == read_images("", None) == []
    assert read_images(np.array(["a"]), None) == []


def test_a_list_of_records(tmp_path):
    entries = [{"caption": "a"}, {"caption": "b"}, 5]
    for text in (json.dumps(entries), json.dumps(entries, indent=1), "\n\n[\n]"):
        (tmp_path / "a.json").write_text(text)
        found, report = read(f"jsonl:{tmp_path}/a.json")
        if text.endswith("[\n]"):
            assert not found and report.num_bad == 0
        else:
            assert [d.text for d in found] == ["a", "b"]
            assert report.reasons == {"damaged JSON": 1}
    # Lines, the first of which is a list or damaged.
    for first in ("[1, 2]", "[1, 2"):
        (tmp_path / "a.jsonl").write_text(f'{first}\n{{"caption": "a"}}')
        found, report = read(f"jsonl:{tmp_path}/a.jsonl")
        assert [d.text for d in found] == ["a"]
        assert report.reasons == {"damaged JSON": 1}


def test_unusual_lines(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    lines = [
        '﻿{"id": 1.0, "caption": "float id"}',
        '{"caption": "first", "caption": "second"}',
        '{"caption": "nan", "score": NaN, "big": 123456789012345678901234567890}',
        '{"caption": ["", "second of list", "third"]}',
        '{"caption": null, "text": " ", "TEXT": "upper", "prompt": "x"}',
        CONVERSATION,
        '{"messages": [{"role": "user", "content": "one"}, {"content": "two"}]}',
        '{"image": "1.jpg", "conversations": [{"value": "no mark"}]}',
        '{"conversations": [{"value": "<image> without"}]}',
        '{"conversations": [{"value": 3}]}',
        '{"segments": 5}',
        '{"segments": [5]}',
        '{"texts": ["a"], "images": 5}',
        '{"metadata": 5, "caption": "x", "more": {"a": [1, null, {"b": 2}]}}',
        '{"caption": {"text": "inner"}}',
        '{"caption": 5}',
        '{"caption": true}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, report = read(f"jsonl:{tmp_path}/a.jsonl")
    assert [d.text for d in found] == [
        *("float id", "second", "nan", "second of list", "upper"),
        *("Describe a red card", "one two", "no mark", "x", "inner"),
    ]
    assert found[3].metadata["more_captions"] == ["third"]
    assert shape(found[5]) == ["image", "text", "text"]
    assert shape(found[7]) == ["image", "text"]
    assert found[8].metadata["more"] == {"a": [1, None, {"b": 2}]}
    assert report.reasons == {"damaged segments": 5, "no text": 2}


@pytest.mark.parametrize("depth", [20, 100, 900, 5000, 200_000])
def test_deep_json_is_counted_quickly(tmp_path, depth):
    deep = '{"a": ' * depth + "1" + "}" * depth
    lines = [f'{{"caption": "x", "deep": {deep}}}', f'{{"caption": {deep}}}', deep]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, report = read(f"jsonl:{tmp_path}/a.jsonl")
    assert len(found) + report.num_bad == 3
    assert set(report.reasons) <= {"damaged JSON", "empty document"}
    assert all(d.text == "x" for d in found)
    if depth == 20:
        assert report.left_out == {}


def test_long_lines_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_FILE_BYTES", 1000)
    lines = ['{"text": "a"}', json.dumps({"text": "b" * 5000}), '{"text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, report = read(f"jsonl:{tmp_path}/a.jsonl")
    assert [(d.id, d.text) for d in found] == [("a/00000000", "a"), ("a/00000002", "c")]
    assert report.reasons == {"oversized line": 1}


@pytest.mark.parametrize("num_lines", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("end", ["", "\n"])
def test_offsets_of_lines(tmp_path, monkeypatch, num_lines, end):
    monkeypatch.setattr(jsonl, "RECORDS_PER_SHARD", 3)
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 7)
    text = "\n".join(f'{{"text": "{i}"}}' for i in range(num_lines)) + end
    (tmp_path / "a.jsonl").write_text(text)
    shards = jsonl.jsonl_shards(str(tmp_path / "a.jsonl"))
    assert len(shards) == max(1, -(-num_lines // 3))
    found, _ = read(f"jsonl:{tmp_path}/a.jsonl")
    assert [d.text for d in found] == [str(i) for i in range(num_lines)]


def test_compressed_lines_are_refused_in_a_sentence(tmp_path):
    for module, name in ((gzip, "gunzip"), (bz2, "bunzip2"), (lzma, "unxz")):
        (tmp_path / "a.jsonl").write_bytes(module.compress(b'{"text": "a"}\n'))
        with pytest.raises(ValueError, match=f"unpack it first, with {name}"):
            read(f"jsonl:{tmp_path}/a.jsonl")


def test_large_rows_of_parquet_are_not_kept_in_memory(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 1000)
    rows = [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}]
    writer.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, report = read(f"parquet:{tmp_path}/a.parquet")
    assert [d.text for d in found] == ["a", "c"]
    assert report.reasons == {"oversized row": 1}


def test_values_that_json_cannot_hold_are_left_out_and_counted():
    loop: list = []
    loop.append(loop)
    given = {
        "bytes": b"x",
        "deep": loop,
        "none": None,
        "nan": float("nan"),
        "day": datetime.date(2026, 1, 2),
        "array": np.arange(3),
        "large": "x" * 50_000,
        "larger": "y" * 60_000,
        "small": "z",
        5: "five",
        "lone": "\ud83d",
    }
    found, left_out = fields.plain_metadata(given)
    assert found.pop("deep") is not None
    assert found == {
        "day": "2026-01-02",
        "array": [0, 1, 2],
        "large": "x" * 50_000,
        "small": "z",
        "5": "five",
        "lone": "\\ud83d",
    }
    assert sorted(left_out) == [
        "metadata value nested too deep",
        "metadata value that JSON cannot hold",
        "oversized metadata value",
    ]


def test_reports_count_omitted_values():
    def read_good() -> Record:
        return fields.make_record("a", ["x"], {"b": b"", "c": b""})

    def leave_out() -> Record:
        raise LeftOut("a film")

    def fail() -> Record:
        raise RecursionError

    raws = [RawRecord(str(i), r) for i, r in enumerate([read_good, leave_out, fail])]
    report = ReadReport(1.0)
    assert len(list(read_shard(Shard("s", 3, lambda: iter(raws)), report))) == 1
    assert report.left_out == {"metadata value that JSON cannot hold": 2, "a film": 1}
    assert report.reasons == {"nested too deep": 1}
    for _ in range(3):
        report.add_bad("again", BadRecord("nested too deep", "too deep"))
    report.add_bad("b", BadRecord("empty image"))
    assert report.count_bad() == "1 empty image, 4 nested too deep"
    assert report.show_bad() == ("2: it is nested too deeply; b: empty image")
    both = ReadReport(1.0)
    both.merge(report.as_dict())
    both.merge(json.loads(json.dumps(report.as_dict())))
    # Reports of older builds do not have this key.
    both.merge({"num_documents": 1, "reasons": {}, "listed": []})
    assert both.left_out == {"metadata value that JSON cannot hold": 4, "a film": 2}
    assert both.num_documents == 3


def test_an_error_of_preparing_is_not_a_bad_record():
    def prepare(record: Record) -> None:
        raise ValueError(f"{record.document.id} does not fit")

    raws = [RawRecord("0", lambda: fields.make_record("a", ["x"], {}))]
    report = ReadReport(1.0)
    with pytest.raises(ValueError, match="a does not fit"):
        list(read_shard_ahead(Shard("s", 1, lambda: iter(raws)), report, prepare))
    assert not report.num_bad


def write_annotations(root, images, annotations):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations}
    file = root / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps(content))
    (root / "val2017").mkdir(exist_ok=True)
    for number in range(3):
        (root / "val2017" / f"{number}.jpg").write_bytes(jpeg(number))
    return f"coco:{root};split=val2017"


def test_blank_coco_captions(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (2, 0, 1, 9)]
    annotations = [
        {"image_id": 0, "id": 5, "caption": "\n"},
        {"image_id": 0, "id": 6, "caption": "A cat  sits.\n"},
        {"image_id": 0, "id": 7, "caption": "A cat."},
        {"image_id": 1, "id": 8, "caption": None},
        {"image_id": 1, "id": 9, "caption": "good one"},
        {"image_id": 77, "id": 10, "caption": "orphan"},
        {"id": 11, "caption": "of no image"},
        5,
    ]
    source = write_annotations(tmp_path, images, annotations)
    found, report = read(source)
    assert [(d.id, d.text) for d in found] == [
        *(("0", "A cat  sits."), ("1", "good one"), ("2", ""))
    ]
    assert found[0].metadata["more_captions"] == ["A cat."]
    assert report.reasons == {
        "missing file": 1,
        "caption of an unlisted image": 1,
        "damaged entry": 2,
    }
    each, _ = read(source, captions="each")
    assert [(d.id, d.text) for d in each] == [
        *(("0-6", "A cat  sits."), ("0-7", "A cat."), ("1-9", "good one"), ("2", ""))
    ]
    both, _ = read(source, captions="all")
    assert shape(both[0]) == ["text", "text", "image"]


def test_coco_ids_that_are_strings_or_missing(tmp_path):
    images = [
        {"id": "a1f", "file_name": "0.jpg"},
        {"id": 7, "file_name": "1.jpg"},
        {"file_name": "2.jpg"},
        "x",
    ]
    annotations = [
        {"image_id": "a1f", "caption": "red"},
        {"image_id": "a1f", "caption": "second"},
        {"image_id": "7", "id": "q", "caption": "seven"},
    ]
    source = write_annotations(tmp_path, images, annotations)
    found, report = read(source)
    assert [(d.id, d.text) for d in found] == [("7", "seven"), ("a1f", "red")]
    assert report.reasons == {"damaged entry": 2}
    each, _ = read(source, captions="each")
    assert [d.id for d in each] == ["7-q", "a1f-caption0", "a1f-caption1"]


@pytest.mark.parametrize("content", ["5", "[]", "{}", "[" * 5000, '{"images": 3}'])
def test_annotations_of_another_kind_are_refused_in_one_sentence(tmp_path, content):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold COCO captions"):
        read(f"coco:{tmp_path};split=val2017")


def test_options_of_a_source(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(make_image(1)))
    for value in ("true", "False", "1", "no"):
        assert len(read(f"folder:{tmp_path};follow_links={value}")[0]) == 1
    with pytest.raises(
        ValueError, match="follow_links is one of true, .*; got 'maybe'"
    ):
        read(f"folder:{tmp_path};follow_links=maybe")
    with pytest.raises(ValueError, match="max_pixels is a number; got 'inf'"):
        read(f"folder:{tmp_path};max_pixels=inf")
    with pytest.raises(ValueError, match="flagworld has no option 'follow_links'"):
        read("flagworld:train;follow_links=true")
