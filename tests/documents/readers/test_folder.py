"""Folders of images: captions in sidecar files and in tables."""

from __future__ import annotations

import json

import pytest
from reader_files import encoded, jpeg, make_image, read, shape

from racm3_jax.documents.readers.tables import read_table

FLICKR30K = """image_name| comment_number| comment
A.jpg| 0| A dog, one
A.jpg| 1| two
B.jpg| 0| three
"""


def fill(root, contents: dict[str, bytes | str]):
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = data.encode() if isinstance(data, str) else data
        (root / name).write_bytes(data)
    return f"folder:{root}"


def texts(found) -> dict[str, str]:
    return {d.id: d.text for d in found}


def test_every_kind_of_sidecar(tmp_path):
    sidecars = {
        "double.jpg.txt": "double suffix",
        "kohya.caption": "kohya",
        "list.json": json.dumps(["a", "b"]),
        "captions.json": json.dumps({"captions": ["x", None, " ", "y"]}),
        "null.json": json.dumps({"caption": None, "text": "fallback"}),
        "prompt.json": json.dumps({"prompt": "a red card"}),
        "word.json": json.dumps("one"),
        "upper.json": json.dumps({"Caption": "Upper"}),
        "metadata.json": json.dumps({"caption": "of an image called metadata"}),
        "both.txt": "shared",
        "two.txt": "text",
        "two.json": json.dumps({"caption": "json", "url": "http://two"}),
    }
    stems = {name.split(".")[0] for name in sidecars}
    images = {f"{stem}.jpg": jpeg(i) for i, stem in enumerate(sorted(stems))}
    source = fill(tmp_path, {**sidecars, **images, "both.png": encoded(make_image(1))})
    found, report = read(source)
    assert report.num_bad == 0 and report.left_out == {}
    assert texts(found) == {
        "both.jpg": "shared",
        "both.png": "shared",
        "captions.jpg": "x",
        "double.jpg": "double suffix",
        "kohya.jpg": "kohya",
        "list.jpg": "a",
        "metadata.jpg": "of an image called metadata",
        "null.jpg": "fallback",
        "prompt.jpg": "a red card",
        "two.jpg": "text",
        "upper.jpg": "Upper",
        "word.jpg": "one",
    }
    more = {d.id: d.metadata.get("more_captions") for d in found}
    assert more["list.jpg"] == ["b"] and more["captions.jpg"] == ["y"]
    assert more["two.jpg"] == ["json"] and more["both.jpg"] is None


@pytest.mark.parametrize("data", ["[1]", "5", "{", "[" * 5000, '{"caption": {"a": 1}}'])
def test_json_of_another_type_is_counted(tmp_path, data):
    source = fill(tmp_path, {"a.jpg": jpeg(1), "a.json": data, "b.jpg": jpeg(2)})
    found, report = read(source)
    if data.startswith('{"caption"'):
        assert len(found) == 2
    else:
        assert [d.id for d in found] == ["b.jpg"]
        assert report.reasons == {"damaged JSON": 1}


def test_photographs_of_common_formats(tmp_path, monkeypatch):
    contents: dict[str, bytes | str] = {
        "a.jfif": jpeg(1),
        "b.jpe": jpeg(2),
        "c.AVIF": encoded(make_image(3, (32, 32)), "AVIF"),
        "d.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "d.txt": "holiday",
        "e.cr2": b"raw",
        "e.jpg": jpeg(5),
        "f.nef": b"raw",
        "f.txt": "caption of a raw file",
        "g.mov": b"film",
        "h.mp4": b"film",
        "h.txt": "caption of a film",
        "i.json": "{}",
        "j.jpg.txt": "caption of no file",
        "k.txt": "a document",
    }
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    from racm3_jax.documents import images

    images._formats.cache_clear()
    found, report = read(fill(tmp_path, contents))
    images._formats.cache_clear()
    assert [d.id for d in found] == ["a.jfif", "b.jpe", "c.AVIF", "e.jpg", "k.txt"]
    assert report.reasons == {
        "HEIC without pillow-heif": 1,
        "unsupported file type": 2,
        "missing file": 1,
    }
    assert report.left_out == {
        ".cr2 file next to an image with its name": 1,
        ".mov file": 1,
        ".json file without an image": 1,
    }
    (heic,) = (e for e in report.listed if e["reason"].startswith("HEIC"))
    assert 'pip install "racm3_jax[heic]"' in heic["error"]


def test_tables_of_split_folders(tmp_path):
    pytest.importorskip("pyarrow")
    import io

    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    rows = [{"file_name": "0.jpg", "text": "test 0"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    contents = {
        "train/metadata.jsonl": '{"file_name": "0.jpg", "text": "train 0"}\n'
        '{"file_name": "in/1.jpg", "text": "train 1"}\n{"x\n{"text": "no name"}\n',
        "validation/metadata.csv": "file_name,text\n0.jpg,validation 0\n",
        "test/metadata.parquet": stream.getvalue(),
        "test/1.jpg": jpeg(9),
        "test/1.txt": "beside",
    }
    names = ("train/0.jpg", "train/in/1.jpg", "validation/0.jpg", "test/0.jpg")
    images = {name: jpeg(i) for i, name in enumerate(names)}
    found, report = read(fill(tmp_path, {**contents, **images}))
    assert texts(found) == {
        "train/0.jpg": "train 0",
        "train/in/1.jpg": "train 1",
        "validation/0.jpg": "validation 0",
        "test/0.jpg": "test 0",
        "test/1.jpg": "beside",
    }
    assert report.reasons == {"damaged JSON": 1, "row without a file name": 1}
    assert any(e["record"].endswith("/train/metadata.jsonl:3") for e in report.listed)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("captions.txt", 'image,caption\nA.jpg,"A dog, one"\nA.jpg,two\nB.jpg,three\n'),
        ("Flickr8k.token.txt", "A.jpg#0\tA dog, one\nA.jpg#1\ttwo\nB.jpg#0\tthree\n"),
        ("all.token", "A.jpg#0\tA dog, one\nA.jpg#1\ttwo\nB.jpg#0\tthree\n"),
        ("results.csv", FLICKR30K),
        (
            "flickr_annotations_30k.csv",
            'raw,filename\n"[""A dog, one"", ""two""]",A.jpg\n"[""three""]",B.jpg\n',
        ),
        ("a.tsv", "image\tcaption\nA.jpg\t['A dog, one', 'two']\nB.jpg\tthree\n"),
        (
            "labels.tsv",
            "filename\tcaption\nA.jpg\tA dog, one\nA.jpg\ttwo\nB.jpg\tthree",
        ),
        (
            "captions.json",
            json.dumps({"A.jpg": ["A dog, one", "two"], "B.jpg": {"text": "three"}}),
        ),
        (
            "metadata.json",
            json.dumps(
                [
                    {"file_name": "A.jpg", "captions": ["A dog, one", "two"]},
                    {"file_name": "B.jpg", "caption": "three"},
                ]
            ),
        ),
    ],
)
def test_captions_of_one_image_are_one_document(tmp_path, name, table):
    images = {"Images/A.jpg": jpeg(1), "Images/B.jpg": jpeg(2)}
    found, report = read(fill(tmp_path, {name: table, **images}))
    assert [(d.id, d.text) for d in found] == [
        ("Images/A.jpg", "A dog, one"),
        ("Images/B.jpg", "three"),
    ]
    assert found[0].metadata["more_captions"] == ["two"]
    assert "more_captions" not in found[1].metadata
    assert report.num_bad == 0 and shape(found[0]) == ["text", "image"]


def test_texts_that_are_not_tables_are_documents(tmp_path):
    contents: dict[str, bytes | str] = {
        "captions.txt": "Some words,\nand more.",
        "notes.csv": "a,b\n1,2\n",
        "x.jpg": jpeg(1),
    }
    found, _ = read(fill(tmp_path, contents))
    assert [d.id for d in found] == ["x.jpg", "captions.txt"]


def test_images_without_a_row_are_read_too(tmp_path):
    contents: dict[str, bytes | str] = {
        "captions.csv": "file_name,caption\na.jpg,of the table\n",
        "a.jpg": jpeg(1),
        "a.txt": "beside",
        "b.jpg": jpeg(2),
        "b.txt": "of b",
    }
    source = fill(tmp_path, contents)
    found, _ = read(source)
    assert texts(found) == {"a.jpg": "of the table", "b.jpg": "of b"}
    assert found[0].metadata["more_captions"] == ["beside"]
    # With a named table, only its rows are read.
    found, _ = read(f"{source};captions={tmp_path}/captions.csv")
    assert texts(found) == {"a.jpg": "of the table"}
    with pytest.raises(
        ValueError, match="has no column 'titel'; it has file_name, cap"
    ):
        read(f"{source};text=titel")


@pytest.mark.parametrize(
    "table",
    [
        "﻿image;caption\r\nimg/1.jpg;café; on the square\r\n".encode(),
        "image\tcaption\r\nimg/1.jpg\tcafé; on the square\r\n".encode("utf-16"),
        "image,caption\r\nimg\\1.jpg,café; on the square\r\n".encode(),
        "sep=;\r\nimage;caption\r\nimg/1.jpg;café; on the square\r\n".encode(),
        " Image , Caption \nimg/1.jpg,café; on the square\n,\n\n".encode(),
        "image,caption\rimg/1.jpg,café; on the square\r".encode(),
        'caption,image\n"café; on the square",img/1.jpg\n'.encode(),
    ],
)
def test_csv_files_of_spreadsheets(tmp_path, table):
    source = fill(tmp_path, {"captions.csv": table, "img/1.jpg": jpeg(1)})
    found, report = read(source)
    assert texts(found) == {"img/1.jpg": "café; on the square"}
    assert report.num_bad == 0


def test_encodings_of_tables(tmp_path):
    table = "image,caption\n1.jpg,café\n".encode("cp1252")
    source = fill(tmp_path, {"captions.csv": table, "1.jpg": jpeg(1)})
    with pytest.raises(
        ValueError,
        match=r"captions\.csv is not UTF-8 \(byte 0xe9 at 23\); .*encoding=cp1252",
    ):
        read(source)
    assert texts(read(f"{source};encoding=cp1252")[0]) == {"1.jpg": "café"}
    with pytest.raises(ValueError, match="unknown encoding 'latin0'"):
        read(f"{source};encoding=latin0")
    table = "image,caption\n1.jpg,café\n".encode("utf-16-le")
    with pytest.raises(ValueError, match="encoding=utf-16-le"):
        read_table(b"\xe9" + table, "a.csv")


def test_rows_that_cannot_be_read(tmp_path):
    table = 'file_name,caption\n1.jpg,"a "b" c"\n2.jpg,"a dog\n3.jpg,a cat\n'
    with pytest.raises(ValueError, match="never closed; it may be in line 3"):
        read_table(table.encode(), "a.csv")
    rows = read_table(table.replace('"a dog', "a dog").encode(), "a.csv")
    assert [row.fields["caption"] for row in rows] == ['a b" c"', "a dog", "a cat"]
    table = "caption,file_name\na dog, running,1.jpg\n\nx,\n"
    first, second = read_table(table.encode(), "a.csv")
    assert str(first.error) == "a.csv:2 has 3 columns, its header has 2"
    assert second.error is not None
    assert second.error.reason == "row without a file name"
    # A caption in the last column may hold commas.
    table = f"file_name,caption\n1.jpg,a dog, running\n2.jpg,{'x' * 200_000}\n"
    first, second = read_table(table.encode(), "a.csv")
    assert first.fields["caption"] == "a dog, running"
    assert len(second.fields["caption"]) == 200_000


def test_a_name_without_a_folder_is_next_to_its_table(tmp_path):
    table = "file_name,text\n0.jpg,of train\ntrain/1.jpg,from above\n"
    contents: dict[str, bytes | str] = {
        "train/metadata.csv": table,
        "train/1.jpg": jpeg(1),
        "0.jpg": jpeg(2),
    }
    found, report = read(fill(tmp_path, contents))
    assert texts(found) == {"train/1.jpg": "from above", "0.jpg": ""}
    assert report.reasons == {"missing file": 1}


def test_cells_that_look_like_lists(tmp_path):
    cells = [
        "[x]",
        "['a', 5]",
        "['a'] and ['b']",
        "['\\d']",
        '["a", "b"]',
        "['" * 9000 + "']",
    ]
    table = "image\tcaption\n" + "".join(f"{i}.jpg\t{c}\n" for i, c in enumerate(cells))
    rows = read_table(table.encode(), "a.tsv")
    assert [row.fields["caption"] for row in rows] == [
        *(*cells[:3], ["\\d"], ["a", "b"], cells[5])
    ]


def test_a_row_of_several_images(tmp_path):
    lines = '{"file_names": ["a.jpg", "b.jpg"], "text": "both"}\n'
    contents: dict[str, bytes | str] = {
        "metadata.jsonl": lines,
        "a.jpg": jpeg(1),
        "b.jpg": jpeg(2),
    }
    found, _ = read(fill(tmp_path, contents))
    assert [shape(d) for d in found] == [["text", "image", "image"]]


def test_names_of_a_table_in_another_spelling(tmp_path):
    rows = ["café.jpg", "./b.jpg", "sub\\c.jpg", "http://x/d.jpg", "../e.jpg"]
    table = "file_name,text\n" + "".join(f"{name},{i}\n" for i, name in enumerate(rows))
    names = ("cafe\u0301.jpg", "b.jpg", "sub/c.jpg")
    images = {f"in/{name}": jpeg(i) for i, name in enumerate(names)}
    source = fill(tmp_path, {"in/metadata.csv": table, **images, "e.jpg": jpeg(5)})
    found, report = read(source)
    assert texts(found) == {
        "in/cafe\u0301.jpg": "0",
        "in/b.jpg": "1",
        "in/sub/c.jpg": "2",
        "e.jpg": "4",
    }
    assert report.reasons == {"image is a URL": 1}
    # Files outside of the source are not read.
    _, report = read(f"{source}/in")
    assert report.reasons == {"image is a URL": 1, "path outside the folder": 1}
