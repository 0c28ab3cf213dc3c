"""What lies in a memory's directory besides its rows: manifest, deny list, names."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64, UInt64

from racm3_jax import storage
from racm3_jax.types import Modality

FORMAT = "racm3-memory"
FORMAT_VERSION = 1
DENY_FORMAT = "racm3-deny-list"
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.array_record"
INDEX_DIRECTORY = "index"
DENY_FILE = "deny.json"
REMOVED_NAME = "removed.npy"
MODALITY_BITS: Mapping[Modality, int] = {"text": 1, "image": 2}


class Fingerprinted(Protocol):
    """Anything whose identity a memory can be compared with."""

    def fingerprint(self) -> str:
        """Equal for equal behaviour."""
        ...


def hash_name(name: str) -> int:
    """64 bits of a document id or source; 0 stands for an empty one."""
    if not name:
        return 0
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def rebuild_remedy(path: pathlib.Path) -> str:
    """What to do about a memory that cannot be used."""
    return f"remove {path} and build it anew (racm3_jax.Memory.build)"


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """What manifest.json says, once its format, version and seal are right.

    Raises:
      FileNotFoundError: if there is no memory at `path`.
      ValueError: if its format version is another.
      IntegrityError: if the manifest is damaged.
    """
    remedy = rebuild_remedy(path)
    file = path / MANIFEST_FILE
    if not path.is_dir():
        raise FileNotFoundError(f"there is no memory at {path}: {remedy}")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no memory (it has no {MANIFEST_FILE}): {remedy}"
        )
    data = file.read_bytes()
    # Before the seal, which another version may make in another way.
    try:
        seen = json.loads(data)
    except ValueError:
        seen = None
    if isinstance(seen, dict) and seen.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the memory at {path} has format version {seen.get('format_version')}; "
            f"this racm3 reads version {FORMAT_VERSION}: {remedy}"
        )
    manifest = storage.decode_sealed(data, str(file), remedy)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {manifest.get('format')!r} instead of {FORMAT!r}: "
            f"{remedy}"
        )
    return manifest


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Of a memory's content: equal for equal files and settings."""
    return storage.content_digest(manifest)[:16]


def prefixes(manifest: Mapping[str, Any]) -> list[str]:
    """The folders, below the memory's, that its rows lie in; "" is its own.

    A memory is built as one part; every `add` makes one more.
    """
    return [part["prefix"] for part in manifest.get("parts", ({"prefix": ""},))]


def lineage(manifest: Mapping[str, Any]) -> str:
    """Equal for memories whose row numbers mean the same documents."""
    return manifest.get("lineage") or fingerprint(manifest)


def deny_path(path: pathlib.Path, manifest: Mapping[str, Any]) -> pathlib.Path:
    """Where the deny list of a memory lies."""
    return path / manifest.get("deny_file", DENY_FILE)


def check_fingerprints(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    embedder: Fingerprinted | str | None,
    tokenizer: Fingerprinted | str | None,
) -> None:
    """Refuses an embedder or a tokenizer that the memory was not built with.

    Raises:
      ValueError: names both fingerprints.
    """
    check_fingerprint(path, manifest, "encoder", "embedder", embedder)
    check_fingerprint(path, manifest, "tokenizer", "tokenizer", tokenizer)


def check_fingerprint(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    field: str,
    argument: str,
    given: Fingerprinted | str | None,
) -> None:
    """Refuses an embedder or a tokenizer that the memory was not built with.

    Args:
      path: of the memory.
      manifest: of the memory.
      field: "encoder" or "tokenizer".
      argument: what the caller calls it.
      given: the object, its fingerprint, or None to compare nothing.

    Raises:
      ValueError: names both fingerprints.
    """
    if given is None:
        return
    fingerprint = given if isinstance(given, str) else given.fingerprint()
    stored = manifest[f"{field}_fingerprint"]
    if fingerprint != stored:
        raise ValueError(
            f"the memory at {path} was built with {field} {stored}, but the {argument} "
            f"given is {fingerprint}: load that {field}, or {rebuild_remedy(path)}"
        )


def read_denied(
    path: pathlib.Path, manifest: Mapping[str, Any]
) -> Int64[np.ndarray, " denied"]:
    """The denied rows of the memory at `path`, ascending.

    Raises:
      IntegrityError: if the list is missing, damaged, or of another memory: a memory
        does not open rather than show what was removed.
    """
    file = deny_path(path, manifest)
    remedy = f"restore it from a copy, or {rebuild_remedy(path)}"
    if not file.is_file():
        raise storage.IntegrityError(
            f"{file} is missing; if the memory was compacted or replaced since it was "
            f"opened, open it again, else {remedy}"
        )
    content = storage.decode_sealed(file.read_bytes(), str(file), remedy)
    rows = np.asarray(content.get("rows", ()), np.int64)
    num_rows = manifest["num_documents"]
    expected = (DENY_FORMAT, lineage(manifest))
    wrong = (content.get("format"), content.get("memory")) != expected
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
        # Rows may have been added, and some denied, since this manifest was read.
        grown = read_manifest(path)
        same = lineage(grown) == lineage(manifest)
        wrong |= not same or not 0 <= rows.min() <= rows.max() < grown["num_documents"]
    if wrong:
        raise storage.IntegrityError(f"{file} belongs to another memory; {remedy}")
    return rows[rows < num_rows]


def write_denied(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    rows: Int64[np.ndarray, " denied"],
) -> None:
    """Replaces the deny list in one step."""
    content = {
        "format": DENY_FORMAT,
        "memory": lineage(manifest),
        "rows": rows.tolist(),
    }
    file = deny_path(path, manifest)
    storage.write_file(file, storage.encode_sealed(content))


def read_removed(
    path: pathlib.Path, manifest: Mapping[str, Any]
) -> UInt64[np.ndarray, "removed 2"]:
    """Hashes of id and content of what compactions have deleted: all that is left of it.

    By them a removed document is known when its source is added again; a content of 0 is
    unknown.
    """
    name = manifest.get("removed_file")
    if name is None:
        return np.zeros((0, 2), np.uint64)
    return np.load(path / name, allow_pickle=False)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps two removals, in any two processes, from losing one of them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
