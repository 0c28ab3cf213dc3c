"""Atomic writes, checksums and locks for files and folders.

    path                 what readers see: the old or the new version, never part of one
    .path.partial        being written, locked by its writer; reused, or deleted by `clean`
    .path.replaced       the old version during a swap; restored, or deleted by `clean`
    .path.deleted        being deleted; no longer visible to readers

Every file and folder that a command writes is written here. A writer that crashes
leaves at most these hidden names, and its lock ends with it: the next writer of the
same path takes them over. ScaNN silently loads most files with flipped bits and then
returns wrong results, so no library gets a file before its sha256 is verified.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

CHUNK_BYTES = 1 << 20
HASHING_THREADS = 4
THREADS_FROM_BYTES = 1 << 24
# Signature of `describe_files`.
Describe = Callable[[pathlib.Path, Iterable[str]], dict[str, dict[str, Any]]]
CACHE_VARIABLE = "RACM3_CACHE"
LEFTOVERS = ("partial", "replaced", "deleted")
# Bytes of a file name: Linux allows 255, and a leftover's name is longer than its
# path's.
_MAX_STEM_BYTES = 200


class IntegrityError(ValueError):
    """One of our files is missing, damaged, or in the wrong place."""


def cache_directory(name: str) -> pathlib.Path | None:
    """A folder, created if missing, for data that this machine can recompute.

    `~/.cache/racm3/NAME`, or in the folder RACM3_CACHE; None with
    RACM3_CACHE=off, and on machines without a home directory.

    Raises:
      ValueError: no folder can be created at RACM3_CACHE.
    """
    chosen = os.environ.get(CACHE_VARIABLE, "")
    if chosen.lower() == "off":
        return None
    try:
        root = pathlib.Path(chosen or "~/.cache/racm3").expanduser()
        (root / name).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        if not chosen:
            return None
        raise ValueError(
            f"{CACHE_VARIABLE} is {chosen!r}, where no folder can be created ({error}): "
            f"give another path, or {CACHE_VARIABLE}=off"
        ) from error
    return root / name


def compute_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file, read in blocks (hashing releases the GIL)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def list_files(directory: pathlib.Path) -> list[str]:
    """Paths of all files below `directory`, relative and with `/`, sorted."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file()
    )


def describe_files(
    directory: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes": size, "sha256": digest}}` of the named files."""
    paths = {name: directory / name for name in names}
    sizes = [path.stat().st_size for path in paths.values()]
    if sum(sizes) < THREADS_FROM_BYTES:
        digests = list(map(compute_sha256, paths.values()))
    else:
        with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as pool:
            digests = list(pool.map(compute_sha256, paths.values()))
    return {
        name: {"bytes": size, "sha256": digest}
        for name, size, digest in zip(paths, sizes, digests, strict=True)
    }


def verify_files(
    directory: pathlib.Path,
    files: Mapping[str, Mapping[str, Any]],
    remedy: str,
    describe: Describe = describe_files,
) -> None:
    """Compares every file with its recorded size and sha256.

    Args:
      directory: the folder of the files.
      files: as `describe_files` returned it.
      remedy: what the user should do; ends the error message.
      describe: reads the files; `checksums` has variants that read less. Files that it
        omits are compared by size only.

    Raises:
      IntegrityError: names the first missing or different file.
    """
    for name, expected in files.items():
        if not is_inside(name):
            raise IntegrityError(f"{name!r} points outside of {directory}; {remedy}")
        path = directory / name
        if not (
            isinstance(expected, Mapping)
            and isinstance(expected.get("bytes"), int)
            and isinstance(expected.get("sha256"), str)
        ):
            raise IntegrityError(
                f"{name!r} is listed without size and sha256; {remedy}"
            )
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise IntegrityError(
                f"{path} is corrupt: it has {size} bytes instead of "
                f"{expected['bytes']}; {remedy}"
            )
    for name, found in describe(directory, files).items():
        expected = files[name]["sha256"]
        if found["sha256"] != expected:
            raise IntegrityError(
                f"{directory / name} is corrupt: its sha256 is "
                f"{found['sha256'][:12]}… instead of {expected[:12]}…; {remedy}"
            )


def is_inside(name: Any) -> bool:
    """Whether a relative path, written with `/`, stays inside its folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def encode_sealed(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON with the sha256 of its own content as an extra field."""
    return _encode({**content, "sha256": content_digest(content)})


def content_digest(content: Mapping[str, Any]) -> str:
    """The sha256 that seals `content`."""
    return hashlib.sha256(_encode(content)).hexdigest()


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode("ascii")


def decode_sealed(data: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Content of a sealed JSON file; any changed byte is an error, even white space.

    Args:
      data: content of the file.
      name: its path, for the error message.
      remedy: what the user should do.

    Raises:
      IntegrityError: not a JSON object, or its checksum differs.
    """
    try:
        content = json.loads(data.decode("ascii"))
        content.pop("sha256")
        if encode_sealed(content) == data:
            return content
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        pass
    raise IntegrityError(
        f"{name} is corrupt: it does not match its own checksum; {remedy}"
    )


def sync_directory(directory: pathlib.Path) -> None:
    """Makes renames inside `directory` durable (fsync)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: pathlib.Path) -> None:
    """Makes a file that another library wrote durable (fsync)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def leftover(path: pathlib.Path, kind: str) -> pathlib.Path:
    """The hidden name next to `path` under which it is written, replaced or deleted."""
    stem = path.name.encode("utf-8", "surrogateescape")
    if len(stem) > _MAX_STEM_BYTES:
        digest = hashlib.sha256(stem).hexdigest()[:16]
        stem = stem[: _MAX_STEM_BYTES - 17] + b"-" + digest.encode()
    name = stem.decode("utf-8", "surrogateescape")
    return path.with_name(f".{name}.{kind}")


def is_leftover(name: str) -> bool:
    """Whether a file name may be a leftover of a crashed writer."""
    return name.startswith(".") and name.rpartition(".")[2] in LEFTOVERS


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file atomically.

    Raises:
      OSError: the disk is full, the path is a folder, …; the old file is unchanged.
    """
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Writes a file at `path` atomically, with any library.

    Yields the path of an empty temporary file. When the block ends without an error, it
    is synced and renamed to `path`; after an error it is removed. Processes that write
    the same path take turns.

    Raises:
      IsADirectoryError: `path` is a folder.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of a file")
    partial = leftover(path, "partial")
    try:
        descriptor = _open_locked(partial)
    except OSError as error:
        _name_place(error, partial, path)
        raise
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name_place(error, partial, path)
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def _open_locked(partial: pathlib.Path) -> int:
    """Opens an empty file and locks it; waits for other writers."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The previous owner may have renamed or deleted it meanwhile.
            if _is_same(descriptor, partial):
                os.truncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _name_place(
    error: BaseException, partial: pathlib.Path, path: pathlib.Path
) -> None:
    """Write errors name the target path, not the hidden name or nothing.

    A full disk is detected by `write`, which has no path.
    """
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename  # None, or a file descriptor
        if not isinstance(named, str | bytes) or pathlib.Path(
            os.fsdecode(named)
        ).is_relative_to(partial):
            error.filename = str(path)


class BusyError(ValueError):
    """Another process is writing the same path."""


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str], *, replace: bool = False
) -> Iterator[pathlib.Path]:
    """Writes a directory at `path` atomically.

    Yields an empty temporary directory. When the block ends without an error, all its
    files are synced and it is renamed to `path`; after an error it is removed.

    Args:
      path: of the directory; an empty one there counts as absent.
      replace: replace and delete an existing directory. The caller must have checked
        that this is allowed (`check_target`).

    Raises:
      BusyError: another process is writing `path`.
      FileExistsError: `path` exists, and `replace` is False.
    """
    path = pathlib.Path(path)
    check_absent(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = leftover(path, "partial"), leftover(path, "replaced")
    try:
        descriptor = _make_locked_directory(partial, path)
    except OSError as error:
        _name_place(error, partial, path)
        raise
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                sync_file(pathlib.Path(folder) / name)
            sync_directory(pathlib.Path(folder))
        check_absent(path, replace)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.exists():
            delete_directory(replaced)
            os.rename(path, replaced)
        os.rename(partial, path)
    except BaseException as error:
        _restore(path)
        shutil.rmtree(partial, ignore_errors=True)
        _name_place(error, partial, path)
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_absent(path: pathlib.Path, replace: bool = False) -> None:
    """Refuses a path that exists, unless it is an empty directory.

    Raises:
      FileExistsError: `path` exists; with `replace`: it is not a directory.
    """
    if path.is_dir() and not path.is_symlink():
        if replace or not any(path.iterdir()):
            return
        raise FileExistsError(f"{path} exists and is not empty: give another path")
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a folder: give another path")


def check_target(
    path: pathlib.Path,
    what: str,
    is_own: Callable[[pathlib.Path], bool],
    overwrite: bool,
) -> None:
    """Refuses to replace `path`, unless it is of the same kind and may be overwritten.

    Args:
      path: target of the write.
      what: its kind, for the error message ("memory").
      is_own: whether a directory is of that kind.
      overwrite: whether the user asked to replace it.

    Raises:
      FileExistsError: says what exists and what to do.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if path.is_symlink() or not path.is_dir() or not is_own(path):
        raise FileExistsError(
            f"{path} exists and is not a {what}, so it is left alone: give another path"
        )
    if not overwrite:
        raise FileExistsError(
            f"there is a {what} at {path} already: use it, give another path, or "
            "replace it (--overwrite; overwrite=True from Python)"
        )


def _make_locked_directory(partial: pathlib.Path, path: pathlib.Path) -> int:
    """Opens and locks an empty directory; reuses the one of a crashed writer."""
    with contextlib.suppress(FileExistsError):
        partial.mkdir()
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        with contextlib.suppress(OSError):
            partial.rmdir()  # fails, as intended, if a crashed writer left files
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_same(descriptor, partial):
            raise BlockingIOError
        _empty(partial)
    except BlockingIOError:
        os.close(descriptor)
        raise BusyError(
            f"another process is writing {path}: wait for it, or give another path"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _empty(directory: pathlib.Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _restore(path: pathlib.Path) -> None:
    """Rolls back a swap that was interrupted between its two renames."""
    replaced = leftover(path, "replaced")
    if replaced.is_dir() and not path.exists():
        os.rename(replaced, path)


def restore(path: pathlib.Path) -> None:
    """Restores a folder whose replacement was interrupted by a crash; for readers."""
    if leftover(path, "replaced").is_dir() and not path.exists():
        clean(path)


def delete_directory(path: pathlib.Path) -> None:
    """Deletes a folder atomically: readers never see part of it."""
    if not path.is_dir():
        return
    deleted = leftover(path, "deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    os.rename(path, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def clean(path: pathlib.Path) -> None:
    """Cleans up after a crashed writer of the folder `path`; leaves live writers alone.

    An interrupted swap is rolled back; partial writes and interrupted deletions are
    deleted. The same inside the folder, for its files.
    """
    partial = leftover(path, "partial")
    with contextlib.ExitStack() as stack:
        if partial.is_dir():
            try:
                descriptor = _make_locked_directory(partial, path)
            except BusyError:
                return
            stack.callback(os.close, descriptor)
        _restore(path)
        for kind in LEFTOVERS:
            shutil.rmtree(leftover(path, kind), ignore_errors=True)
        if path.is_dir():
            for entry in path.iterdir():
                if not is_leftover(entry.name):
                    continue
                with locked(entry, wait=False, make=False) as is_free:
                    if is_free and entry.is_dir():
                        shutil.rmtree(entry, ignore_errors=True)
                    elif is_free:
                        entry.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(
    path: str | os.PathLike[str], *, wait: bool = True, make: bool = True
) -> Iterator[bool]:
    """An exclusive lock, released when the process ends, even if it is killed.

    Yields whether the lock is held: False if another process holds it and `wait` is
    False, or if there is nothing to lock.

    Args:
      path: a file, created if missing, or an existing directory.
      wait: wait until the lock is free.
      make: create a missing file, if its folder exists.
    """
    path = pathlib.Path(path)
    flags = os.O_RDONLY
    if not path.is_dir():
        flags = os.O_RDWR | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        if make and path.parent.is_dir():
            raise
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Exclusive access for one process at a time; the lock file names the owner.

    Args:
      path: of the lock file; its folder must exist.
      what: the work, for the error message ("a training in runs/a").

    Raises:
      BusyError: names the host and process of the owner.
    """
    path = pathlib.Path(path)
    with locked(path, wait=False) as held:
        if not held:
            owner = path.read_text(errors="replace").strip() or "another process"
            raise BusyError(
                f"{what} is already running ({owner}): wait for it or stop it"
            )
        path.write_text(f"host {socket.gethostname()}, process {os.getpid()}\n")
        yield
