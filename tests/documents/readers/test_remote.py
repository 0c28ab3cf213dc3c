"""Sources in buckets give the same documents as the files on a disk."""

from __future__ import annotations

import json

import fake_bucket
import numpy as np
import pytest
from reader_files import encoded, jpeg, make_image, read, write_tar

from racm3_jax import buckets
from racm3_jax.documents.readers import (
    ReadReport,
    find_shards,
    read_documents,
    read_shard,
)
from racm3_jax.documents.readers.remote import _fits


def members(first: int, count: int = 3) -> dict[str, bytes]:
    return {
        f"{n:03d}.{suffix}": data
        for n in range(first, first + count)
        for suffix, data in (("jpg", jpeg(n)), ("txt", f"number {n}".encode()))
    }


def same(found, wanted) -> None:
    assert [d.id for d in found] == [d.id for d in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.text == b.text and dict(a.metadata) == dict(b.metadata)
        for x, y in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture
def corpus(gs):
    folder = gs / "me" / "corpus"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number:04d}.tar", members(10 * number))
    write_tar(folder / "3.tar.gz", members(30), "w:gz")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(encoded(make_image(3)))
    lines = [
        {"id": "a", "caption": "one", "image": "images/a.png"},
        {"id": "b", "caption": "two", "image": "../../closed/secret.png"},
        {"id": "c", "caption": "three", "image": "gs://me/other/a.png"},
        {"id": "d", "caption": "four", "image": "images/none.png"},
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "list.json").write_text(json.dumps(lines[:1]))
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        "webdataset:{}/{{0000..0002}}.tar",
        "{}/*.tar",
        "{}/**/000[01].tar",
        "{}/3.tar.gz",
    ],
)
def test_tars(corpus, pattern):
    wanted, _ = read(pattern.format(corpus))
    found, report = read(pattern.format("gs://me/corpus"))
    same(found, wanted)
    assert found and not report.num_bad


def test_only_a_listing_and_ranges_are_requested(corpus, monkeypatch):
    """Not one request per file name, and never a whole tar."""
    monkeypatch.setattr(buckets, "RANGE_BYTES", 1 << 12)
    log = fake_bucket.FolderBuckets.log
    shards = find_shards("webdataset:gs://me/corpus/{0000..0002}.tar")
    assert [s.size for s in shards] == [
        (corpus / f"{n:04d}.tar").stat().st_size for n in range(3)
    ]
    assert not [entry for entry in log if entry[0] == "cat_file"]
    list(shards[0].open())
    ranges = [stop - start for call, _, start, stop in log if call == "cat_file"]
    assert len(ranges) > 2 and max(ranges) <= 1 << 14


def test_lines_and_their_images(corpus):
    found, report = read("gs://me/corpus/lines.jsonl")
    wanted, _ = read(f"{corpus}/lines.jsonl;follow_links=false")
    same(found, wanted)
    assert [d.id for d in found] == ["a"]
    assert report.reasons == {
        "path outside the folder": 1,
        "image is a URL": 1,
        "missing file": 1,
    }
    same(read("jsonl:gs://me/corpus/list.json")[0], found)
    elsewhere = f"jsonl:{corpus}/list.json;images=gs://me/corpus"
    assert read(elsewhere)[0][0].images[0].shape == (4, 6, 3)


def test_parquet(corpus):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"caption": ["one", "two"], "image": [jpeg(1), jpeg(2)]})
    pyarrow.parquet.write_table(table, corpus / "a.parquet", row_group_size=1)
    same(read("gs://me/corpus/*.parquet")[0], read(f"{corpus}/*.parquet")[0])
    with pytest.raises(ValueError, match="gs://me/corpus/a.parquet has no column 'x'"):
        find_shards("gs://me/corpus/a.parquet;text=x")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("webdataset:gs://none/{0..3}.tar", "there is no file below gs://none"),
        ("webdataset:gs://me/corpus/{0000..0009}.tar", "7 of the names.*/0003.tar"),
        ("webdataset:gs://me/corpus/x*.tar", "no file matches gs://me/corpus/x"),
        ("webdataset:gs://me/nowhere/*.tar", "there is no file below gs://me/nowhere"),
        ("webdataset:gs://me/corpus/9.tar", "there is no gs://me/corpus/9.tar"),
        ("webdataset:gs://me/corpus", r"is a folder; name its files, as 'gs://me/corp"),
        ("webdataset:gs://closed/*.tar", "no permission for gs://closed"),
        ("webdataset:gs://*/0.tar", "names no bucket"),
        ("folder:gs://me/corpus", "only webdataset, parquet, jsonl can be read"),
        ("tfds:coco;data_dir=gs://me", "in a bucket, from which only"),
        ("gs://me/corpus/images", "does not show what kind of source it is"),
    ],
)
def test_unreadable_sources_are_refused(corpus, source, words):
    with pytest.raises((OSError, ValueError), match=words):
        list(read_documents(source))


def test_a_tar_that_becomes_unreadable_is_not_a_bad_record(corpus):
    shards = find_shards("gs://me/corpus/*.tar")
    (corpus / "0001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="there is no gs://me/corpus/0001.tar"):
        list(read_shard(shards[1], ReadReport()))


def test_patterns_match_as_on_a_disk():
    for pattern, name, fits in (
        ("*.tar", "a.tar", True),
        ("*.tar", "a/b.tar", False),
        ("**/*.tar", "a.tar", True),
        ("**/*.tar", "a/b/c.tar", True),
        ("a/**", "a/b/c", True),
        ("a?c", "a/c", False),
        ("[ab]/*", "b/x", True),
    ):
        assert _fits(pattern.split("/"), name.split("/")) == fits, (pattern, name)
