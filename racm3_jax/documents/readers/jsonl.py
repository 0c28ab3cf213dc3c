"""JSONL of interleaved documents, one a line.

    {"id": "a", "segments": [{"text": "two cats"}, {"image": "cats/1.jpg"}], "url": "…"}
    {"texts": ["two cats", null], "images": [null, "cats/1.jpg"]}         as OBELICS
    {"caption": "two cats", "image": "cats/1.jpg"}

An image is a path below the file's folder (or below `images=`), or
`{"image_base64": "…"}`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.folder import RECORDS_PER_SHARD, inside
from racm3_jax.documents.readers.records import (
    ID_FIELDS,
    BadRecord,
    RawRecord,
    Shard,
    decode_json,
    decode_text,
    make_document,
    pick,
    pick_text,
)
from racm3_jax.documents.readers.tar import find_files
from racm3_jax.types import Document

_KNOWN = ("segments", "texts", "images", "image", "image_base64", "metadata")
_MAX_LINE_BYTES = 1 << 28


def jsonl_shards(
    path: str,
    *,
    images: str | None = None,
    text: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Ranges of the lines of every file.

    Args:
      path: a file or a pattern.
      images: the folder that image paths start in; None is each file's own.
      text: field of the caption, in lines that have one.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
    """
    shards = []
    for file in find_files(path):
        root = pathlib.Path(images) if images else file.parent
        offsets = _find_lines(file)
        for first, start in enumerate(offsets[:-1]):
            stop = offsets[first + 1]
            read = functools.partial(
                *(_read_lines, file, first * RECORDS_PER_SHARD, start, stop),
                *(root, text, max_pixels),
            )
            shards.append(Shard(f"{file.as_posix()}@{start}", stop - start, read))
    return shards


def _find_lines(file: pathlib.Path) -> list[int]:
    """Where every 4096th line starts, and where the file ends."""
    offsets, place = [0], 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream):
            if number and number % RECORDS_PER_SHARD == 0:
                offsets.append(place)
            place += len(line)
    return [*offsets, place]


def _read_lines(
    file: pathlib.Path,
    number: int,
    start: int,
    stop: int,
    root: pathlib.Path,
    text: str | None,
    max_pixels: int,
) -> Iterator[RawRecord]:
    with open(file, "rb") as stream:
        stream.seek(start)
        while stream.tell() < stop:
            line = stream.readline(_MAX_LINE_BYTES)
            if line.strip():
                name = f"{file.stem}/{number:08d}"
                read = functools.partial(_make, name, line, root, text, max_pixels)
                yield RawRecord(f"{file.as_posix()}:{number + 1}", read)
            number += 1


def _make(
    name: str, line: bytes, root: pathlib.Path, text: str | None, max_pixels: int
) -> Document:
    fields = decode_json(line)
    parts = list(_parts(fields, root, text))
    metadata = fields.get("metadata")
    rest = {k: v for k, v in fields.items() if k not in _KNOWN}
    if isinstance(metadata, Mapping):
        rest |= dict(metadata)
    named = pick(fields, ID_FIELDS)
    return make_document(
        name if named is None else str(named), parts, rest, max_pixels=max_pixels
    )


def _parts(
    fields: Mapping[str, Any], root: pathlib.Path, text: str | None
) -> Iterator[str | bytes | None]:
    if "segments" in fields:
        for segment in fields["segments"]:
            if not isinstance(segment, Mapping):
                raise BadRecord("damaged segments", "a segment is a JSON object")
            yield decode_text(segment.get("text"))
            yield _image(segment, root)
    elif isinstance(fields.get("texts"), list):
        pictures = fields.get("images") or [None] * len(fields["texts"])
        if len(pictures) != len(fields["texts"]):
            raise BadRecord(
                "damaged segments",
                f"{len(fields['texts'])} texts came with {len(pictures)} images",
            )
        for words, picture in zip(fields["texts"], pictures, strict=True):
            yield decode_text(words)
            yield _image({"image": picture}, root)
    else:
        yield pick_text(fields, text)
        yield _image(fields, root)


def _image(fields: Mapping[str, Any], root: pathlib.Path) -> bytes | None:
    if fields.get("image_base64"):
        try:
            return base64.b64decode(fields["image_base64"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise BadRecord(
                "damaged base64", f"an image is no base64: {error}"
            ) from None
    name = fields.get("image")
    if not name:
        return None
    if not isinstance(name, str):
        raise BadRecord("no image path", f"an image is a path; got {str(name)[:40]}")
    return inside(root, name).read_bytes()
