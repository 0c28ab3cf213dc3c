"""JSONL of interleaved documents, one per line.

    {"id": "a", "segments": [{"text": "two cats"}, {"image": "cats/1.jpg"}], "url": "…"}
    {"texts": ["two cats", null], "images": [null, "cats/1.jpg"]}         as OBELICS
    {"caption": "two cats", "image": "cats/1.jpg"}
    {"image": "cats/1.jpg", "conversations": [{"value": "<image>\\nWhat is it?"}, …]}

An image is a path relative to the file's folder (or to `images=`), base64, or another
form of `image_fields`. A file with one JSON list of such objects is also accepted.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from racm3_jax.buckets import BucketPath
from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.fields import (
    ID_FIELDS,
    as_object,
    decode_text,
    make_record,
    parse_json,
    pick,
    pick_captions,
)
from racm3_jax.documents.readers.files import (
    MAX_FILE_BYTES,
    RECORDS_PER_SHARD,
    Folder,
    open_file,
    size_of,
)
from racm3_jax.documents.readers.image_fields import find_images, names_image
from racm3_jax.documents.readers.patterns import SourceFile, cut_files, open_folder
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard
from racm3_jax.documents.readers.remote import BucketFolder

_Make = Callable[[int, Any], Record]
_KNOWN = ("segments", "texts", "images", "image", "image_base64", "metadata")
_TURNS = ("conversations", "messages")
_IMAGE_MARK = "<image>"
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip --keep"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\xfd7zXZ": ("xz", "unxz --keep"),
}
_BLOCK_BYTES = 1 << 20


def jsonl_shards(
    path: str,
    *,
    images: str | None = None,
    text: str | None = None,
    follow_links: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Ranges of the lines of every file.

    Args:
      path: a file or a pattern.
      images: base folder of image paths; None means each file's own folder.
      text: field of the caption.
      follow_links: also follow links to outside these folders.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
      ValueError: a compressed file.
    """

    def cut(file: SourceFile) -> Iterator[Shard]:
        _refuse_compressed(file.path)
        folder = open_folder(images, file, follow_links)
        make = functools.partial(_make, file, folder, text, max_pixels)
        if _is_list(file.path):
            read = functools.partial(_read_list, file.path, make)
            yield Shard(f"{file.path.as_posix()}@0", size_of(file.path), read)
            return
        offsets = _find_lines(file.path)
        for first, start in enumerate(offsets[:-1]):
            stop = offsets[first + 1]
            read = functools.partial(
                _read_lines, file.path, first * RECORDS_PER_SHARD, start, stop, make
            )
            yield Shard(f"{file.path.as_posix()}@{start}", stop - start, read)

    return cut_files(path, "*.jsonl", follow_links, cut)


def _refuse_compressed(file: pathlib.Path | BucketPath) -> None:
    with open_file(file) as stream:
        head = stream.read(6)
    for start, (name, command) in _COMPRESSED.items():
        if head.startswith(start):
            raise ValueError(
                f"{file} is compressed with {name}, but needs random access: "
                f"unpack it first, with {command}"
            )


def _is_list(file: pathlib.Path | BucketPath) -> bool:
    """Whether a file is one JSON list: the first line opens but does not close it."""
    with open_file(file) as stream:
        head = stream.readline(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
        while head == b"" and (line := stream.readline(_BLOCK_BYTES)):
            head = line.strip()
        more = bool(stream.read(_BLOCK_BYTES).strip())
    if not head.startswith(b"["):
        return False
    try:
        json.loads(head)
    except (ValueError, RecursionError):
        return True
    return not more


def _find_lines(file: pathlib.Path | BucketPath) -> list[int]:
    """Where every 4096th line starts, and where the file ends."""
    offsets, num_lines, place = [0], 0, 0
    with open_file(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            end = block.find(b"\n")
            while end >= 0:
                num_lines += 1
                if num_lines % RECORDS_PER_SHARD == 0:
                    offsets.append(place + end + 1)
                end = block.find(b"\n", end + 1)
            place += len(block)
    return [*offsets, place] if offsets[-1] < place or place == 0 else offsets


def _read_list(file: pathlib.Path | BucketPath, make: _Make) -> Iterator[RawRecord]:
    try:
        with open_file(file) as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadRecord(
                "oversized file",
                f"{file} is one JSON list of more than the {MAX_FILE_BYTES} bytes allowed",
            )
        entries = parse_json(data)
    except BadRecord as error:
        if error.reason == "oversized file":
            raise
        # JSONL with a damaged first line.
        yield from _read_lines(file, 0, 0, size_of(file), make)
        return
    for number, entry in enumerate(entries):
        read = functools.partial(make, number, entry)
        yield RawRecord(f"{file.as_posix()}[{number}]", read)


def _read_lines(
    file: pathlib.Path | BucketPath, number: int, start: int, stop: int, make: _Make
) -> Iterator[RawRecord]:
    with open_file(file) as stream:
        stream.seek(start)
        while stream.tell() < stop:
            line = stream.readline(MAX_FILE_BYTES)
            if len(line) == MAX_FILE_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(_BLOCK_BYTES)) and rest[-1:] != b"\n":
                    pass
                read = _refuse_line
            else:
                read = functools.partial(_parse, make, number, line)
            if line.strip():
                yield RawRecord(f"{file.as_posix()}:{number + 1}", read)
            number += 1


def _refuse_line() -> Record:
    raise BadRecord(
        "oversized line", f"the line has more than the {MAX_FILE_BYTES} bytes allowed"
    )


def _parse(make: _Make, number: int, line: bytes) -> Record:
    return make(number, parse_json(line))


def _make(
    file: SourceFile,
    folder: Folder | BucketFolder,
    text: str | None,
    max_pixels: int,
    number: int,
    entry: Any,
) -> Record:
    fields = as_object(entry)
    parts, more_captions, used = _parts(fields, folder, text)
    metadata = fields.get("metadata")
    rest = {k: v for k, v in fields.items() if k not in (*_KNOWN, *used)}
    if isinstance(metadata, Mapping):
        rest |= dict(metadata)
    return make_record(
        file.name_record(pick(fields, ID_FIELDS), number),
        parts,
        rest,
        more_captions=more_captions,
        max_pixels=max_pixels,
    )


def _parts(
    fields: Mapping[str, Any], folder: Folder | BucketFolder, text: str | None
) -> tuple[list[str | bytes | None], list[str], list[str]]:
    """(segments, other captions, fields that are not metadata)."""
    if "segments" in fields:
        return _of_segments(fields["segments"], folder), [], []
    if isinstance(fields.get("texts"), list):
        return _of_columns(fields["texts"], fields.get("images"), folder), [], []
    images, used = find_images(fields, folder)
    # A path is information about the document; base64 is not.
    is_path = used is None or names_image(fields[used])
    not_metadata = [] if used is None or is_path else [used]
    captions = pick_captions(fields, text)
    turns = next((n for n in _TURNS if isinstance(fields.get(n), list)), None)
    if turns is not None and not captions:
        return _of_turns(fields[turns], images), [], [*not_metadata, turns]
    return [*captions[:1], *images], captions[1:], not_metadata


def _of_segments(
    segments: Any, folder: Folder | BucketFolder
) -> list[str | bytes | None]:
    parts: list[str | bytes | None] = []
    for segment in segments if isinstance(segments, list) else [None]:
        if not isinstance(segment, Mapping):
            raise BadRecord(
                "damaged segments", "segments must be a list of JSON objects"
            )
        parts.append(decode_text(segment.get("text")))
        parts += find_images(segment, folder)[0]
    return parts


def _of_columns(
    texts: Sequence[Any], images: Any, folder: Folder | BucketFolder
) -> list[str | bytes | None]:
    images = images if images else [None] * len(texts)
    if not isinstance(images, list) or len(images) != len(texts):
        count = len(images) if isinstance(images, list) else type(images).__name__
        raise BadRecord("damaged segments", f"{len(texts)} texts with {count} images")
    parts: list[str | bytes | None] = []
    for words, image in zip(texts, images, strict=True):
        parts.append(decode_text(words))
        parts += find_images({"image": image}, folder)[0]
    return parts


def _of_turns(
    turns: Sequence[Any], images: Sequence[bytes]
) -> list[str | bytes | None]:
    """A conversation; images without a mark in the text come first."""
    left = list(images)
    parts: list[str | bytes | None] = []
    for turn in turns:
        said = pick(turn, ("value", "content")) if isinstance(turn, Mapping) else None
        if not isinstance(said, str):
            raise BadRecord("damaged segments", "a turn of a conversation has no text")
        first, *rest = said.split(_IMAGE_MARK)
        parts.append(first)
        for piece in rest:
            if not left:
                raise BadRecord(
                    "damaged segments",
                    f"a conversation has more {_IMAGE_MARK} marks than images",
                )
            parts += [left.pop(0), piece]
    return [*left, *parts]
