"""Makes a document from a record's fields, with common field names.

    {"caption": ["two cats", "cats"], "url": "http://…", "score": 0.3}

The first caption is the document's text. The others are stored in its metadata as
`more_captions`, together with every JSON-serialisable field.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS, read_image
from racm3_jax.documents.readers.records import BadRecord, Record
from racm3_jax.types import Document, Segment

# Names of fields, in order of preference; `pick` is case-insensitive.
SOURCE_FIELDS = ("source", "url", "source_url", "page_url", "image_url")
TEXT_FIELDS = (
    *("caption", "captions", "text", "description", "prompt", "alt_text", "alt"),
    *("comment", "sentence", "sentences", "raw"),
)
ID_FIELDS = ("id", "uid", "key", "image_id")
MORE_CAPTIONS = "more_captions"
_MAX_METADATA_BYTES = 1 << 16
_MAX_DEPTH = 32
_NOT_JSON = "metadata value that JSON cannot hold"
_TOO_DEEP = "metadata value nested too deep"
_TOO_LARGE = "oversized metadata value"


def decode_text(data: str | bytes | None | float) -> str | None:
    """Decodes a caption; None for null, NaN or blank.

    Bytes are UTF-8, or UTF-16 with a byte order mark.

    Raises:
      BadRecord: another encoding.
    """
    if data is None or (isinstance(data, float) and math.isnan(data)):
        return None
    if isinstance(data, bytes):
        has_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        try:
            data = data.decode("utf-16" if has_mark else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecord(
                "wrong encoding", f"the text is not UTF-8: {error}"
            ) from None
    if not isinstance(data, str):
        raise BadRecord("no text", f"a caption is text; got {type(data).__name__}")
    text = data.replace("\0", "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("wrong encoding", "the text has lone surrogates") from None
    return text or None


def parse_json(data: str | bytes) -> Any:
    """Parses any JSON.

    Raises:
      BadRecord: it is not JSON, or is nested too deep.
    """
    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig")
        return json.loads(data)
    except RecursionError:
        raise BadRecord("damaged JSON", "the JSON is nested too deep") from None
    except ValueError as error:
        raise BadRecord("damaged JSON", f"not JSON: {error}") from None


def decode_json(data: str | bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      BadRecord: it is not.
    """
    return as_object(parse_json(data))


def as_object(found: Any) -> dict[str, Any]:
    """The parsed JSON if it is an object.

    Raises:
      BadRecord: it is not.
    """
    if not isinstance(found, dict):
        raise BadRecord(
            "damaged JSON", f"expected a JSON object; got a {type(found).__name__}"
        )
    return found


def decode_sidecar(data: str | bytes) -> dict[str, Any]:
    """The JSON next to an image: an object, a list of captions, or one caption.

    Raises:
      BadRecord: it is none of these.
    """
    found = parse_json(data)
    if isinstance(found, str):
        return {"caption": found}
    if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
        return {"captions": found}
    return as_object(found)


def pick(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first non-empty field of these names."""
    known = _by_lower_name(fields)
    for name in names:
        for value in (fields.get(name), known.get(name)):
            if value is not None and not (isinstance(value, str) and not value.strip()):
                return value
    return None


def _by_lower_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in fields.items()}


def pick_captions(fields: Mapping[str, Any], name: str | None = None) -> list[str]:
    """The captions among the fields: of the named field, or of the first usual one.

    A list gives all of its captions, also of `{"text": …}` objects; blanks and
    duplicates are skipped.
    """
    known = _by_lower_name(fields)
    for field in (name,) if name else TEXT_FIELDS:
        for value in (fields.get(field), known.get(field)):
            captions = unique(_flatten(value))
            if captions:
                return captions
    return []


def _flatten(value: Any) -> Iterator[str | None]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, Mapping):
            entry = pick(entry, TEXT_FIELDS)
        yield decode_text(entry)


def unique(captions: Iterable[str | None]) -> list[str]:
    """Captions in order, without blanks and duplicates."""
    return list(dict.fromkeys(caption for caption in captions if caption))


def make_record(
    id: str,
    parts: Iterable[str | bytes | np.ndarray | None],
    fields: Mapping[str, Any] | None = None,
    *,
    more_captions: Sequence[str] = (),
    source: str | None = None,
    left_out: Sequence[str] = (),
    may_be_empty: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Record:
    """Makes a document of texts (str) and images (encoded bytes, or pixels).

    Args:
      id: its name.
      parts: in order; None and blank texts are skipped.
      fields: its metadata; values that JSON cannot represent are skipped and counted.
      more_captions: other captions of the same image, for the metadata.
      source: its origin; None takes it from `fields`.
      left_out: reasons of what the reader has already skipped.
      may_be_empty: without parts, make a document with an empty text.
      max_pixels: of an image.

    Raises:
      BadRecord: the document would be empty.
      ImageError: an image cannot be read.
    """
    segments = []
    for part in parts:
        if isinstance(part, bytes):
            if not part:
                raise BadRecord("empty image", "the image has 0 bytes")
            segments.append(Segment(image=read_image(part, max_pixels)))
        elif isinstance(part, np.ndarray):
            segments.append(Segment(image=part))
        elif (text := decode_text(part)) is not None:
            segments.append(Segment(text=text))
    if not segments and may_be_empty:
        segments.append(Segment(text=""))
    if not segments:
        raise BadRecord("empty document", "it has neither text nor an image")
    if more_captions:
        fields = {**(fields or {}), MORE_CAPTIONS: list(more_captions)}
    metadata, dropped = plain_metadata(fields or {})
    if source is None:
        source = str(pick(metadata, SOURCE_FIELDS) or "")
    document = Document(
        _encodable(id), tuple(segments), decode_text(source) or "", metadata
    )
    return Record(document, left_out=(*left_out, *dropped))


def _encodable(text: str) -> str:
    """Replaces lone surrogates, from file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain_metadata(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The JSON-serialisable fields, and a reason for each skipped value.

    Bytes, deeply nested values, and the largest values of oversized metadata are
    skipped.
    """
    left_out: list[str] = []
    found = {}
    for name, value in fields.items():
        plain = _plain(value, left_out)
        if plain is not None:
            found[_encodable(str(name))] = plain
    sizes = {k: len(json.dumps(k)) + len(json.dumps(v)) for k, v in found.items()}
    while sum(sizes.values()) > _MAX_METADATA_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        del sizes[largest], found[largest]
        left_out.append(_TOO_LARGE)
    return found, left_out


def _plain(value: Any, left_out: list[str], depth: int = 0) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _encodable(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime.date | datetime.datetime | datetime.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID | datetime.timedelta):
        return str(value)
    if depth == _MAX_DEPTH:
        left_out.append(_TOO_DEEP)
        return None
    if isinstance(value, Mapping):
        inner = {
            _encodable(str(k)): _plain(v, left_out, depth + 1) for k, v in value.items()
        }
        return {k: v for k, v in inner.items() if v is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry, left_out, depth + 1) for entry in value]
    left_out.append(_NOT_JSON)
    return None
