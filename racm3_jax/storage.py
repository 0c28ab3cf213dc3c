"""Files that notice their own damage: checksums, sealed JSON, writing aside.

ScaNN loads most bit-flipped files without a word and then answers wrongly, so nothing
of a memory is handed to a library before its sha256 is right.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CHUNK_BYTES = 1 << 20
HASHING_THREADS = 4
THREADS_FROM_BYTES = 1 << 24


class IntegrityError(ValueError):
    """A file of ours is missing, damaged, or not where it should be."""


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
    directory: pathlib.Path, files: Mapping[str, Mapping[str, Any]], remedy: str
) -> None:
    """Compares every file with its recorded size and sha256.

    Args:
      directory: where the files lie.
      files: as `describe_files` returned it.
      remedy: what the reader of an error should do; ends its sentence.

    Raises:
      IntegrityError: names the first file that is missing or differs.
    """
    for name, expected in files.items():
        path = directory / name
        if os.path.isabs(name) or ".." in pathlib.PurePosixPath(name).parts:
            raise IntegrityError(f"{name!r} points outside of {directory}; {remedy}")
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise IntegrityError(
                f"{path} is corrupt: it has {size} bytes instead of "
                f"{expected['bytes']}; {remedy}"
            )
    found = describe_files(directory, files)
    for name, expected in files.items():
        if found[name]["sha256"] != expected["sha256"]:
            raise IntegrityError(
                f"{directory / name} is corrupt: its sha256 is "
                f"{found[name]['sha256'][:12]}… instead of "
                f"{expected['sha256'][:12]}…; {remedy}"
            )


def encode_sealed(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON with the sha256 of its own content as one more field."""
    return _encode({**content, "sha256": content_digest(content)})


def content_digest(content: Mapping[str, Any]) -> str:
    """The sha256 that seals `content`."""
    return hashlib.sha256(_encode(content)).hexdigest()


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode("ascii")


def decode_sealed(data: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Content of a sealed JSON file; any changed byte is an error, white space too.

    Args:
      data: the file.
      name: its path, for the error.
      remedy: what the reader of an error should do.

    Raises:
      IntegrityError: if it is no JSON object or differs from its seal.
    """
    try:
        content = json.loads(data.decode("ascii"))
        content.pop("sha256")
        if encode_sealed(content) == data:
            return content
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise IntegrityError(
        f"{name} is corrupt: it does not agree with its own checksum; {remedy}"
    )


def sync_directory(directory: pathlib.Path) -> None:
    """Makes renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: pathlib.Path) -> None:
    """Makes the content of a file that another library wrote durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Replaces `path` in one step: readers see the old bytes or the new ones."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory that appears at `path` whole, or not at all.

    Yields an empty directory beside `path`. When the block ends without an error, all
    its files are synced and it takes the place of whatever was at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for name in list_files(aside):
            sync_file(aside / name)
        for directory in [*(p for p in aside.rglob("*") if p.is_dir()), aside]:
            sync_directory(directory)
        if path.exists():
            os.rename(path, replaced)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
