"""Documents on disk: ArrayRecord files of self-describing records, without pickle.

A record is a tag, the length of a JSON header, the header, and raw bytes:

    "RDOC" | u32 header bytes | {"id", "source", "metadata", "segments"} | PNG | PNG ...
    "RTOK" | u32 header bytes | {"id", "source", "metadata", "segments"} | int32 tokens ...

All numbers are little-endian. A header's segment is `{"text": "…"}` or `{"image": bytes}`
in a document, `{"modality": "text" | "image", "length": tokens}` in a tokenized one.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from racm3_jax.documents.images import encode_png, read_image
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment

_DOCUMENT_TAG = b"RDOC"
_TOKENIZED_TAG = b"RTOK"
# One record a group: records are read in random order.
_WRITER_OPTIONS = "group_size:1"


def _join(
    tag: bytes,
    document: Document | TokenizedDocument,
    segments: list[dict[str, Any]],
    payload: list[bytes],
) -> bytes:
    header = json.dumps(
        {
            "id": document.id,
            "source": document.source,
            "metadata": dict(document.metadata),
            "segments": segments,
        },
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    ).encode("utf-8", "surrogatepass")
    return b"".join([tag, struct.pack("<I", len(header)), header, *payload])


def _split(tag: bytes, record: bytes, kind: str) -> tuple[dict[str, Any], memoryview]:
    start = len(tag) + 4
    if record[: len(tag)] != tag or len(record) < start:
        raise ValueError(
            f"a record of {len(record)} bytes is not a {kind}: it starts with "
            f"{bytes(record[:4])!r}, not {tag!r}"
        )
    (length,) = struct.unpack("<I", record[len(tag) : start])
    try:
        header = json.loads(
            record[start : start + length].decode("utf-8", "surrogatepass")
        )
    except ValueError as error:
        raise ValueError(
            f"the header of a {kind} record is damaged: {error}"
        ) from error
    return header, memoryview(record)[start + length :]


def encode_document(document: Document) -> bytes:
    """Encode a document as one record; images become PNG.

    Raises:
      TypeError: the metadata is not JSON-serialisable.
    """
    segments: list[dict[str, Any]] = []
    payload: list[bytes] = []
    for segment in document.segments:
        if segment.image is None:
            segments.append({"text": segment.text})
        else:
            payload.append(encode_png(segment.image))
            segments.append({"image": len(payload[-1])})
    return _join(_DOCUMENT_TAG, document, segments, payload)


def decode_document(record: bytes) -> Document:
    """Invert `encode_document`.

    Raises:
      ValueError: the record is damaged or of another kind.
    """
    header, rest = _split(_DOCUMENT_TAG, record, "document")
    segments: list[Segment] = []
    for entry in header["segments"]:
        if "text" in entry:
            segments.append(Segment(text=entry["text"]))
        else:
            png, rest = rest[: entry["image"]], rest[entry["image"] :]
            segments.append(Segment(image=read_image(bytes(png))))
    return Document(header["id"], tuple(segments), header["source"], header["metadata"])


def encode_tokenized(document: TokenizedDocument) -> bytes:
    """Encode a tokenized document as one record.

    Raises:
      TypeError: the metadata is not JSON-serialisable.
    """
    return _join(
        _TOKENIZED_TAG,
        document,
        [{"modality": s.modality, "length": len(s.tokens)} for s in document.segments],
        [np.ascontiguousarray(s.tokens, "<i4").tobytes() for s in document.segments],
    )


def decode_tokenized(record: bytes) -> TokenizedDocument:
    """Invert `encode_tokenized`.

    Raises:
      ValueError: the record is damaged or of another kind.
    """
    header, rest = _split(_TOKENIZED_TAG, record, "tokenized document")
    lengths = [entry["length"] for entry in header["segments"]]
    if len(rest) != 4 * sum(lengths):
        raise ValueError(
            f"the record of document {header['id']!r} holds {len(rest)} bytes of tokens "
            f"where its header names {4 * sum(lengths)}"
        )
    tokens = np.frombuffer(rest, "<i4").astype(np.int32)
    parts = np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []
    segments = tuple(
        TokenizedSegment(entry["modality"], part)
        for entry, part in zip(header["segments"], parts, strict=True)
    )
    return TokenizedDocument(
        header["id"], segments, header["source"], header["metadata"]
    )


def write_records(path: str | os.PathLike[str], records: Iterable[bytes]) -> int:
    """Write records to an ArrayRecord file, aside and then renamed.

    A file under `path` is therefore always complete; an error leaves none.

    Returns:
      How many records were written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        writer = ArrayRecordWriter(str(aside), _WRITER_OPTIONS)
        try:
            for record in records:
                _call(writer.write, record)
                count += 1
        finally:
            _call(writer.close)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _call(method: Callable[..., Any], *given: Any) -> None:
    try:
        method(*given)
    except RuntimeError as error:
        # The library's word for a disk that is full or fails.
        raise OSError(f"records cannot be written: {error}; make room there") from error


class RecordFile:
    """Random access to an ArrayRecord file; threads may share one.

    Read many records in one call: that is some fifty times faster than one by one.

    Args:
      path: written by `write_records`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not an ArrayRecord file, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"there is no record file {self._path}")
        # Without read-ahead a batched read fetches only the records asked for.
        self._reader = ArrayRecordReader(str(self._path), "readahead_buffer_size:0")
        if not self._reader.ok():
            raise ValueError(
                f"{self._path} is damaged or no ArrayRecord file{self._complaint()}; "
                "make it again"
            )
        self._length = self._reader.num_records()
        self._closed = False
        self._lock = threading.Lock()

    def _complaint(self) -> str:
        """What the reader has to say; it says so only on closing."""
        try:
            self._reader.close()
        except RuntimeError as error:
            return f" ({error})"
        return ""

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """Read records in the order of `indices`; repeats are allowed.

        Raises:
          IndexError: an index lies outside 0..len - 1.
          ValueError: the file is closed or damaged.
        """
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if not len(wanted):
            return []
        if not self._length:
            raise IndexError(f"{self._path} has no records; got {wanted[0]}")
        if wanted.min() < 0 or wanted.max() >= self._length:
            raise IndexError(
                f"records of {self._path} are numbered 0..{self._length - 1}; got "
                f"{wanted.min()}..{wanted.max()}"
            )
        if self._closed:
            raise ValueError(f"{self._path} is closed")
        try:
            return list(self._reader.read(wanted.tolist()))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._reader.close()
