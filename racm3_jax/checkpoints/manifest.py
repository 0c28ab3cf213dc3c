"""The sealed manifest of a folder: size and sha256 of every file, and of itself.

    folder/  config.json  model.safetensors  …  manifest.json

The manifest is written last, so a folder without one is unfinished; changed, missing or
unlisted files are detected before use. The checksum has no key: it detects damage and
mixed-up files, not tampering.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from racm3_jax import storage

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_UNSEALED_VERSION = 1
_MAX_JSON_BYTES = 50_000_000


class CheckpointError(ValueError):
    """A checkpoint or weights directory that cannot be used."""


def write_manifest(directory: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of all files below `directory`.

    Args:
      directory: must be complete.
      facts: JSON-serialisable metadata in the manifest: kind, origin, ….
    """
    names = [n for n in storage.list_files(directory) if n != MANIFEST_NAME]
    files = storage.describe_files(directory, names)
    storage.write_file(directory / MANIFEST_NAME, encode(files, facts))


def encode(files: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bytes:
    """The encoded manifest of files from `storage.describe_files`."""
    record = {**(facts or {}), "format_version": FORMAT_VERSION, "files": dict(files)}
    return storage.encode_sealed(record)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The verified content of a manifest; None without one.

    Manifests of format 1 had no seal.

    Raises:
      CheckpointError: it is damaged.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    remedy = "copy the directory again"
    record = read_object(path, remedy)
    version, files = record.get("format_version"), record.get("files")
    if version != _UNSEALED_VERSION or "sha256" in record:
        try:
            record = storage.decode_sealed(path.read_bytes(), str(path), remedy)
        except storage.IntegrityError as error:
            raise CheckpointError(str(error)) from None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version!r}; this version reads formats up to "
                f"{FORMAT_VERSION}: update racm3_jax"
            )
    if not isinstance(files, dict) or not all(
        storage.is_inside(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    ):
        raise CheckpointError(f"{path} is damaged: its list of files is invalid")
    return record


def verify_manifest(directory: Path) -> str | None:
    """None if every file matches the manifest, else what is wrong."""
    try:
        record = read_manifest(directory)
    except CheckpointError as error:
        return f"its manifest is damaged ({error})"
    if record is None:
        return "its save did not finish (no manifest)"
    return _find_difference(directory, record["files"])


def verify_folder(
    directory: Path, only: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """The manifest of a folder of weights or of a tokenizer, after verification.

    None for a folder of an earlier version without a manifest, which its reader checks.
    An interrupted swap is rolled back.

    Args:
      directory: the folder.
      only: files whose content is verified; of the others only names and sizes.

    Raises:
      CheckpointError: names the first changed, missing or unlisted file.
    """
    if not directory.exists() and storage.leftover(directory, "replaced").is_dir():
        storage.clean(directory)
    record = read_manifest(directory)
    if record is None:
        return None
    sealed = record["format_version"] != _UNSEALED_VERSION
    problem = _find_difference(directory, record["files"], sealed, only)
    if problem is not None:
        raise CheckpointError(
            f"{directory} is not as it was saved: {problem}; copy the directory again, "
            "without other files in it"
        )
    return record if sealed else None


def verify_file(path: Path) -> None:
    """Verifies one file against the manifest next to it, if listed there.

    Raises:
      CheckpointError: it differs.
    """
    record = read_manifest(path.parent)
    if record is None or path.name not in record["files"]:
        return
    try:
        files = {path.name: record["files"][path.name]}
        storage.verify_files(path.parent, files, "copy the directory again")
    except storage.IntegrityError as error:
        raise CheckpointError(str(error)) from None


def _find_difference(
    directory: Path,
    expected: Mapping[str, Any],
    foreign: bool = True,
    only: Sequence[str] | None = None,
) -> str | None:
    found = _list_kept(directory)
    wrong = set(expected) - set(found)
    if foreign:
        wrong |= set(found) - set(expected)
    for name in sorted(wrong):
        return f"{name} is {'missing' if name in expected else 'not in the manifest'}"
    for name, entry in expected.items():
        num_bytes = (directory / name).stat().st_size
        if num_bytes != entry["bytes"]:
            return f"{name} has {num_bytes} bytes, not {entry['bytes']}"
    compared = [name for name in expected if only is None or name in only]
    for name, entry in storage.describe_files(directory, compared).items():
        if entry["sha256"] != expected[name]["sha256"]:
            return f"the checksum of {name} differs"
    return None


def _list_kept(directory: Path) -> list[str]:
    """Files below a folder, without its manifest and leftovers of crashed writers."""
    return [
        name
        for name in storage.list_files(directory)
        if name != MANIFEST_NAME and not any(map(storage.is_leftover, name.split("/")))
    ]


@contextlib.contextmanager
def sealed_folder(
    path: str | os.PathLike[str],
    kind: str,
    *,
    overwrite: bool,
    facts: Mapping[str, Any] | None = None,
    is_old: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Writes a folder with a manifest atomically.

    Args:
      path: of the folder; its parents are created if missing.
      kind: its kind; it replaces only a folder of the same kind without files that its
        manifest does not list.
      overwrite: whether it may replace such a folder.
      facts: for the manifest.
      is_old: whether a folder without a manifest is of this kind.

    Raises:
      FileExistsError: something else is at `path`.
      storage.BusyError: another process is writing it.
    """
    path = Path(path).absolute()

    def is_own(directory: Path) -> bool:
        try:
            record = read_manifest(directory)
        except CheckpointError:
            return False
        if record is None or record["format_version"] == _UNSEALED_VERSION:
            return is_old is not None and is_old(directory)
        known = record["files"].keys()
        return record.get("kind") == kind and known >= set(_list_kept(directory))

    if not path.exists():
        storage.clean(path)
    storage.check_target(path, f"folder of a {kind} alone", is_own, overwrite)
    storage.clean(path)
    with storage.new_directory(path, replace=overwrite) as directory:
        yield directory
        write_manifest(directory, {"kind": kind, **(facts or {})})


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: too large, not JSON, nested too deeply, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    num_bytes = path.stat().st_size
    if num_bytes > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {num_bytes:,} bytes; at most {_MAX_JSON_BYTES:,} are read: "
            f"{remedy}"
        )
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply: {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: {remedy}")
    return value
