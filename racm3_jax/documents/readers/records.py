"""What every reader yields: shards of records that are read when asked for.

A source is a list of shards in a fixed order; a shard is a file, or a range of one. A
record is cheap until `RawRecord.read` decodes it, so that a shard can be counted or
passed over without touching its images.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS, ImageError, read_image
from racm3_jax.types import Document, Segment

# Fields that name where a record came from, in the order of preference.
SOURCE_FIELDS = ("source", "url", "URL", "source_url", "page_url", "image_url")
TEXT_FIELDS = ("caption", "captions", "text", "TEXT", "description")
ID_FIELDS = ("id", "uid", "key", "image_id")
# How many bad records are listed by name; all are counted.
MAX_LISTED = 1000
# A share says little about a few records.
_CHECK_FROM = 100
_MAX_METADATA_BYTES = 1 << 16


class BadRecord(ValueError):
    """A record that no document can be made of.

    Attributes:
      reason: the kind of fault, equal for equal faults; bad records are counted by it.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A document, with embeddings where the source brought some.

    Attributes:
      document: what was read.
      text_embedding: of its text, any length; None where it is to be computed.
      image_embedding: of its image.
    """

    document: Document
    text_embedding: Float32[np.ndarray, " d_embed"] | None = None
    image_embedding: Float32[np.ndarray, " d_embed"] | None = None


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """One record before decoding.

    Attributes:
      name: where it lies, for the list of bad records.
      read: decodes it; raises `BadRecord` or another ValueError on what is bad.
    """

    name: str
    read: Callable[[], Record | Document]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a source; the unit that processes take, and that is repeated whole.

    Attributes:
      name: unique and stable in its source.
      size: of the file's bytes or records; with the name it says whether a source is
        still the same.
      open: its records, from the first.
    """

    name: str
    size: int
    open: Callable[[], Iterator[RawRecord]]


class ReadReport:
    """Counts what was read and what was skipped, by reason.

    Args:
      max_bad: share of bad records above which `check` raises.
    """

    def __init__(self, max_bad: float = 0.1) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share in 0..1; got {max_bad}")
        self.max_bad = max_bad
        self.num_documents = 0
        self.reasons: dict[str, int] = {}
        self.listed: list[dict[str, str]] = []

    @property
    def num_bad(self) -> int:
        return sum(self.reasons.values())

    def add_bad(self, name: str, error: Exception) -> None:
        """Counts one record that was skipped because of `error`."""
        reason = getattr(error, "reason", None) or "unreadable"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.listed) < MAX_LISTED:
            entry = {"record": name, "reason": reason, "error": str(error)}
            self.listed.append(entry)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds what another report's `as_dict` says."""
        self.num_documents += other["num_documents"]
        for reason, count in other["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.listed += other["listed"][: MAX_LISTED - len(self.listed)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `merge` takes it."""
        return {
            "num_documents": self.num_documents,
            "reasons": dict(sorted(self.reasons.items())),
            "listed": self.listed,
        }

    def check(self, *, final: bool = False) -> None:
        """Stops reading when too much is bad.

        Raises:
          ValueError: counts the reasons and names the first bad records.
        """
        seen = self.num_documents + self.num_bad
        if self.num_bad <= self.max_bad * seen or (seen < _CHECK_FROM and not final):
            return
        counts = ", ".join(f"{n} {r}" for r, n in sorted(self.reasons.items()))
        first = "; ".join(f"{e['record']}: {e['error']}" for e in self.listed[:5])
        raise ValueError(
            f"{self.num_bad} of {seen} records are bad ({counts}), more than the share "
            f"max_bad={self.max_bad:g} allows; the first: {first}"
        )


def read_shard(shard: Shard, report: ReadReport) -> Iterator[Record]:
    """The good records of a shard; bad ones are counted in `report`.

    A file that breaks off counts as one more bad record; what came before it is kept.

    Raises:
      ValueError: more is bad than `report.max_bad` allows.
    """
    raws = shard.open()
    while True:
        try:
            raw = next(raws, None)
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            report.add_bad(shard.name, _named("damaged file", error))
            report.check()
            return
        if raw is None:
            return
        try:
            record = raw.read()
        except (BadRecord, ImageError, FileNotFoundError) as error:
            report.add_bad(raw.name, _named("missing file", error))
        except (ValueError, KeyError, TypeError, OSError) as error:
            report.add_bad(raw.name, _named("unreadable", error))
        else:
            report.num_documents += 1
            yield record if isinstance(record, Record) else Record(record)
        report.check()


def _named(reason: str, error: Exception) -> Exception:
    if hasattr(error, "reason") and isinstance(error, BadRecord | ImageError):
        return error
    return BadRecord(reason, f"{type(error).__name__}: {error}")


def decode_text(data: str | bytes | None | float) -> str | None:
    """A caption as characters; None where there is none (null, NaN, blank).

    Bytes are UTF-8, or UTF-16 that begins with its mark.

    Raises:
      BadRecord: in another encoding.
    """
    if data is None or (isinstance(data, float) and math.isnan(data)):
        return None
    if isinstance(data, bytes):
        has_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        try:
            data = data.decode("utf-16" if has_mark else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecord(
                "wrong encoding", f"the text is no UTF-8: {error}"
            ) from None
    if not isinstance(data, str):
        raise BadRecord("no text", f"a caption is text; got {type(data).__name__}")
    text = data.replace("\0", "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("wrong encoding", "the text has lone surrogates") from None
    return text or None


def decode_json(data: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      BadRecord: it is none.
    """
    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig")
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord("damaged JSON", f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRecord("damaged JSON", f"a JSON object is due; got {str(found)[:40]}")
    return found


def make_document(
    id: str,
    parts: Iterable[str | bytes | np.ndarray | None],
    fields: Mapping[str, Any] | None = None,
    *,
    source: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Document:
    """A document of texts (str) and images (an encoded file's bytes, or pixels).

    Args:
      id: its name.
      parts: in order; None and blank texts are left out.
      fields: its metadata; what JSON cannot hold is dropped.
      source: where it came from; None looks into `fields`.
      max_pixels: of an image.

    Raises:
      BadRecord: nothing is left of it.
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
    if not segments:
        raise BadRecord("empty document", "it has neither text nor an image")
    metadata = plain_metadata(fields or {})
    if source is None:
        source = str(pick(metadata, SOURCE_FIELDS) or "")
    return Document(id, tuple(segments), decode_text(source) or "", metadata)


def pick(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the named fields that holds something."""
    for name in names:
        value = fields.get(name)
        if value is not None and value != "":
            return value
    return None


def pick_text(fields: Mapping[str, Any], name: str | None = None) -> str | None:
    """The caption among the fields: the named one, or the first usual name.

    A list of captions gives its first.
    """
    value = pick(fields, (name,) if name else TEXT_FIELDS)
    if isinstance(value, list | tuple | np.ndarray):
        value = next((v for v in value if v), None)
    return decode_text(value)


def plain_metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold, under string keys; bytes and oversized values are left out."""
    found = {str(k): _plain(v) for k, v in fields.items()}
    found = {k: v for k, v in found.items() if v is not None}
    size = len(json.dumps(found))
    if size > _MAX_METADATA_BYTES:
        raise BadRecord("oversized metadata", f"its metadata has {size} bytes")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if _plain(v) is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    return None
