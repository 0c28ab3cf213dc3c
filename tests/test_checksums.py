"""Files are not hashed twice, by this machine or by another process of a job."""

from __future__ import annotations

import concurrent.futures
import os
import time
import types

import numpy as np
import pytest

from racm3_jax import checksums, storage

NAMES = ["a", "b", "folder/c", "d"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of 10, 20, 30 and 40 bytes, with old modification times."""
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1.0)
    (tmp_path / "data" / "folder").mkdir(parents=True)
    for number, name in enumerate(NAMES, 1):
        (tmp_path / "data" / name).write_bytes(bytes([number]) * 10 * number)
    return tmp_path / "data"


def write_back(path, data):
    """Other bytes of the same size, with the old modification time."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_is_read_once_until_it_changes(folder, reading):
    expected = storage.describe_files(folder, NAMES)
    assert reading.take() == 100
    for again in (100, 0, 0):
        assert checksums.recall(folder, NAMES) == expected
        assert reading.take() == again
    write_back(folder / "b", b"x" * 20)
    changed = checksums.recall(folder, NAMES)
    assert reading.take() == 20
    assert changed == storage.describe_files(folder, NAMES) != expected
    reading.take()
    os.replace(folder / "a", folder / "d")
    found = checksums.recall(folder, ["d", "b"])
    assert found["d"] == expected["a"] and reading.take() == 10


def test_a_change_without_a_new_time_is_not_detected(folder, monkeypatch):
    """For example on a file system without ctime."""
    stamp = checksums._stamp
    monkeypatch.setattr(checksums, "_stamp", lambda path: [*stamp(path)[:4], 0])
    expected = checksums.recall(folder, NAMES)
    write_back(folder / "b", b"x" * 20)
    assert checksums.recall(folder, NAMES) == expected
    storage.verify_files(folder, expected, "", checksums.recall)
    with pytest.raises(storage.IntegrityError, match="b is corrupt"):
        storage.verify_files(folder, expected, "restore it")


def test_recently_changed_files_are_not_cached(folder, reading, monkeypatch):
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", 2.0)
    now = time.time()
    # Reading takes ten seconds: it counts when that began.
    clock = types.SimpleNamespace(time=lambda: now + 10 * bool(reading.bytes))
    monkeypatch.setattr(checksums, "time", clock)
    for _ in range(2):
        checksums.recall(folder, NAMES)
        assert reading.take() == 100


def test_a_cache_that_is_damaged_or_off_is_ignored(folder, reading, monkeypatch):
    checksums.recall(folder, NAMES)
    (cache,) = (folder.parent / "cache" / "checksums").iterdir()
    for data in (cache.read_bytes()[:-9], b"", b"[]"):
        cache.write_bytes(data)
        reading.take()
        checksums.recall(folder, NAMES)
        assert reading.take() == 100
    monkeypatch.setenv("RACM3_CACHE", "off")
    checksums.recall(folder, NAMES)
    assert reading.take() == 100


def test_concurrent_updates_are_all_kept(folder, reading):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: checksums.recall(folder, [n]), NAMES * 4))
    reading.take()
    checksums.recall(folder, NAMES)
    assert reading.take() == 0


def test_which_process_reads_which_files():
    seen = np.zeros((2, 3, 1), np.uint8)
    seen[1, 2] = 1
    known, sizes = np.zeros((2, 3), bool), np.ones((2, 3), np.float32)
    assert checksums.assign_readers(seen, known, sizes).tolist() == [
        [0, 1, 0],
        [0, 1, 1],
    ]
    known[1, 0] = True
    assert checksums.assign_readers(seen, known, sizes)[:, 0].tolist() == [1, 1]


def test_hosts_that_see_the_same_files_read_each_once(folder, reading, four_hosts):
    expected = storage.describe_files(folder, NAMES)
    reading.take()
    found = four_hosts(lambda _: checksums.describe_together(folder, NAMES))
    assert found == [expected] * 4
    assert sorted(reading.bytes.values()) == [10, 20, 30, 40]
    reading.take()
    four_hosts(lambda _: checksums.describe_together(folder, NAMES))
    assert reading.take() == 0


def test_hosts_with_copies_read_their_own(folder, reading, four_hosts, tmp_path):
    expected = storage.describe_files(folder, NAMES)
    for own in range(4):
        for name in NAMES:
            copy = tmp_path / str(own) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((folder / name).read_bytes())
    (tmp_path / "2" / "b").write_bytes(b"x" * 20)
    reading.take()

    def verify(own):
        try:
            place, describe = tmp_path / str(own), checksums.describe_together
            storage.verify_files(place, expected, "", describe)
        except storage.IntegrityError as error:
            return str(error)
        return ""

    words = four_hosts(verify)
    assert list(reading.bytes.values()) == [100] * 4
    assert [bool(w) for w in words] == [False, False, True, False]
    assert "2/b is corrupt" in words[2]


def test_a_sample_reports_what_was_read(folder, reading):
    said = []
    for fraction in (0.3, 0.01):
        describe = checksums.sample(fraction, said.append, storage.describe_files)
        found = describe(folder, NAMES)
        size = reading.take()
        assert size >= fraction * 100 and size == sum(
            f["bytes"] for f in found.values()
        )
        assert f"{len(found)} of 4 files chosen at random" in said[-1]
    assert checksums.sample(1.0, said.append) is checksums.recall and len(said) == 2
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]; got 0"):
        checksums.sample(0.0, print)
    # By chance, so that the sizes of the others are all that is compared.
    expected = storage.describe_files(folder, NAMES)
    (folder / "d").write_bytes(b"x" * 40)
    with pytest.raises(storage.IntegrityError, match="d is corrupt"):
        for _ in range(200):
            storage.verify_files(folder, expected, "", checksums.sample(0.3, len))
