"""Which files are read: patterns, hidden files, links, sizes."""

from __future__ import annotations

import os

import pytest
from reader_files import encoded, jpeg, make_image, read, write_coco, write_tar

from racm3_jax.documents.readers import files, find_shards, with_links
from racm3_jax.documents.readers.files import Folder, is_hidden
from racm3_jax.documents.readers.patterns import expand_braces
from racm3_jax.documents.readers.records import BadRecord


def pair(name: str, number: int = 0) -> dict[str, bytes]:
    return {f"{name}.jpg": jpeg(number), f"{name}.txt": f"card {number}".encode()}


def test_braces():
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand_braces("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expand_braces("{a,b{1..2}}x") == ["ax", "b1x", "b2x"]
    assert expand_braces("{3..1}{0..4..2}")[:4] == ["30", "32", "34", "20"]
    for plain in ("{a}", "{a", "a}", "{}", "{a..b}"):
        assert expand_braces(plain) == [plain]
    for many in ("{0..9999999999}", "{0..9999}" * 2):
        with pytest.raises(ValueError, match="more than 1000000 names; use"):
            expand_braces(many)


def test_shards_in_braces(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"s-{number:05d}.tar", pair("a", number))
    found, _ = read(f"webdataset:{tmp_path}/s-{{00000..00002}}.tar")
    assert [d.id for d in found] == ["s-00000/a", "s-00001/a", "s-00002/a"]
    with pytest.raises(FileNotFoundError, match=r"2 of the names .*s-00003\.tar"):
        read(f"webdataset:{tmp_path}/s-{{00000..00004}}.tar")


def test_an_existing_name_is_not_a_pattern(tmp_path):
    folder = tmp_path / "set [v1]{a,b}"
    folder.mkdir()
    write_tar(folder / "0.tar", pair("a"))
    write_tar(folder / "[1].tar", pair("a", 1))
    for name in ("0.tar", "[0-9].tar", "*.tar"):
        found, _ = read(f"webdataset:{folder}/{name}")
        assert found[0].id == "0/a"
    found, _ = read(f"webdataset:{folder}/[[]1].tar")
    assert [d.text for d in found] == ["card 1"]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "jsonl", "array_record"])
def test_a_folder_of_shards_is_refused_in_a_sentence(tmp_path, monkeypatch, kind):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'\.' is a folder; name its files, as '\*\."):
        find_shards(f"{kind}:.")


def test_ids_begin_where_the_pattern_varies(tmp_path):
    for corpus in ("cc3m", "cc12m"):
        (tmp_path / corpus).mkdir()
        members = {k: v for i in range(6) for k, v in pair(f"{i:09d}", i).items()}
        write_tar(tmp_path / corpus / "00000.tar", members)
        lines = '{"text": "x", "id": 7}\n{"text": "y"}\n'
        (tmp_path / corpus / "a.jsonl").write_text(lines + corpus)
    found, _ = read(f"webdataset:{tmp_path}/*/*.tar")
    assert len({d.id for d in found}) == 12
    assert found[0].id == "cc12m/00000/000000000"
    braces, _ = read(f"webdataset:{tmp_path}/{{cc3m,cc12m}}/00000.tar")
    assert [d.id for d in braces] == [d.id for d in found]
    one, _ = read(f"webdataset:{tmp_path}/cc3m/*.tar")
    assert one[0].id == "00000/000000000"
    # Ids that records give are unique in their corpus at best.
    found, _ = read(f"jsonl:{tmp_path}/*/a.jsonl")
    assert [d.id for d in found] == [
        *("cc12m/7", "cc12m/a/00000001", "cc3m/7", "cc3m/a/00000001")
    ]
    found, _ = read(f"jsonl:{tmp_path}/cc3m/*.jsonl")
    assert [d.id for d in found] == ["7", "a/00000001"]


def test_suffixes_are_kept_where_names_would_be_equal(tmp_path):
    for name in ("a.jsonl", "a.json", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    found, _ = read(f"jsonl:{tmp_path}/*")
    assert [d.id.split("/")[0] for d in found] == ["a.json", "a.jsonl", "b.jsonl"]
    found, _ = read(f"jsonl:{tmp_path}/*.jsonl")
    assert [d.id.split("/")[0] for d in found] == ["a", "b"]


def test_hidden_names():
    hidden = ["._0.jpg", "a/.ipynb_checkpoints/0.jpg", "__MACOSX/0.jpg", "@eaDir/x"]
    assert all(is_hidden(name) for name in hidden)
    assert not any(is_hidden(name) for name in ("./0.jpg", "../a/0.jpg", "a.b", "_x"))


def test_hidden_files_and_folders_are_not_read(tmp_path):
    for name in ("0.jpg", "._0.jpg", ".DS_Store", "._0.txt", "0.txt"):
        (tmp_path / name).write_bytes(jpeg(1) if name == "0.jpg" else b"card")
    for folder in ("__MACOSX", ".ipynb_checkpoints", "in/.cache"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(jpeg(2))
        (tmp_path / folder / "metadata.csv").write_text("file_name,text\n1.jpg,x\n")
    found, report = read(f"folder:{tmp_path}")
    assert [(d.id, d.text) for d in found] == [("0.jpg", "card")]
    assert report.num_bad == 0 and report.left_out == {}
    write_tar(tmp_path / "0.tar", pair("a"))
    (tmp_path / "._0.tar").write_bytes(b"not a tar")
    write_tar(tmp_path / "__MACOSX" / "1.tar", pair("b"))
    for pattern in ("*.tar", "**/*.tar"):
        found, report = read(f"webdataset:{tmp_path}/{pattern}")
        assert [d.id for d in found] == ["0/a"] and report.num_bad == 0
    # Hidden folders above the source, or named by the user, are read.
    found, _ = read(f"folder:{tmp_path}/in/.cache")
    assert [d.text for d in found] == ["x"]


def make_hub(tmp_path):
    """A snapshot as huggingface_hub keeps it: names that link into `blobs/`."""
    repository = tmp_path / "hub" / "datasets--me--pets"
    snapshot = repository / "snapshots" / "r1"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "train").mkdir(parents=True)
    contents = {
        "train/0.jpg": jpeg(0),
        "train/1.jpg": jpeg(1),
        "train/metadata.csv": b"file_name,text\n0.jpg,photo 0\n1.jpg,photo 1\n",
        "lines.jsonl": b'{"text": "two", "image": "train/1.jpg"}\n',
    }
    for number, (name, data) in enumerate(contents.items()):
        (repository / "blobs" / f"b{number}").write_bytes(data)
        depth = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{depth}blobs/b{number}")
    write_tar(repository / "blobs" / "b9", pair("a"))
    (snapshot / "0.tar").symlink_to("../../blobs/b9")
    return snapshot


def test_links_of_a_hub_snapshot_are_followed(tmp_path):
    snapshot = make_hub(tmp_path)
    for source in (f"folder:{snapshot}/train", f"folder:{snapshot}"):
        found, report = read(source)
        assert [d.text for d in found] == ["photo 0", "photo 1"]
        assert report.num_bad == 0
    for source in (f"jsonl:{snapshot}/*.jsonl", f"webdataset:{snapshot}/*.tar"):
        found, report = read(source)
        assert len(found) == 1 and report.num_bad == 0
    # Blobs of another repository do not belong to it.
    other = tmp_path / "hub" / "datasets--else" / "blobs"
    other.mkdir(parents=True)
    (other / "b").write_bytes(jpeg(3))
    (snapshot / "train" / "2.jpg").symlink_to(other / "b")
    found, report = read(f"folder:{snapshot}")
    assert len(found) == 2 and report.reasons == {"link outside the folder": 1}


def test_links_out_of_a_folder_are_refused_or_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("root:x:0:0")
    (elsewhere / "cat.jpg").write_bytes(jpeg(1))
    root = tmp_path / "pics"
    root.mkdir()
    (root / "a.jpg").write_bytes(jpeg(0))
    (root / "a.txt").symlink_to(elsewhere / "secret")
    (root / "lone.txt").symlink_to("../elsewhere/secret")
    (root / "b.jpg").symlink_to(elsewhere / "cat.jpg")
    (root / "own.jpg").symlink_to("c.jpg")
    (root / "c.jpg").write_bytes(jpeg(2))
    (root / "folder").symlink_to(elsewhere)
    (root / "loop").symlink_to(".")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "gone.jpg").symlink_to("nothing.jpg")
    found, report = read(f"folder:{root}")
    assert [d.id for d in found] == ["c.jpg", "own.jpg"]
    assert report.reasons == {
        "link outside the folder": 4,
        "broken link": 1,
        "missing file": 1,
    }
    assert any("--follow_links" in entry["error"] for entry in report.listed)
    found, report = read(with_links(f"folder:{root}"))
    assert [d.id for d in found] == [
        *("a.jpg", "b.jpg", "c.jpg", "folder/cat.jpg", "own.jpg", "lone.txt")
    ]
    assert found[0].text == "root:x:0:0"
    assert set(report.reasons) <= {"broken link", "missing file"}
    assert report.num_bad == 2


def test_links_of_shards_and_of_images_that_records_name(tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "in"
    elsewhere.mkdir()
    root.mkdir()
    write_tar(elsewhere / "0.tar", pair("a"))
    (elsewhere / "x.png").write_bytes(encoded(make_image(1)))
    (root / "0.tar").symlink_to(elsewhere / "0.tar")
    (root / "x.png").symlink_to(elsewhere / "x.png")
    (root / "a.jsonl").write_text('{"image": "x.png"}\n{"image": "../elsewhere/x.png"}')
    found, report = read(f"webdataset:{root}/*.tar")
    assert not found and report.reasons == {"link outside the folder": 1}
    # A link that the user names is followed.
    assert len(read(f"webdataset:{root}/0.tar")[0]) == 1
    assert len(read(with_links(f"webdataset:{root}/*.tar"))[0]) == 1
    _, report = read(f"jsonl:{root}/a.jsonl")
    assert report.reasons == {
        "link outside the folder": 1,
        "path outside the folder": 1,
    }
    found, report = read(with_links(f"jsonl:{root}/a.jsonl"))
    assert len(found) == 1 and report.reasons == {"path outside the folder": 1}


def test_links_of_coco_images_and_of_tables(tmp_path):
    write_coco(tmp_path / "coco")
    (tmp_path / "coco" / "val2017").rename(tmp_path / "images")
    (tmp_path / "coco" / "val2017").symlink_to(tmp_path / "images")
    source = f"coco:{tmp_path}/coco;split=val2017"
    assert read(source)[1].reasons == {"link outside the folder": 4}
    assert len(read(with_links(source))[0]) == 4
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,x\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "metadata.csv").symlink_to("../metadata.csv")
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(1))
    with pytest.raises(BadRecord, match="is a link that leads out of"):
        read(f"folder:{tmp_path}/in")
    assert read(with_links(f"folder:{tmp_path}/in"))[0][0].text == "x"


def test_allowed_names_in_records(tmp_path):
    root = tmp_path / "a b"
    (root / "in").mkdir(parents=True)
    file = root / "in" / "1.jpg"
    file.write_bytes(b"x")
    folder = Folder(root)
    for name in ("in/1.jpg", "in\\1.jpg", str(file), file.as_uri(), "in/../in/1.jpg"):
        assert folder.find(name) == file
    for name in ("../x", "in/../../x", "/etc/passwd", "file:///etc/passwd", "a\0b"):
        with pytest.raises(BadRecord) as caught:
            folder.find(name)
        assert caught.value.reason == "path outside the folder"
    with pytest.raises(BadRecord, match="not downloaded") as caught:
        folder.find("https://example.org/a.jpg")
    assert caught.value.reason == "image is a URL"


def test_large_files_and_pipes_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    (tmp_path / "large.jpg").write_bytes(bytes(1001))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "metadata.csv").write_text("file_name\nlarge.jpg\npipe.jpg\n")
    _, report = read(f"folder:{tmp_path}")
    assert report.reasons == {"oversized file": 1, "not a file": 1}


def test_home_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "captions.csv").write_text("file_name,text\na.jpg,x\n")
    for source in ("folder:~/pets", "~/pets", "folder:~/pets;captions=~/captions.csv"):
        assert len(read(source)[0]) == 1
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg"}')
    assert len(read("jsonl:~/a.jsonl;images=~/pets")[0]) == 1
    with pytest.raises(ValueError, match="cannot be expanded"):
        read("folder:~no-such-user-here/x")


@pytest.mark.parametrize(
    "source", ["", " ", "folder:", "webdataset: ", "coco:;split=a"]
)
def test_a_source_without_a_path_is_refused(source):
    with pytest.raises(ValueError, match=r"has no path; give kind:path, .*folder:\."):
        find_shards(source)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(jpeg(1))
    found, _ = read(f"folder:{tmp_path}")
    assert found[0].id == "caf\\udce9.jpg"
