"""Memories in buckets are copied to this machine: once, and again when they change."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import shutil

import fake_bucket
import pytest
from memory_fakes import FakeEmbedder, FakeTokenizer, make_document
from ml_collections import ConfigDict

from racm3_jax import buckets, cli, storage
from racm3_jax.memory import edit, staging
from racm3_jax.memory.memory import Memory
from racm3_jax.wiring import parts

URL = "gs://me/memory"


@pytest.fixture
def there(gs, build, documents, tmp_path, monkeypatch):
    """A memory in a bucket, as a folder; the cache is `tmp_path/racm3/memories`."""
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path / "racm3"))
    build(documents)
    shutil.copytree(tmp_path / "memory", gs / "me" / "memory")
    yield gs / "me" / "memory"
    forget()


def forget():
    """As at the end of a process."""
    while staging._in_use:
        os.close(staging._in_use.popitem()[1])


def copied() -> int:
    """Bytes read since the last call."""
    log = fake_bucket.FolderBuckets.log
    total = sum(
        (stop or 0) - (start or 0) for c, _, start, stop in log if c[:3] == "cat"
    )
    log.clear()
    return total


def copies(tmp_path):
    top = tmp_path / "racm3" / "memories"
    return [p for p in top.glob("*/*") if p.is_dir() and p.name != "manifest"]


def test_a_memory_at_a_url_is_copied_once(there, tmp_path, documents):
    with Memory.load(URL, FakeEmbedder(), FakeTokenizer()) as memory:
        assert memory.path in copies(tmp_path) and len(memory) == len(documents)
        assert memory.documents([3])[0].id == "doc-3"
        with pytest.raises(ValueError, match=f"is a copy of {URL}, and changes"):
            memory.remove([3])
        with pytest.raises(ValueError, match=f"is a copy of {URL}"):
            edit.compact(memory.path)
    assert copied() > 1000
    with Memory.load(f"{URL}/") as again:
        assert again.path == memory.path
    assert copied() == 0


def test_a_changed_memory_is_copied_and_the_old_copy_deleted_when_unused(
    there, tmp_path, documents, build
):
    old = staging.stage(URL)
    # Files that racm3 did not write are kept.
    (old.parent / "mine").mkdir()
    build([*documents, make_document(40)], name="larger")
    shutil.rmtree(there)
    shutil.copytree(tmp_path / "larger", there)
    forget()
    with open(old.with_name(f"{old.name}.used")) as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        new = staging.stage(URL)
        assert new != old and old.is_dir()
    with Memory.load(new) as memory:
        assert len(memory) == 41
    assert staging.stage(URL) == new
    assert not old.exists() and (old.parent / "mine").is_dir()
    record = json.loads((old.parent / staging.RECORD_FILE).read_bytes())
    assert record["url"] == URL and list(record["copies"]) == [new.name]


def test_removals_in_the_bucket_reach_the_copy(there):
    first = staging.stage(URL)
    with Memory.load(there) as memory:
        memory.remove([5])
    with Memory.load(URL) as memory:
        assert memory.path == first and memory.num_allowed == 39


def test_a_killed_copy_resumes(there, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "COPY_BYTES", 1000)
    largest = max(there.rglob("*"), key=lambda p: p.stat().st_size)
    size = largest.stat().st_size
    assert size > 5000
    read, calls = buckets.Bucket.read, []

    def break_off(self, name, *ends):
        if name == largest.name:
            calls.append(ends)
            if len(calls) == 4:
                raise KeyboardInterrupt
        return read(self, name, *ends)

    monkeypatch.setattr(buckets.Bucket, "read", break_off)
    with pytest.raises(KeyboardInterrupt):
        staging.stage(URL)
    (partial,) = copies(tmp_path)
    assert (partial / largest.name).stat().st_size == 3000
    # A wrong byte is found by the checksum, and the file is copied again.
    (partial / largest.name).write_bytes(bytes(3000))
    copy = staging.stage(URL)
    assert calls[4] == (3000, 4000) and (0, 1000) in calls[5:]
    assert storage.list_files(copy) == storage.list_files(there)
    assert not partial.exists() and len(Memory.load(copy)) == 40


def test_errors_in_the_bucket_are_reported(there, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no memory at gs://me/no "):
        Memory.load("gs://me/no")
    largest = max(there.rglob("*"), key=lambda p: p.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[:-1] + b"x")
    with pytest.raises(
        storage.IntegrityError, match=f"{URL}/{largest.name} is not the"
    ):
        Memory.load(URL)
    largest.write_bytes(data)

    def full(_):
        return shutil._ntuple_diskusage(1, 1, 0)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(OSError, match="GB more, but the disk.*give another --memory_c"):
        Memory.load(URL)
    (there / "manifest.json").write_bytes(b'{"format_version": 99}')
    with pytest.raises(ValueError, match=f"at {URL} has format version 99.*: copy it"):
        Memory.load(URL)


def test_only_one_of_two_readers_copies(there):
    """Tested with threads; the file lock also works between processes."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(staging.stage, [URL, URL])
    assert first == second
    log = [
        entry[1] for entry in fake_bucket.FolderBuckets.log if entry[0] == "cat_file"
    ]
    assert log.count("me/memory/manifest.json") == 2
    assert log.count("me/memory/documents.array_record") == 1


def test_commands_and_configs_name_the_cache(there, tmp_path, capsys):
    chosen = tmp_path / "chosen"
    flags = [f"--memory={URL}", f"--memory_cache={chosen}"]
    assert cli.main(["memory", "verify", *flags]) == 0
    assert f"{URL}: " in capsys.readouterr().out
    assert cli.main(["memory", "remove", f"--memory={URL}", "--ids=doc-1"]) == 2
    config = ConfigDict({"memory_path": URL, "memory": {"cache": str(chosen)}})
    config.memory.index = "table"
    with parts.open_memory(config, URL, FakeTokenizer(), FakeEmbedder()) as memory:
        (copy,) = {p for p in chosen.glob("*/*") if (p / "index").is_dir()}
        assert memory.path == copy and not copies(tmp_path)
        assert f"{URL} is read from {copy}" in capsys.readouterr().err
        with pytest.raises(ValueError, match=f"{URL} has no table/: make it where"):
            parts.prepare_search(config, memory)
