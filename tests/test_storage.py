"""Files and folders are written atomically, whenever the writer is killed."""

from __future__ import annotations

import pathlib
import sys

import pytest

from racm3_jax import storage

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))

from crash_points import crashed


def content_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in storage.list_files(folder)}


def leftovers_in(folder: pathlib.Path) -> list[str]:
    return [p.name for p in folder.rglob(".*")]


def points(action, reset):
    """Crashes at every point of an action, one after another."""
    number = 1
    while True:
        reset()
        if not crashed(action, number):
            return
        yield number
        number += 1


def test_a_file_is_old_or_new_after_any_crash(tmp_path):
    path, seen = tmp_path / "a.json", []
    for _ in points(
        lambda: storage.write_file(path, b"new" * 1000),
        lambda: path.write_bytes(b"old"),
    ):
        seen.append(path.read_bytes() == b"old")
        assert path.read_bytes() in (b"old", b"new" * 1000)
        storage.write_file(path, b"next")
        assert path.read_bytes() == b"next" and leftovers_in(tmp_path) == []
    assert len(seen) >= 4 and all(seen[:3])


def write_three(path, replace):
    with storage.new_directory(path, replace=replace) as folder:
        (folder / "below").mkdir()
        for name in ("a", "below/b", "c"):
            (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize("replace", [False, True])
def test_a_directory_is_old_or_new_after_any_crash(tmp_path, replace):
    path, number = tmp_path / "folder", 0

    def reset():
        storage.delete_directory(path)
        storage.clean(path)
        if replace:
            path.mkdir()
            (path / "old").write_bytes(b"old")

    old = {"old": b"old"} if replace else {}
    new = {name: name.encode() for name in ("a", "below/b", "c")}
    for number in points(lambda: write_three(path, replace), reset):
        storage.clean(path)
        assert content_of(path) in (old, new), number
        assert [
            p for p in leftovers_in(tmp_path) if p.endswith(storage.LEFTOVERS)
        ] == []
        write_three(path, True)
        assert content_of(path) == new and leftovers_in(tmp_path) == []
    assert number >= 9


def test_deleting_is_atomic(tmp_path):
    path = tmp_path / "folder"

    def reset():
        storage.clean(path)
        if not path.exists():
            write_three(path, False)

    for _ in points(lambda: storage.delete_directory(path), reset):
        assert not path.exists() or len(content_of(path)) == 3
        storage.clean(path)
        assert leftovers_in(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(OSError, match="full"),
        storage.replacing(tmp_path / "file") as partial,
    ):
        partial.write_bytes(b"x")
        raise OSError("the disk is full")
    with (
        pytest.raises(OSError, match="full"),
        storage.new_directory(tmp_path / "folder") as partial,
    ):
        (partial / "x").write_bytes(b"x")
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    for path in ("folder", "file"):
        with (
            pytest.raises(FileExistsError, match=path),
            storage.new_directory(tmp_path / path),
        ):
            pass
    with pytest.raises(IsADirectoryError, match="folder"):
        storage.write_file(tmp_path / "folder", b"x")
    with pytest.raises(FileExistsError, match="not a thing"):
        storage.check_target(tmp_path / "folder", "thing", lambda p: False, True)
    with pytest.raises(FileExistsError, match="already"):
        storage.check_target(tmp_path / "folder", "thing", lambda p: True, False)
    storage.check_target(tmp_path / "folder", "thing", lambda p: True, True)
    assert (tmp_path / "folder" / "mine").read_bytes() == b"mine"


def test_a_live_writer_is_not_disturbed(tmp_path):
    path = tmp_path / "folder"
    with storage.new_directory(path) as partial:
        (partial / "a").write_bytes(b"a")
        storage.clean(path)
        with (
            pytest.raises(storage.BusyError, match="another process is writing"),
            storage.new_directory(path),
        ):
            pass
        assert (partial / "a").exists()
    assert content_of(path) == {"a": b"a"}


def test_leftovers_of_long_names(tmp_path):
    path = tmp_path / ("ä" * 120)
    storage.write_file(path, b"x")
    assert path.read_bytes() == b"x"
    first, second = (
        storage.leftover(tmp_path / ("a" * 240 + c), "partial") for c in "bc"
    )
    assert first != second and len(first.name) < 255


def test_work_is_claimed_by_one_process(tmp_path):
    lock = tmp_path / "lock"
    words = r"runs/a is already running .*host .*process"
    with storage.claimed(lock, "a training in runs/a"):
        again = storage.claimed(lock, "a training in runs/a")
        with pytest.raises(storage.BusyError, match=words), again:
            pass
    with storage.claimed(lock, "a training in runs/a"):
        pass


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../x", "a//x", ".", "", "a\\x", "a\nx", 3, None]
)
def test_listed_files_are_inside_the_folder(tmp_path, name):
    entry = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(storage.IntegrityError, match="outside"):
        storage.verify_files(tmp_path, {name: entry}, "restore it")


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": "1", "sha256": "0"}])
def test_listed_files_have_size_and_checksum(tmp_path, entry):
    with pytest.raises(storage.IntegrityError, match="without size"):
        storage.verify_files(tmp_path, {"x": entry}, "restore it")


def test_checksums_detect_every_change(tmp_path):
    data = storage.encode_sealed({"a": [1, 2], "b": "text"})
    assert storage.decode_sealed(data, "x", "restore it") == {"a": [1, 2], "b": "text"}
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(storage.IntegrityError, match="restore it"):
            storage.decode_sealed(bytes(damaged), "x", "restore it")
    with pytest.raises(storage.IntegrityError, match="restore it"):
        storage.decode_sealed(b"[" * 100_000, "x", "restore it")
