"""Files allowed in a memory's directory; format of its manifest and deny list.

Memories may come from untrusted sources, and the checksum has no key: anybody can
change a memory and seal it again. So every field is type-checked before use, paths
cannot leave the folder, and files that are not in the fixed list below are refused
before any library opens the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from racm3_jax import storage
from racm3_jax.index import registry
from racm3_jax.types import Modality

FORMAT = "racm3-memory"
FORMAT_VERSION = 1
DENY_FORMAT = "racm3-deny-list"
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.array_record"
INDEX_DIRECTORY = "index"
DENY_FILE = "deny.json"
REMOVED_NAME = "removed.npy"
TABLE_DIRECTORY = "table"
# The columns of a part, with dtype and row shape of each.
COLUMN_TYPES: Mapping[str, str] = {
    "embeddings_document": "<f4",
    "embeddings_text": "<f4",
    "embeddings_image": "<f4",
    "queries_text": "<f2",
    "queries_image": "<f2",
    "id_hashes": "<u8",
    "source_hashes": "<u8",
    "split_hashes": "<u8",
    "content_hashes": "<u8",
    "image_hashes": "<u8",
    "modalities": "|u1",
}
# Columns that older memories may lack.
OPTIONAL_COLUMNS = frozenset({"split_hashes", "content_hashes", "image_hashes"})
_PART = r"(?:(?:added|compacted)-\d{5}/)?"
_PREFIX = re.compile(r"|(?:added|compacted)-\d{5}/")
_DENY_NAME = re.compile(r"deny(?:-\d{5})?\.json")
_LISTED = re.compile(
    rf"{_PART}(?:{re.escape(DOCUMENTS_FILE)}|{re.escape(REMOVED_NAME)}"
    rf"|(?:{'|'.join(COLUMN_TYPES)})-\d{{5}}\.npy|{INDEX_DIRECTORY}/[^/]+(?:/[^/]+)*)"
)
# Files of an index are defined by `index.registry`.
_OWN = re.compile(
    rf"{_LISTED.pattern}|{_DENY_NAME.pattern}|{re.escape(MANIFEST_FILE)}"
    rf"|{TABLE_DIRECTORY}/[^/]+"
)
MODALITY_BITS: Mapping[Modality, int] = {"text": 1, "image": 2}


class Fingerprinted(Protocol):
    """An object with a fingerprint that a memory can be compared with."""

    def fingerprint(self) -> str:
        """Equal for equal behaviour."""
        ...


def hash_name(name: str) -> int:
    """64-bit hash of a document id or source; 0 for an empty one."""
    if not name:
        return 0
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def is_of_training(
    split_hashes: UInt64[np.ndarray, " rows"],
) -> Bool[np.ndarray, " rows"]:
    """Whether the split is "train", or there is none: held-out documents have others."""
    return (split_hashes == hash_name("train")) | (split_hashes == 0)


def rebuild_remedy(path: pathlib.Path) -> str:
    """How to fix a memory that cannot be used."""
    return f"remove {path} and rebuild it (racm3_jax.Memory.build)"


def is_memory(path: pathlib.Path) -> bool:
    """Whether a folder is a memory, damaged or not."""
    try:
        seen = json.loads((path / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(seen, dict) and seen.get("format") == FORMAT


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest, after checking its format, version and checksum.

    Raises:
      FileNotFoundError: there is no memory at `path`.
      ValueError: unsupported format version, or a manifest of something else.
      IntegrityError: the manifest is damaged.
    """
    remedy = rebuild_remedy(path)
    file = path / MANIFEST_FILE
    if not path.is_dir():
        # Its replacement may have been interrupted.
        storage.restore(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no memory at {path}: give another path, or build it (racm3 memory "
            "build)"
        )
    if not file.is_file():
        # It may hold somebody's files: no advice to remove them.
        raise FileNotFoundError(
            f"{path} is not a memory (it has no {MANIFEST_FILE}): give the folder of a "
            "memory, or restore or rebuild it"
        )
    data = file.read_bytes()
    # Before the checksum, which other versions may compute differently.
    try:
        seen = json.loads(data)
    except (ValueError, RecursionError):
        seen = None
    if seen is not None and not _may_be_manifest(seen):
        raise ValueError(
            f"{path} is not a memory ({MANIFEST_FILE} is of something else): give the "
            "folder of a memory"
        )
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
    _check_types(file, manifest, remedy)
    return manifest


def _may_be_manifest(value: Any) -> bool:
    """Whether it may be of a memory, of any version, or damaged."""
    return isinstance(value, dict) and bool({"format", "format_version"} & value.keys())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("prefix"))
        and _PREFIX.fullmatch(value["prefix"]) is not None
        and _is_count(value.get("num_documents"))
    )


_REQUIRED: Mapping[str, Callable[[Any], bool]] = {
    "num_documents": lambda value: _is_count(value) and value > 0,
    "num_with_modality": lambda value: (
        isinstance(value, dict)
        and set(value) == set(MODALITY_BITS)
        and all(map(_is_count, value.values()))
    ),
    "d_embed": lambda value: _is_count(value) and value > 0,
    "num_query_variants": _is_count,
    "query_drop": lambda value: isinstance(value, int | float) and 0 <= value < 1,
    "index": lambda value: value in registry.list_kinds(),
    "vocab": lambda value: (
        isinstance(value, dict) and all(map(_is_count, value.values()))
    ),
    "tokenizer_fingerprint": _is_text,
    "encoder_fingerprint": _is_text,
    "files": lambda value: isinstance(value, dict),
}
_OPTIONAL: Mapping[str, Callable[[Any], bool]] = {
    "parts": lambda value: (
        isinstance(value, list) and len(value) > 0 and all(map(_is_part, value))
    ),
    "deny_file": lambda value: (
        _is_text(value) and _DENY_NAME.fullmatch(value) is not None
    ),
    "deny_version": _is_count,
    "removed_file": lambda value: (
        _is_text(value)
        and value.endswith(REMOVED_NAME)
        and _PREFIX.fullmatch(value.removesuffix(REMOVED_NAME)) is not None
    ),
    "lineage": _is_text,
    "source": _is_text,
    "report": lambda value: isinstance(value, dict),
    "rows_per_shard": lambda value: value is None or (_is_count(value) and value > 0),
    "recall_target": lambda value: value is None or isinstance(value, int | float),
}


def _check_types(file: pathlib.Path, manifest: Mapping[str, Any], remedy: str) -> None:
    for fields, needed in ((_REQUIRED, True), (_OPTIONAL, False)):
        for name, is_right in fields.items():
            if name not in manifest and not needed:
                continue
            if not is_right(manifest.get(name)):
                shown = repr(manifest.get(name))
                shown = shown if len(shown) < 60 else f"{shown[:60]}…"
                raise storage.IntegrityError(
                    f"{file} is invalid: its field {name} is {shown}; {remedy}"
                )
    unexpected = [name for name in manifest["files"] if not _LISTED.fullmatch(name)]
    if unexpected:
        raise storage.IntegrityError(
            f"{file} lists {unexpected[0]!r}, which is not a file of a memory; {remedy}"
        )


def kind_of(name: str) -> str:
    """The kind of a listed file: "index", "documents", "removed", or its column."""
    *folders, last = name.split("/")
    if INDEX_DIRECTORY in folders:
        return INDEX_DIRECTORY
    return last.split("-")[0].split(".")[0]


def list_files(path: pathlib.Path) -> list[str]:
    """The files in a memory's folder, without leftovers of crashed writers."""
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not storage.is_leftover(name)]
        below = pathlib.Path(folder).relative_to(path)
        found += [
            (below / name).as_posix() for name in files if not storage.is_leftover(name)
        ]
    return sorted(found)


def check_files(path: pathlib.Path) -> None:
    """Refuses a folder with any file that does not belong to a memory.

    Raises:
      IntegrityError: names the first one.
    """
    unexpected = [name for name in list_files(path) if not _OWN.fullmatch(name)]
    if unexpected:
        raise storage.IntegrityError(
            f"{path} holds {unexpected[0]!r}, which is not a file of a memory "
            f"({len(unexpected)} such files): remove it"
        )


def find_untracked(path: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files in a memory's directory that its manifest does not list."""
    known = {
        *manifest["files"],
        MANIFEST_FILE,
        manifest.get("deny_file", DENY_FILE),
    }
    return [
        name
        for name in list_files(path)
        if name not in known and not name.startswith(f"{TABLE_DIRECTORY}/")
    ]


def delete_untracked(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Cleans up after a crashed writer: deletes files that the manifest does not list.

    A change takes effect when the manifest is replaced. Files that a writer made before
    that, or replaced and did not delete, are deleted here; only files that a memory
    writes are touched. Call it with `locked` held.
    """
    storage.clean(path)
    for name in find_untracked(path, manifest):
        if _OWN.fullmatch(name):
            (path / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(path, topdown=False):
        place = pathlib.Path(folder)
        is_partial = any(map(storage.is_leftover, place.relative_to(path).parts))
        if place != path and not is_partial and not any(place.iterdir()):
            place.rmdir()


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Fingerprint of a memory's content: equal for equal files and settings.

    Removals do not change it.
    """
    content = {k: v for k, v in manifest.items() if k != "deny_version"}
    return storage.content_digest(content)[:16]


def write_manifest(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest atomically; all files that it lists must be on disk."""
    storage.write_file(path / MANIFEST_FILE, storage.encode_sealed(manifest))


def prefixes(manifest: Mapping[str, Any]) -> list[str]:
    """Subfolders of the memory's parts; "" is the memory's own folder.

    A memory is built as one part; every `add` adds one.
    """
    return [part["prefix"] for part in manifest.get("parts", ({"prefix": ""},))]


def part_counts(manifest: Mapping[str, Any]) -> list[int]:
    """Number of documents in each part."""
    whole = ({"num_documents": manifest["num_documents"]},)
    return [part["num_documents"] for part in manifest.get("parts", whole)]


def lineage(manifest: Mapping[str, Any]) -> str:
    """Equal for memories whose row numbers refer to the same documents."""
    return manifest.get("lineage") or fingerprint(manifest)


def deny_path(path: pathlib.Path, manifest: Mapping[str, Any]) -> pathlib.Path:
    """Path of a memory's deny list."""
    return path / manifest.get("deny_file", DENY_FILE)


def check_fingerprints(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    embedder: Fingerprinted | str | None,
    tokenizer: Fingerprinted | str | None,
) -> None:
    """Refuses another embedder or tokenizer than the memory was built with.

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
    """Refuses another embedder or tokenizer than the memory was built with.

    Args:
      path: of the memory.
      manifest: of the memory.
      field: "encoder" or "tokenizer".
      argument: name of the caller's argument.
      given: the object, its fingerprint, or None to skip the check.

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
      IntegrityError: the list is missing, damaged, or of another memory: the memory is
        not opened, rather than showing what was removed.
    """
    file = deny_path(path, manifest)
    remedy = f"restore it from a copy, or {rebuild_remedy(path)}"
    if not file.is_file():
        raise storage.IntegrityError(
            f"{file} is missing; if the memory was compacted or replaced since it was "
            f"opened, open it again, else {remedy}"
        )
    content = storage.decode_sealed(file.read_bytes(), str(file), remedy)
    rows = content.get("rows", ())
    version = content.get("version", 0)
    is_list = isinstance(rows, list) and all(map(_is_count, rows))
    if not is_list or not _is_count(version):
        raise storage.IntegrityError(f"{file} is not a list of rows; {remedy}")
    if version < manifest.get("deny_version", 0):
        raise storage.IntegrityError(
            f"{file} is older than the memory's last deny list (version {version} of "
            f"{manifest['deny_version']}): documents removed since would come back; "
            f"{remedy}"
        )
    rows = np.asarray(rows, np.int64)
    num_rows = manifest["num_documents"]
    expected = (DENY_FORMAT, lineage(manifest))
    wrong = (content.get("format"), content.get("memory")) != expected
    if len(rows) and not rows.max() < num_rows:
        # Rows may have been added and denied since this manifest was read.
        grown = read_manifest(path)
        same = lineage(grown) == lineage(manifest)
        wrong |= not same or not rows.max() < grown["num_documents"]
    if wrong:
        raise storage.IntegrityError(f"{file} belongs to another memory; {remedy}")
    return rows[rows < num_rows]


def write_denied(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    rows: Int64[np.ndarray, " denied"],
) -> None:
    """Replaces the deny list atomically; it has the manifest's version."""
    content = {
        "format": DENY_FORMAT,
        "memory": lineage(manifest),
        "rows": rows.tolist(),
        "version": manifest.get("deny_version", 0),
    }
    file = deny_path(path, manifest)
    storage.write_file(file, storage.encode_sealed(content))


def deny(
    path: pathlib.Path, manifest: Mapping[str, Any], rows: Int64[np.ndarray, " rows"]
) -> int:
    """Adds rows to the deny list; call it with `locked` held.

    The list is written before the manifest with its version: if interrupted between the
    two, the removal is kept.

    Returns:
      The number of newly denied rows.
    """
    before = read_denied(path, manifest)
    after = np.union1d(before, rows)
    if len(after) == len(before):
        return 0
    newer = {**manifest, "deny_version": manifest.get("deny_version", 0) + 1}
    write_denied(path, newer, after)
    write_manifest(path, newer)
    return len(after) - len(before)


def read_removed(
    path: pathlib.Path, manifest: Mapping[str, Any]
) -> UInt64[np.ndarray, "removed 2"]:
    """Hashes of id and content of the documents that compactions have deleted.

    They identify a removed document when its source is added again; a content of 0 is
    unknown.
    """
    name = manifest.get("removed_file")
    if name is None:
        return np.zeros((0, 2), np.uint64)
    rows = np.load(path / name, allow_pickle=False)
    if rows.dtype != np.uint64 or rows.ndim != 2 or rows.shape[1] != 2:
        raise storage.IntegrityError(
            f"{path / name} holds {rows.dtype}{list(rows.shape)} instead of pairs of "
            f"hashes; {rebuild_remedy(path)}"
        )
    return rows


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Serialises changes of the memory by any processes."""
    with storage.locked(path):
        yield
