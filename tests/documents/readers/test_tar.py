"""Webdataset tars: the members of each key, in all kinds of tars."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
from reader_files import encoded, jpeg, make_image, read, shape, write_tar

from racm3_jax.documents.readers import tar


def pairs(numbers) -> dict[str, bytes]:
    return {
        name: data
        for i in numbers
        for name, data in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", f"card {i}".encode()))
    }


def apart(numbers) -> dict[str, bytes]:
    """All images, then all captions."""
    members = pairs(numbers)
    return dict(sorted(members.items(), key=lambda member: member[0][-3:]))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_separated_members_of_a_key_are_joined(tmp_path, mode):
    write_tar(tmp_path / "a.tar", apart(range(4)), mode)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [(d.id, d.text) for d in found] == [
        (f"a/{i}", f"card {i}") for i in range(4)
    ]
    assert all(shape(d) == ["text", "image"] for d in found)
    assert report.num_bad == 0


def test_separated_members_that_do_not_fit_are_refused_by_key(tmp_path, monkeypatch):
    members = {**apart(range(4)), **pairs([8, 9])}
    size = len(members["0.jpg"])
    monkeypatch.setattr(tar, "MAX_KEY_BYTES", int(2.5 * size))
    write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    found, report = read(f"webdataset:{tmp_path}/a.tar.gz")
    # Two keys fit, and those after them; no document is incomplete.
    assert [d.text for d in found] == ["card 0", "card 1", "card 8", "card 9"]
    assert all(shape(d) == ["text", "image"] for d in found)
    assert report.reasons == {"members of a key apart": 2}
    assert "key '2'" in report.listed[0]["error"]


def test_a_key_of_too_many_bytes_is_never_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_KEY_BYTES", 1 << 20)
    large = {f"big.{i}.jpg": bytes(1 << 18) for i in range(60)}
    write_tar(tmp_path / "a.tar.gz", {"0.txt": b"x", **large, **pairs([1])}, "w:gz")
    most = 0
    take = tar._take

    def watch(own, *args):
        nonlocal most
        take(own, *args)
        most = max(most, own.num_bytes, sum(map(len, own.members.values())))

    monkeypatch.setattr(tar, "_take", watch)
    found, report = read(f"webdataset:{tmp_path}/a.tar.gz")
    assert [d.text for d in found] == ["x", "card 1"]
    assert report.reasons == {"oversized key": 1}
    assert (
        "'big' have 15728640 bytes, more than the 1048576"
        in (report.listed[0]["error"])
    )
    assert most < 1 << 18


def test_huge_headers_are_refused(tmp_path):
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(2):
            entry = tarfile.TarInfo(f"{number}.txt")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"card"))
        assert archive.fileobj is not None
        archive.fileobj.write(name.tobuf(tarfile.GNU_FORMAT))
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.id for d in found] == ["a/0"]
    assert report.reasons == {"damaged file": 1}
    assert f"a header of {1 << 40} bytes" in report.listed[0]["error"]


def test_members_of_macos_are_skipped(tmp_path):
    members = {}
    for name, data in pairs(range(3)).items():
        members[f"./._{name}"] = b"\0\5\x16\7Mac OS X"
        members[f"./{name}"] = data
        members[f"__MACOSX/._{name}"] = b"\0\5\x16\7Mac OS X"
        members[f"./.ipynb_checkpoints/{name}"] = data
    write_tar(tmp_path / "a.tar", members)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [(d.id, d.text) for d in found] == [
        (f"a/{i}", f"card {i}") for i in range(3)
    ]
    assert report.num_bad == 0


def test_names_are_split_at_dots_as_in_webdataset(tmp_path):
    members = {
        "Track 2.0 (clean).jpg": jpeg(1),
        "Track 2.0 (clean).txt": b"a red card",
        "22.05.txt": b"a receipt",
        "s0.input.jpg": jpeg(2),
        "s0.outputs.txt": b"words",
        "half.json": b'{"caption": "half a document"}',
        "half.view.png": encoded(make_image(1)),
        "cat.jpg": jpeg(3),
        "cat.jpg.txt": b"a cat",
        "cat.seg.png": encoded(make_image(2)),
    }
    write_tar(tmp_path / "a.tar", members)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [(d.id, d.text, len(d.images)) for d in found] == [("a/cat", "a cat", 1)]
    assert report.reasons == {"dots in a member's name": 4}
    assert ".0 (clean).jpg, .0 (clean).txt: webdataset" in report.listed[0]["error"]


def test_a_caption_without_its_image_is_not_a_document(tmp_path):
    members = {
        "0.jp2": b"x",
        "0.txt": b"of a JPEG 2000",
        "1.mp4": b"x",
        "1.json": b'{"caption": "of a film"}',
        "2.txt": b"words alone",
        "3.jpg": jpeg(3),
        "3.png": encoded(make_image(3)),
        "3.mp4": b"x",
    }
    write_tar(tmp_path / "a.tar", members)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [shape(d) for d in found] == [["text"], ["image"]]
    assert report.reasons == {"unsupported file type": 2}
    assert report.left_out == {"further image of a key": 1}


def test_only_metadata_that_is_too_large_is_left_out(tmp_path):
    fields = {"caption": "a red card", "url": "http://a", "exif": {"x": "y" * 90_000}}
    deep: list = []
    for _ in range(60):
        deep = [deep]
    fields["deep"] = deep
    write_tar(
        tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.json": json.dumps(fields).encode()}
    )
    (document,), report = read(f"webdataset:{tmp_path}/a.tar")
    assert document.text == "a red card" and document.source == "http://a"
    assert "exif" not in document.metadata
    assert report.num_bad == 0
    assert report.left_out == {
        "oversized metadata value": 1,
        "metadata value nested too deep": 1,
    }


def test_several_captions_of_a_key(tmp_path):
    members = {
        "0.jpg": jpeg(1),
        "0.txt": b"one",
        "0.json": b'{"captions": ["one", "two", "three"], "n": 1}',
        "1.jpg": jpeg(2),
        "1.json": b'["one", "two"]',
    }
    write_tar(tmp_path / "a.tar", members)
    found, _ = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.text for d in found] == ["one", "one"]
    assert [d.metadata["more_captions"] for d in found] == [["two", "three"], ["two"]]


def test_images_in_the_json_of_a_key(tmp_path):
    import base64

    image = base64.encodebytes(jpeg(1)).decode()
    members = {
        "0.json": json.dumps({"caption": "x", "image_base64": image}).encode(),
        "1.json": json.dumps({"caption": "y", "file_name": "1.jpg"}).encode(),
    }
    write_tar(tmp_path / "a.tar", members)
    found, _ = read(f"webdataset:{tmp_path}/a.tar")
    assert [shape(d) for d in found] == [["text", "image"], ["text"]]
    assert "image_base64" not in found[0].metadata
    assert found[1].metadata["file_name"] == "1.jpg"


def test_repeated_members(tmp_path):
    again = [*pairs([0, 1]).items(), *(("0.jpg", jpeg(8)), ("0.txt", b"another"))]
    write_tar(tmp_path / "a.tar", again)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [(d.id, d.text) for d in found] == [
        *(("a/0", "card 0"), ("a/1", "card 1"), ("a/0#2", "another"))
    ]
    assert report.num_bad == 0
    # Which caption belongs to which image is unknown.
    write_tar(tmp_path / "a.tar", [*pairs([0, 1]).items(), ("0.jpg", jpeg(8))])
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.text for d in found] == ["card 1"]
    assert report.reasons == {"repeated member": 2}


def test_names_that_differ_only_in_case(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.JPG", jpeg(1)), ("0.jpg", jpeg(2))])
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.id for d in found] == ["a/0", "a/0#2"] and report.num_bad == 0


def test_many_members_of_one_name_are_fast(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")] * 3000)
    found, _ = read(f"webdataset:{tmp_path}/a.tar")
    assert len({d.id for d in found}) == 3000


def test_concatenated_tars_are_all_read(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.part", pairs([number]))
    parts = [(tmp_path / f"{number}.part").read_bytes() for number in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"".join(parts)))
    for name in ("a.tar", "b.tar.gz"):
        found, report = read(f"webdataset:{tmp_path}/{name}")
        assert [d.text for d in found] == ["card 0", "card 1"]
        assert report.num_bad == 0


@pytest.mark.parametrize("packed", [False, True])
def test_no_document_of_a_truncated_tar_is_incomplete(tmp_path, packed):
    write_tar(tmp_path / "whole.tar", pairs(range(5)))
    whole = (tmp_path / "whole.tar").read_bytes()
    whole = whole[: whole.rindex(b"card 4") + 512]
    for length in range(0, len(whole), 256):
        data = whole[:length]
        if packed:
            data = gzip.compress(whole)[
                : length * len(gzip.compress(whole)) // len(whole)
            ]
        (tmp_path / "a.tar").write_bytes(data)
        found, report = read(f"webdataset:{tmp_path}/a.tar")
        assert all(shape(d) == ["text", "image"] for d in found), length
        assert report.reasons == {"damaged file": 1}, length
        assert [d.text for d in found] == [f"card {i}" for i in range(len(found))]


def test_a_truncated_tar_of_separated_members(tmp_path):
    write_tar(tmp_path / "a.tar", apart(range(5)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"3.txt\0")])
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    # Which of the keys after the second have a caption is unknown.
    assert [d.text for d in found] == ["card 0", "card 1"]
    assert report.reasons == {"damaged file": 3}


def test_a_damaged_header_does_not_end_a_tar_silently(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(range(3)))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    place = data.index(b"1.txt\0")
    data[place + 150] ^= 255
    (tmp_path / "a.tar").write_bytes(data)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.text for d in found] == ["card 0"]
    assert report.reasons == {"damaged file": 1}


def test_links_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in pairs([0, 1]).items():
            entry = tarfile.TarInfo(name)
            if name == "1.jpg":
                entry.type, entry.linkname = tarfile.LNKTYPE, "0.jpg"
            else:
                entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        folder = tarfile.TarInfo("2.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert [d.text for d in found] == ["card 0"]
    assert report.reasons == {"link in a tar": 1}


@pytest.mark.parametrize(
    "data",
    [b"", bytes(10240), b"no tar", gzip.compress(b"no tar", mtime=0), b"\x1f\x8b\x08"],
)
def test_files_that_are_not_tars(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    found, report = read(f"webdataset:{tmp_path}/a.tar")
    assert not found and report.reasons == {"damaged file": 1}
