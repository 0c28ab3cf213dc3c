"""The sha256 manifest of a directory, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint or weights directory that cannot be used as it is."""


def write_manifest(directory: Path) -> None:
    """Writes the size and sha256 of every file under `directory`, aside and renamed."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
        for name, path in _files(directory).items()
    }
    record = {"format_version": FORMAT_VERSION, "files": files}
    write_aside(directory / MANIFEST_NAME, json.dumps(record, indent=1).encode())


def verify_manifest(directory: Path) -> str | None:
    """None when every file is as `write_manifest` saw it, else what is wrong."""
    try:
        record = json.loads((directory / MANIFEST_NAME).read_text())
        expected = {
            name: (entry["bytes"], entry["sha256"])
            for name, entry in record["files"].items()
        }
    except FileNotFoundError:
        return "its save did not finish (no manifest)"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is damaged ({error!r})"
    found = _files(directory)
    for name in sorted(set(expected) ^ set(found)):
        return f"{name} is {'missing' if name in expected else 'not in the manifest'}"
    for name, (num_bytes, sha256) in expected.items():
        if found[name].stat().st_size != num_bytes:
            return f"{name} has {found[name].stat().st_size} bytes, not {num_bytes}"
        if _file_sha256(found[name]) != sha256:
            return f"the checksum of {name} differs"
    return None


def _files(directory: Path) -> dict[str, Path]:
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST_NAME
    }


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_aside(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, renames: readers see the old file or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
