"""Ranges, listings and errors of buckets; `fake_bucket` replaces Google's."""

from __future__ import annotations

import io
import json

import fake_bucket
import fsspec
import numpy as np
import pytest

from racm3_jax import buckets, storage
from racm3_jax.buckets import Bucket, BucketPath
from racm3_jax.checkpoints import bucket as checkpoint_bucket
from racm3_jax.checkpoints.bucket import BucketSteps


def test_a_stream_reads_ranges_and_seeks(gs, monkeypatch):
    monkeypatch.setattr(buckets, "RANGE_BYTES", 1000)
    data = np.random.default_rng(0).bytes(10_000)
    (gs / "me" / "a.bin").write_bytes(data)
    path = BucketPath("gs://me/a.bin")
    fake_bucket.FolderBuckets.log.clear()
    with path.open() as stream:
        assert stream.read(10) == data[:10]
        assert stream.seek(-5, io.SEEK_END) == 9995
        assert stream.read() == data[-5:]
        assert stream.seek(500) == 500 and stream.read(8000) == data[500:8500]
    ranges = [stop - start for _, _, start, stop in fake_bucket.FolderBuckets.log[1:]]
    assert max(ranges) <= 8000 and sum(ranges) < 11_000
    assert path.size == 10_000 and str(path) == path.as_posix() == "gs://me/a.bin"


def test_a_folder_lists_and_changes_versions(gs):
    bucket = Bucket("gs:/me/run/")  # as a `Path` leaves it
    assert bucket.url == "gs://me/run" and bucket.find() == {}
    bucket.write("a/b", b"12")
    bucket.write("c", b"1")
    first = bucket.find()
    assert {n: f.size for n, f in first.items()} == {"a/b": 2, "c": 1}
    assert bucket.find(depth=1).keys() == {"c"}
    bucket.write("c", b"2")
    assert bucket.find()["c"].version != first["c"].version
    assert bucket.find()["a/b"] == first["a/b"]
    bucket.remove("c")
    bucket.remove("c")
    assert (bucket / "a").find().keys() == {"b"} and bucket.read("a/b", 1, 2) == b"2"


def test_errors_are_sentences_with_the_url(gs, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no gs://me/x: check the b"):
        Bucket("gs://me").read("x")
    with pytest.raises(FileNotFoundError, match="there is no gs://none/x: check"):
        Bucket("gs://none").write("x", b"")
    with pytest.raises(PermissionError, match="no permission for gs://closed.*gcloud"):
        Bucket("gs://closed").find()

    class Client(Exception):
        code = 404

    def fail(error):
        def call(*_, **__):
            raise error

        monkeypatch.setattr(fake_bucket.FolderBuckets, "cat_file", call)
        return Bucket("gs://me")

    for error, kind, words in (
        (Client("gone"), FileNotFoundError, "there is no gs://me/x"),
        (Client("x", "NoSuchBucket"), FileNotFoundError, "there is no gs://me/x"),
        (RuntimeError("Invalid Credentials, 401"), PermissionError, "no permission"),
        (RuntimeError("reset by peer"), OSError, "gs://me/x cannot be reached"),
    ):
        with pytest.raises(kind, match=words):
            fail(error).read("x")


def test_a_missing_client_names_the_extra(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r'S3; pip install "racm3_jax\[s3\]"'):
        Bucket("s3://me/run")
    with pytest.raises(ValueError, match=r'pip install "racm3_jax\[gcs\]"'):
        BucketPath("gs://me/x")


def save(process: BucketSteps, step: int, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = process.directory / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def pair(gs, tmp_path):
    """Two processes of a run that do not see one another's files."""
    return [
        BucketSteps(
            Bucket("gs://me/run/checkpoints"),
            tmp_path / f"process{index}",
            index=index,
            count=2,
            poll_seconds=0.01,
        )
        for index in range(2)
    ]


OWN = [
    {"state/a/0.0": "a00", "state/a/.zarray": "z", "extra/metadata": "m0"},
    {"state/a/1.0": "a10", "extra/metadata": "m1", "_CHECKPOINT_METADATA": "c1"},
]


def test_parts_of_two_processes_are_one_checkpoint(pair):
    leader, other = pair
    for process, files in zip(pair, OWN, strict=True):
        save(process, 5, files)
    # Files of a killed run for the same step are neither waited for nor read.
    other.bucket.write("5/parts/dead-0001.json", b"not JSON")
    other.bucket.write("5/state/a/7.0", b"left")
    other.publish(5, keep=1)
    assert leader.steps() == []
    leader.publish(5, keep=1)
    assert leader.steps() == other.steps() == [5]
    assert other.fetch(5) is None
    found = storage.list_files(other.directory / "5")
    wanted = OWN[0] | {"state/a/1.0": "a10"}
    assert set(found) == {*wanted, "manifest.json"}
    assert {n: (other.directory / "5" / n).read_text() for n in wanted} == wanted


def test_older_steps_are_deleted_and_a_damaged_one_is_quarantined(pair):
    leader, other = pair
    for step in (5, 7, 9):
        for process, files in zip(pair[::-1], OWN[::-1], strict=True):
            save(process, step, files)
            process.publish(step, keep=2)
    assert leader.steps() == [7, 9]
    assert not any(name.startswith("5/") for name in leader.bucket.find())
    leader.bucket.write("9/state/a/1.0", b"bad")
    assert "checksum of state/a/1.0 differs" in other.fetch(9)
    leader.set_aside(9)
    assert other.steps() == [7]
    leader.bucket.remove("7/extra/metadata")
    assert "there is no gs://me/run/checkpoints/7/extra/metadata" in other.fetch(7)
    for process in pair[::-1]:
        save(process, 11, OWN[0])
        process.publish(11, keep=1)
    # For inspection.
    assert {"9/state/a/1.0", "9/manifest.json.damaged"} <= leader.bucket.find().keys()
    assert leader.steps() == [11]


def test_only_process_0_writes_files_that_are_not_chunks(pair):
    leader = pair[0]
    for process, files in zip(pair[::-1], OWN[::-1], strict=True):
        save(process, 7, files)
        process.publish(7, keep=1)
    names = json.loads(leader.bucket.read("7/manifest.json"))["files"]
    assert "_CHECKPOINT_METADATA" not in names
    assert not checkpoint_bucket._OF_ALL.fullmatch("state/_METADATA")
