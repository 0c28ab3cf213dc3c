"""Webdataset tars, as img2dataset writes them: members of one key are one document.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000013.jpg …

Members are streamed in order and never unpacked to disk, so names cannot lead anywhere.
"""

from __future__ import annotations

import functools
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.folder import IMAGE_SUFFIXES
from racm3_jax.documents.readers.records import (
    BadRecord,
    RawRecord,
    Shard,
    decode_json,
    decode_text,
    make_document,
    pick_text,
)
from racm3_jax.types import Document

_TEXT_SUFFIXES = (".txt", ".text", ".caption", ".cap")
# A larger member is no caption and no photograph.
MAX_MEMBER_BYTES = 1 << 28


def tar_shards(
    path: str, *, text: str | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> list[Shard]:
    """A shard a tar file.

    Args:
      path: a file, or a pattern such as `coco/train-*.tar`.
      text: the JSON field of the caption, where no text member holds it.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
    """
    return [
        Shard(
            file.as_posix(),
            file.stat().st_size,
            functools.partial(_read_tar, file, text, max_pixels),
        )
        for file in find_files(path)
    ]


def find_files(pattern: str) -> list[pathlib.Path]:
    """The files that match a pattern, sorted.

    Raises:
      FileNotFoundError: there are none.
    """
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        return [path]
    root = pathlib.Path(path.anchor) if path.is_absolute() else pathlib.Path()
    parts = path.relative_to(root) if path.is_absolute() else path
    found = sorted(p for p in root.glob(parts.as_posix()) if p.is_file())
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return found


def _read_tar(
    file: pathlib.Path, text: str | None, max_pixels: int
) -> Iterator[RawRecord]:
    try:
        yield from _stream(file, text, max_pixels)
    except (tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise BadRecord("damaged file", f"{file} is no whole tar: {error}") from error


def _stream(
    file: pathlib.Path, text: str | None, max_pixels: int
) -> Iterator[RawRecord]:
    key, members = None, {}
    oversized = ""
    num_members = 0
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            name, suffix = _split(member.name)
            if name != key:
                if key is not None:
                    yield _record(file, key, members, oversized, text, max_pixels)
                key, members, oversized = name, {}, ""
            num_members += 1
            if member.size > MAX_MEMBER_BYTES:
                oversized = member.name
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            data = stream.read()
            if len(data) != member.size:
                raise EOFError(f"{file} breaks off inside {member.name}")
            members[suffix] = data
    if key is not None:
        yield _record(file, key, members, oversized, text, max_pixels)
    if not num_members:
        raise BadRecord("damaged file", f"{file} is an empty tar")


def _split(name: str) -> tuple[str, str]:
    """`"a/b/000012.seg.png"` -> `("a/b/000012", ".seg.png")`, as webdataset does."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _record(
    file: pathlib.Path,
    key: str,
    members: Mapping[str, bytes],
    oversized: str,
    text: str | None,
    max_pixels: int,
) -> RawRecord:
    read = functools.partial(
        _make, f"{file.stem}/{key}", members, oversized, text, max_pixels
    )
    return RawRecord(f"{file.as_posix()}/{key}", read)


def _make(
    id: str,
    members: Mapping[str, bytes],
    oversized: str,
    text: str | None,
    max_pixels: int,
) -> Document:
    if oversized:
        raise BadRecord("oversized member", f"{oversized} is larger than allowed")
    fields = decode_json(members[".json"]) if ".json" in members else {}
    caption = next(
        (decode_text(members[s]) for s in _TEXT_SUFFIXES if s in members), None
    )
    pictures = [data for s, data in members.items() if s in IMAGE_SUFFIXES]
    return make_document(
        id,
        (caption or pick_text(fields, text), *pictures[:1]),
        fields,
        max_pixels=max_pixels,
    )
