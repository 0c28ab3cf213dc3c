"""An index's folder: its description, and the check of its files.

Search libraries trust the files that they open. ScaNN unpickles a file of document ids
if its folder has one, and a checksum does not help against an attacker. So a library
opens a folder only if every entry is a regular file, its name is in the fixed list of
the back end, and index.json lists it with its size and sha256.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from racm3_jax import storage

FORMAT = "racm3-index"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
REMEDY = "rebuild the index"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Allowed values of a setting: one of these strings, or an integer in a range.
Allowed = tuple[str, ...] | tuple[int, int]


class Description(NamedTuple):
    """Content of index.json.

    Attributes:
      kind: name of the back end.
      num_rows: indexed.
      d_embed: their width.
      settings: of the back end, JSON.
      files: size and sha256 of the other files, by name.
    """

    kind: str
    num_rows: int
    d_embed: int
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]


def write_description(
    path: pathlib.Path,
    kind: str,
    num_rows: int,
    d_embed: int,
    settings: Mapping[str, Any],
    names: Collection[str],
) -> None:
    """Writes index.json, last, with the sha256 of the other files."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "num_rows": num_rows,
        "d_embed": d_embed,
        "settings": dict(settings),
        "files": storage.describe_files(path, names),
    }
    storage.write_file(path / INDEX_FILE, storage.encode_sealed(content))


def read_description(path: pathlib.Path) -> Description:
    """Reads and type-checks the description from `write_description`.

    Raises:
      FileNotFoundError: there is no index at `path`.
      IntegrityError: the description is damaged, or a field has another type.
      ValueError: unsupported format.
    """
    file = path / INDEX_FILE
    if not file.is_file() or file.is_symlink():
        raise FileNotFoundError(f"there is no index at {path} (no {INDEX_FILE})")
    try:
        content = storage.decode_sealed(file.read_bytes(), str(file), REMEDY)
    except RecursionError:
        raise storage.IntegrityError(f"{file} is nested too deeply; {REMEDY}") from None
    found = (content.get("format"), content.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{file} has format {found}; this version reads "
            f"{(FORMAT, FORMAT_VERSION)}: {REMEDY}"
        )
    fields: dict[str, Any] = {n: content.get(n) for n in Description._fields}
    for name, value in fields.items():
        wanted = _describe_wrong(name, value)
        if wanted is not None:
            raise storage.IntegrityError(
                f'{file}: "{name}" must be {wanted}; got {_shorten(value)}: {REMEDY}'
            )
    return Description(**fields)


def _describe_wrong(name: str, value: Any) -> str | None:
    """The expected type of a field, if it has another one; else None."""
    if name == "kind":
        return None if isinstance(value, str) else "a string"
    if name in ("num_rows", "d_embed"):
        return None if _is_integer(value) and value >= 1 else "an integer >= 1"
    if name == "settings":
        return None if isinstance(value, dict) else "an object"
    if isinstance(value, dict) and all(map(_is_file_entry, value.values())):
        return None
    return "an object of file names, each with its bytes and sha256"


def _is_file_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size, digest = entry.get("bytes"), entry.get("sha256")
    if not _is_integer(size) or not isinstance(digest, str):
        return False
    return size >= 0 and _SHA256.fullmatch(digest) is not None


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shorten(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:79]}…"


def check_settings(
    path: pathlib.Path, settings: Mapping[str, Any], allowed: Mapping[str, Allowed]
) -> None:
    """Checks the settings of an index against the allowed values of its back end.

    Raises:
      IntegrityError: names the first missing or invalid setting.
    """
    for name, choices in allowed.items():
        value = settings.get(name)
        if isinstance(choices[0], str):
            right = isinstance(value, str) and value in choices
            wanted = f"one of {', '.join(map(repr, choices))}"
        else:
            least, most = choices
            right = _is_integer(value) and least <= value <= most  # type: ignore
            wanted = f"an integer from {least} to {most}"
        if not right:
            raise storage.IntegrityError(
                f'{path / INDEX_FILE}: the setting "{name}" must be {wanted}; got '
                f"{_shorten(value)}: {REMEDY}"
            )


def check_names(
    path: pathlib.Path, description: Description, allowed: Collection[str]
) -> None:
    """Refuses a folder with files that are not allowed.

    Args:
      path: of the index.
      description: of the index.
      allowed: file names of its back end.

    Raises:
      IntegrityError: a file, link or special file that the back end does not write or
        the description does not list; a listed link or special file; or a missing file.
    """
    for name in description.files:
        if name not in allowed:
            raise storage.IntegrityError(
                f"{path / INDEX_FILE} lists {_shorten(name)}, which no index of kind "
                f'"{description.kind}" has: it is not opened; {REMEDY}'
            )
    found = set()
    for name, entry in _walk(path):
        if entry.is_symlink() or not entry.is_file():
            raise storage.IntegrityError(
                f"{path} holds {_shorten(name)}, a link or not a regular file: it is not "
                f"opened; {REMEDY}"
            )
        if name != INDEX_FILE and name not in description.files:
            raise storage.IntegrityError(
                f"{path} holds {_shorten(name)}, which was not written with the "
                f"index: it is not opened; {REMEDY}"
            )
        found.add(name)
    missing = set(description.files) - found
    if missing:
        raise storage.IntegrityError(f"{path / min(missing)} is missing; {REMEDY}")


def _walk(
    directory: pathlib.Path, prefix: str = ""
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All entries below a directory except directories; does not follow links."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, f"{name}/")
            else:
                yield name, entry


def verify(
    path: pathlib.Path,
    description: Description,
    describe: storage.Describe = storage.describe_files,
) -> None:
    """Verifies the files of an index against its description.

    Raises:
      IntegrityError: names the first missing or different file.
    """
    storage.verify_files(path, description.files, REMEDY, describe)
