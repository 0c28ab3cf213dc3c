"""A work directory in a bucket, here fsspec's memory file system."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import fake_bucket
import fsspec
import pytest

from racm3_jax.buckets import is_url, refuse_url
from racm3_jax.training.mirror import Mirror

URL = "memory://bucket/run"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The memory file system, empty; its files as `{name: content}`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    system = fsspec.filesystem("memory")
    system.store.clear()

    def read():
        return {
            path.removeprefix("/bucket/run/"): system.cat_file(path)
            for path in system.find("/bucket/run")
        }

    yield read
    system.store.clear()


def write(mirror, name, content="x"):
    path = mirror.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_written_files_are_mirrored_and_restored(bucket):
    with Mirror(URL) as mirror:
        write(mirror, "config.json", "{}")
        write(mirror, "model/config.json", "m")
        folder = mirror.folder
    assert not folder.exists()
    assert bucket() == {"config.json": b"{}", "model/config.json": b"m"}
    with Mirror(URL) as mirror:
        assert (mirror.folder / "model" / "config.json").read_text() == "m"
        write(mirror, "config.json", "changed")
        (mirror.folder / "model" / "config.json").unlink()
    assert bucket() == {"config.json": b"changed"}


def test_folders_of_killed_processes_are_removed_and_no_others(bucket, tmp_path):
    (tmp_path / "racm3-mirror-dead" / "checkpoints").mkdir(parents=True)
    (tmp_path / "racm3-mirror-dead-kept").mkdir()
    with Mirror(URL) as first, Mirror(URL, leads=False) as second:
        assert first.folder.is_dir() and second.folder.is_dir()
        names = {p.name for p in tmp_path.iterdir()}
        assert names == {
            *(first.folder.name, second.folder.name),
            "racm3-mirror-dead-kept",
        }


def test_it_is_copied_while_it_is_written(bucket):
    """After a kill, the bucket has the files pushed so far."""
    mirror = Mirror(URL, seconds=0.01)
    mirror.pull()
    mirror._thread.start()
    write(mirror, "metrics.jsonl", "a line")
    for _ in range(1000):
        # An earlier, incomplete version may have been copied before.
        if bucket() == {"metrics.jsonl": b"a line"}:
            break
        mirror._closed.wait(0.01)
    assert bucket() == {"metrics.jsonl": b"a line"}
    mirror._closed.set()
    mirror._thread.join()


def test_only_files_useful_elsewhere_are_copied(bucket):
    """Checkpoints are copied by `checkpoints.bucket`, when they are complete."""
    with Mirror(URL) as mirror:
        for name in (
            "training.lock",
            "processes/0",
            "checkpoints/3/state/a",
            ".config.json.partial",
        ):
            write(mirror, name)
    assert bucket() == {}


def test_a_manifest_is_written_last_and_deleted_first(bucket, monkeypatch):
    order = []
    with Mirror(URL) as mirror:
        for name in ("put", "remove"):
            call = getattr(mirror.bucket, name)

            def log(*args, call=call, name=name):
                order.append((name[:2], args[0].rsplit("/", 1)[-1]))
                return call(*args)

            monkeypatch.setattr(mirror.bucket, name, log)
        write(mirror, "model/manifest.json")
        write(mirror, "model/z")
        mirror.push()
        for path in mirror.folder.rglob("*"):
            if path.is_file():
                path.unlink()
    assert order == [
        ("pu", "z"),
        ("pu", "manifest.json"),
        ("re", "manifest.json"),
        ("re", "z"),
    ]


def test_a_follower_gets_the_leaders_files_and_adds_only_its_traces(bucket):
    with Mirror(URL) as leader, Mirror(URL, leads=False) as follower:
        write(leader, "memory/manifest.json", "1")
        leader.push()
        assert not (follower.folder / "memory").exists()
        follower.pull()
        assert (follower.folder / "memory" / "manifest.json").read_text() == "1"
        write(leader, "memory/manifest.json", "2")
        leader.push()
        follower.pull()
        assert (follower.folder / "memory" / "manifest.json").read_text() == "2"
        write(follower, "memory/manifest.json", "of a follower")
        write(follower, "profile/host1.pb", "trace")
        (follower.folder / "memory" / "manifest.json").unlink()
    assert bucket() == {"memory/manifest.json": b"2", "profile/host1.pb": b"trace"}


def test_files_that_could_not_be_copied_are_kept(bucket, monkeypatch):
    with pytest.raises(OSError, match="no more room.*it is kept in"), Mirror(URL) as m:
        write(m, "config.json", "{}")

        def fail(*_):
            raise OSError("no more room")

        monkeypatch.setattr(m.bucket.system, "put_file", fail)
    assert (m.folder / "config.json").read_text() == "{}"
    assert m.folder.name.endswith("-kept")


def test_urls_are_known_and_refused_elsewhere():
    assert is_url("gs://a/b") and is_url("gs:/a/b") and is_url("memory://x")
    assert not any(map(is_url, ("a/b", "/a", "shipped:flagworld/clip", "c:\\a")))
    with pytest.raises(ValueError, match=r"gs://a is a URL, but the memory must be on"):
        refuse_url("gs://a", "the memory")
    with pytest.raises(ValueError, match="cannot open nothing://a: "):
        Mirror("nothing://a")


ROOT = pathlib.Path(__file__).parent.parent.parent


def start(total: int, workdir: str) -> list[subprocess.Popen]:
    """A training of 12 steps by several processes, in `fake_bucket`'s buckets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, fake_bucket.__file__, "train", f"--workdir={workdir}"),
        f"--config={ROOT}/configs/flagworld_tiny.py",
        *("--config.train.num_steps=12", "--config.train.checkpoint_every=3"),
        *("--config.train.log_every=1", "--config.mesh.data=1"),
        f"--config.mesh.fsdp={total}",
    ]
    names = ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID")
    common = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            command,
            env=common
            | dict(zip(names, (f"localhost:{port}", str(total), str(n)), strict=True)),
            stderr=subprocess.PIPE,
        )
        for n in range(total)
    ]


def finish(running: list[subprocess.Popen]) -> None:
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.slow
def test_two_killed_processes_resume_from_a_bucket_bit_for_bit(gs):
    """They have no common folder: each has its own, and the bucket."""
    finish(start(2, "gs://me/whole"))
    running = start(2, "gs://me/broken")
    deadline = time.monotonic() + 900
    while not (gs / "me" / "broken" / "checkpoints" / "3" / "manifest.json").exists():
        assert all(p.poll() is None for p in running) and time.monotonic() < deadline
        time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(2, "gs://me/broken"))
    losses = []
    for name in ("whole", "broken"):
        lines = (gs / "me" / name / "metrics.jsonl").read_text().splitlines()
        found = {line["step"]: line["objective"] for line in map(json.loads, lines)}
        losses.append([found[step] for step in range(1, 13)])
    assert losses[0] == losses[1]
    model = "model/model.safetensors"
    whole, broken = (gs / "me" / n / model for n in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
