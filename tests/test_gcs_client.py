"""The real gcsfs, which `fake_bucket` replaces elsewhere, with a server on 127.0.0.1."""

from __future__ import annotations

import numpy as np
import pytest
from fake_gcs import Server

from racm3_jax.buckets import Bucket, BucketPath
from racm3_jax.checkpoints.bucket import BucketSteps
from racm3_jax.documents.readers import read_documents
from racm3_jax.training.mirror import Mirror

pytestmark = [
    pytest.mark.parity,
    # Of Google's packages.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def server(monkeypatch):
    gcsfs = pytest.importorskip("gcsfs")
    running = Server()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield running
    gcsfs.GCSFileSystem.clear_instance_cache()
    running.shutdown()
    running.server_close()


def test_files_ranges_and_listings(server, tmp_path):
    bucket = Bucket("gs://me/run")
    assert bucket.find() == {}
    bucket.write("a/b", b"12345")
    bucket.write("c", b"")
    first = bucket.find()
    assert {n: f.size for n, f in first.items()} == {"a/b": 5, "c": 0}
    assert bucket.find(depth=1).keys() == {"c"}
    assert bucket.read("a/b", 1, 3) == b"23" and bucket.read("c") == b""
    bucket.write("c", b"1")
    assert bucket.find()["c"].version != first["c"].version
    bucket.remove("c")
    bucket.remove("c")
    data = np.random.default_rng(0).bytes(12 << 20)  # more than gcsfs sends at once
    (tmp_path / "here").write_bytes(data)
    bucket.put("large", tmp_path / "here")
    bucket.get("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with BucketPath("gs://me/run/large").open() as stream:
        assert stream.seek(11 << 20) and stream.read(9) == data[11 << 20 :][:9]


def test_its_errors_become_our_sentences(server):
    for url, kind, words in (
        ("gs://me/x", FileNotFoundError, "there is no gs://me/x/a"),
        ("gs://none/x", FileNotFoundError, "there is no gs://none/x/a"),
        ("gs://closed/x", PermissionError, "no permission for gs://closed/x/a"),
    ):
        with pytest.raises(kind, match=words):
            Bucket(url).read("a")
    with pytest.raises(PermissionError, match="no permission for gs://closed/x"):
        Bucket("gs://closed/x").find()
    with pytest.raises(PermissionError, match="no permission for gs://closed"):
        next(read_documents("webdataset:gs://closed/*.tar"))
    with pytest.raises(FileNotFoundError, match="there is no file below gs://none"):
        next(read_documents("webdataset:gs://none/{0..3}.tar"))


def test_a_mirror_and_a_checkpoint_of_two_processes(server, tmp_path):
    with Mirror("gs://me/run") as mirror:
        (mirror.folder / "config.json").write_text("{}")
    with Mirror("gs://me/run", leads=False) as mirror:
        assert (mirror.folder / "config.json").read_text() == "{}"
    for index in (1, 0):
        folder = tmp_path / str(index)
        (folder / "7" / "state" / "a").mkdir(parents=True)
        (folder / "7" / "state" / "a" / f"{index}.0").write_text(str(index))
        steps = BucketSteps(
            Bucket("gs://me/run/checkpoints"), folder, index=index, count=2
        )
        steps.publish(7, keep=1)
    assert steps.steps() == [7] and steps.fetch(7) is None
    assert (tmp_path / "0" / "7" / "state" / "a" / "1.0").read_text() == "1"
