"""The interface of readers: shards of lazily read records.

A source is a list of shards in a fixed order; a shard is a file, or a range of one. A
record is cheap until `RawRecord.read` decodes it, so that a shard can be counted or
skipped without decoding images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
from jaxtyping import Float32

from racm3_jax.buckets import BucketError, MissingError
from racm3_jax.documents.ahead import map_ahead
from racm3_jax.documents.images import ImageError
from racm3_jax.types import Document

Result = TypeVar("Result")

# Number of bad records listed by name; all are counted.
MAX_LISTED = 1000
_MAX_MESSAGE = 500
_MAX_SHOWN = 5
# A fraction of a few records is not meaningful.
_CHECK_FROM = 100
# Exceptions of reading a record from an invalid file.
_RECORD_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(OSError, EOFError, RuntimeError),
)


class BadRecord(ValueError):
    """A record that cannot become a document.

    Attributes:
      reason: the kind of error, equal for equal errors; bad records are counted by it.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class LeftOut(Exception):
    """Not a document, but not an error either; counted by its reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A document, with its embeddings if the source has some.

    Attributes:
      document: what was read.
      text_embedding: of its text, not normalised; None if it has to be computed.
      image_embedding: of its image.
      left_out: parts of the record that are not in the document; one reason each.
    """

    document: Document
    text_embedding: Float32[np.ndarray, " d_embed"] | None = None
    image_embedding: Float32[np.ndarray, " d_embed"] | None = None
    left_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """One record before decoding.

    Attributes:
      name: its location, for the list of bad records.
      read: decodes it; raises `BadRecord` or another error for bad records, and
        `LeftOut` if it is not a document.
    """

    name: str
    read: Callable[[], Record | Document]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a source; the unit of work of a process, and of a retry.

    Attributes:
      name: unique and stable in its source.
      size: bytes or records of the file; with the name it identifies whether a source
        is unchanged.
      open: returns its records, from the first.
    """

    name: str
    size: int
    open: Callable[[], Iterator[RawRecord]]


class ReadReport:
    """Counts what was read and what was skipped, by reason.

    Args:
      max_bad: fraction of bad records above which `check` raises.

    Attributes:
      num_documents: number of documents read.
      reasons: bad records, by reason.
      left_out: parts of good records, and files that are not documents, by reason.
      listed: the first bad records.
    """

    def __init__(self, max_bad: float = 0.1) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a fraction in 0..1; got {max_bad}")
        self.max_bad = max_bad
        self.num_documents = 0
        self.reasons: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self.listed: list[dict[str, str]] = []

    @property
    def num_bad(self) -> int:
        return sum(self.reasons.values())

    def add_bad(self, name: str, error: Exception) -> None:
        """Counts one record that was skipped because of `error`."""
        reason = getattr(error, "reason", None) or "unreadable"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.listed) < MAX_LISTED:
            message = str(error)[:_MAX_MESSAGE]
            entry = {"record": name, "reason": reason, "error": message}
            self.listed.append(entry)

    def add_left_out(self, reason: str, count: int = 1) -> None:
        """Counts skipped parts, which do not make a record bad."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds another report's `as_dict`."""
        self.num_documents += other["num_documents"]
        for reason, count in other["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for reason, count in other.get("left_out", {}).items():
            self.add_left_out(reason, count)
        self.listed += other["listed"][: MAX_LISTED - len(self.listed)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `merge` takes it."""
        return {
            "num_documents": self.num_documents,
            "reasons": dict(sorted(self.reasons.items())),
            "left_out": dict(sorted(self.left_out.items())),
            "listed": self.listed,
        }

    def check(self, *, final: bool = False) -> None:
        """Raises if too many records are bad.

        Raises:
          ValueError: counts the reasons and names the first bad records.
        """
        seen = self.num_documents + self.num_bad
        if self.num_bad <= self.max_bad * seen or (seen < _CHECK_FROM and not final):
            return
        raise ValueError(
            f"{self.num_bad} of {seen} records are bad ({self.count_bad()}), more than "
            f"max_bad={self.max_bad:g} allows: correct or remove them; the first: "
            f"{self.show_bad()}"
        )

    def count_bad(self) -> str:
        """`"2 damaged JSON, 1 missing file"`."""
        return ", ".join(f"{n} {r}" for r, n in sorted(self.reasons.items()))

    def show_bad(self) -> str:
        """The first bad record of each reason, with its error."""
        first: dict[str, dict[str, str]] = {}
        for entry in self.listed:
            first.setdefault(entry["reason"], entry)
        shown = list(first.values())[:_MAX_SHOWN]
        return "; ".join(f"{e['record']}: {e['error']}" for e in shown)


def read_shard(shard: Shard, report: ReadReport) -> Iterator[Record]:
    """The good records of a shard; bad ones are counted in `report`.

    A truncated file counts as one more bad record; its earlier records are kept.

    Raises:
      ValueError: more bad records than `report.max_bad` allows.
      BucketError: a bucket cannot be read; this is not counted as a bad record.
    """
    return _count(map(functools.partial(_read, None), _open(shard)), report)


def read_shard_ahead(
    shard: Shard, report: ReadReport, prepare: Callable[[Record], Result]
) -> Iterator[Result]:
    """`prepare` of the records that `read_shard` gives, in order.

    Threads read and prepare a few records each ahead of their use.

    Args:
      shard: of a source.
      report: see `read_shard`.
      prepare: called in several threads at a time.
    """
    return _count(map_ahead(functools.partial(_read, prepare), _open(shard)), report)


@dataclasses.dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of a raw record: an error, or a record and what was made of it."""

    raw: RawRecord
    error: Exception | None = None
    left_out: tuple[str, ...] = ()
    result: Any = None


def _open(shard: Shard) -> Iterator[RawRecord]:
    """Its records; a damaged file ends with one that cannot be read."""
    try:
        yield from shard.open()
    except BucketError:
        raise
    except _RECORD_ERRORS as error:
        named = _named("damaged file", error)
        yield RawRecord(shard.name, functools.partial(_refuse, named))


def _refuse(error: Exception) -> NoReturn:
    raise error


def _read(prepare: Callable[[Record], Any] | None, raw: RawRecord) -> _Outcome:
    try:
        found = raw.read()
    except LeftOut as error:
        return _Outcome(raw, error)
    except _RECORD_ERRORS as error:
        if isinstance(error, BucketError) and not isinstance(error, MissingError):
            raise
        return _Outcome(raw, _named("unreadable", error))
    record = found if isinstance(found, Record) else Record(found)
    result = record if prepare is None else prepare(record)
    return _Outcome(raw, None, record.left_out, result)


def _count(outcomes: Iterator[_Outcome], report: ReadReport) -> Iterator[Any]:
    """The results, in order; everything is counted in `report`."""
    for outcome in outcomes:
        if isinstance(outcome.error, LeftOut):
            report.add_left_out(outcome.error.reason)
        elif outcome.error is not None:
            report.add_bad(outcome.raw.name, outcome.error)
        else:
            report.num_documents += 1
            for reason in outcome.left_out:
                report.add_left_out(reason)
            yield outcome.result
        report.check()


def _named(reason: str, error: Exception) -> Exception:
    """The error as a `BadRecord` with a reason."""
    if isinstance(error, BadRecord | ImageError):
        return error
    if isinstance(error, RecursionError):
        return BadRecord("nested too deep", "it is nested too deeply")
    if isinstance(error, FileNotFoundError):
        reason = "missing file"
    elif isinstance(error, PermissionError):
        reason = "no permission"
    return BadRecord(reason, f"{type(error).__name__}: {error}")
