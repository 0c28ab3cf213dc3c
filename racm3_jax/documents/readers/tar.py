"""Webdataset tars, e.g. from img2dataset: members with one key are one document.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000013.jpg …

A key is a member's name up to the first dot of its last part, as in webdataset. Members
are streamed and never unpacked to disk, so names cannot escape a folder. A first pass
reads only the headers and counts the members of each key, so that the second can wait
for members that are not adjacent, and documents are never incomplete. A tar in a bucket
is read by ranges, and is transferred twice if its members are small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import lzma
import pathlib
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any, Self

from racm3_jax.buckets import BucketError, BucketPath
from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.fields import (
    decode_sidecar,
    decode_text,
    make_record,
    pick_captions,
    unique,
)
from racm3_jax.documents.readers.files import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    VIDEO_SUFFIXES,
    is_hidden,
    open_file,
    size_of,
)
from racm3_jax.documents.readers.image_fields import find_images
from racm3_jax.documents.readers.patterns import SourceFile, cut_files
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard

# Limit of the bytes of one key's members, and of all keys that are waiting.
MAX_KEY_BYTES = 1 << 28
_MAX_MEMBERS = 1_000_000
_MAX_HEADER_BYTES = 1 << 20
_DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError)
_OTHER_MEDIA = UNSUPPORTED_SUFFIXES | VIDEO_SUFFIXES
# Headers whose content tarfile reads into memory.
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def tar_shards(
    path: str,
    *,
    text: str | None = None,
    follow_links: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """One shard per tar file.

    Args:
      path: a file, or a pattern such as `coco/train-*.tar`.
      text: the JSON field of the caption, if there is no text member.
      follow_links: also read matching files that are links to other folders.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
    """

    def cut(file: SourceFile) -> list[Shard]:
        read = functools.partial(_read_tar, file, text, max_pixels)
        return [Shard(file.path.as_posix(), size_of(file.path), read)]

    return cut_files(path, "*.tar", follow_links, cut)


class _Header(tarfile.TarInfo):
    """Headers that end the archive only at its end, and have limited size.

    Attributes:
      ended: the last block was zero, which ends a tar.
    """

    ended = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            cls.ended = True
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            # TarFile would treat it as the end of the file.
            raise tarfile.ReadError(str(error)) from None
        cls.ended = False
        if header.type in _LONG_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


@contextlib.contextmanager
def _opened(
    path: pathlib.Path | BucketPath, mode: Any
) -> Iterator[tuple[tarfile.TarFile, type[_Header]]]:
    """Opens a tar, or several in one file, with its own header class."""
    header = type("_OwnHeader", (_Header,), {})
    with (
        open_file(path) as stream,
        tarfile.open(
            fileobj=stream, mode=mode, tarinfo=header, ignore_zeros=True
        ) as archive,
    ):
        yield archive, header


@dataclasses.dataclass(frozen=True)
class _Member:
    """A member of a document.

    Attributes:
      key: of its document, and the number of the document with that key.
      suffix: in lower case, from the first dot.
    """

    key: tuple[str, int]
    suffix: str
    header: tarfile.TarInfo


@dataclasses.dataclass
class _Waiting:
    """The members of a key read so far, or why they are dropped."""

    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    num_members: int = 0
    num_bytes: int = 0
    error: BadRecord | None = None


@dataclasses.dataclass
class _Layout:
    """The layout of a tar from its headers, before any member is read.

    Attributes:
      counts: number of members of each document.
      sizes: bytes of each document.
      most: maximum number of members of a document.
      apart: the members of some document are not adjacent.
      broken: where the file is truncated; "" if it is complete.
      unlike: keys whose members are repeated, but not equally often.
    """

    counts: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    sizes: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    most: int = 0
    apart: bool = False
    broken: str = ""
    unlike: frozenset[str] = frozenset()

    def judge(self, key: tuple[str, int]) -> BadRecord | None:
        """Why a key cannot become a document, according to the headers."""
        if key[0] in self.unlike:
            return BadRecord(
                "repeated member",
                f"members of key {key[0]!r} are repeated, but not all of them",
            )
        if self.sizes[key] > MAX_KEY_BYTES:
            return BadRecord(
                "oversized key",
                f"the members of key {key[0]!r} have {self.sizes[key]} bytes, more than "
                f"the {MAX_KEY_BYTES} allowed",
            )
        if self.broken and self.apart and self.counts[key] < self.most:
            return BadRecord(
                "damaged file",
                f"members of key {key[0]!r} may be missing (damage)",
            )
        return None


def _read_tar(
    file: SourceFile, text: str | None, max_pixels: int
) -> Iterator[RawRecord]:
    layout = _read_layout(file.path)
    if layout.counts:
        yield from _stream(file, layout, text, max_pixels)
    if layout.broken:
        raise BadRecord("damaged file", layout.broken)
    if not layout.counts:
        raise BadRecord("damaged file", f"{file.path} is a tar without members")


def _read_layout(path: pathlib.Path | BucketPath) -> _Layout:
    """Reads the headers (of a compressed file, also the data between them).

    The last document before a damage gets one extra member: it may be incomplete.
    """
    layout = _Layout()
    last, ended, broken = None, False, "its end is missing"
    try:
        with _opened(path, "r:*") as (archive, header):
            try:
                for number, member in enumerate(_walk(archive)):
                    layout.apart |= member.key != last and member.key in layout.counts
                    last = member.key
                    layout.counts[last] += 1
                    layout.sizes[last] += member.header.size
                    if number == _MAX_MEMBERS:
                        raise BadRecord(
                            "damaged file",
                            f"{path} has more than {_MAX_MEMBERS} members; split it",
                        )
            finally:
                ended = header.ended
    except (*_DAMAGED, EOFError, OSError) as error:
        if isinstance(error, BucketError) or (
            isinstance(error, OSError) and error.errno is not None
        ):
            raise
        broken = str(error).splitlines()[0]
    else:
        broken = "" if ended else broken
    if broken:
        layout.broken = f"{path} is truncated or not a tar file: {broken}"
    layout.most = max(layout.counts.values(), default=0)
    if last is not None and not ended:
        layout.counts[last] += 1
    counts = layout.counts
    layout.unlike = frozenset(k for (k, n), c in counts.items() if c != counts[k, 0])
    return layout


def _walk(archive: tarfile.TarFile) -> Iterator[_Member]:
    """The members of documents: no folders, no hidden files."""
    seen: Counter[tuple[str, str]] = Counter()
    for header in archive:
        # Otherwise TarFile keeps all headers.
        archive.members = []  # type: ignore[attr-defined]
        name = posixpath.normpath(header.name)
        if header.isdir() or is_hidden(name):
            continue
        folder, slash, last = name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        key, suffix = folder + slash + stem, (dot + suffix).lower()
        # A repeated name starts the next document of its key.
        yield _Member((key, seen[key, suffix]), suffix, header)
        seen[key, suffix] += 1


def _stream(
    file: SourceFile, layout: _Layout, text: str | None, max_pixels: int
) -> Iterator[RawRecord]:
    waiting: dict[tuple[str, int], _Waiting] = {}
    num_bytes = 0
    with _opened(file.path, "r|*") as (archive, _):
        try:
            for member in _walk(archive):
                key = member.key
                if key not in waiting:
                    waiting[key] = _Waiting(error=layout.judge(key))
                own = waiting[key]
                held = own.num_bytes
                _take(own, key[0], member, archive, num_bytes, len(waiting))
                num_bytes += own.num_bytes - held
                if own.num_members == layout.counts[key]:
                    num_bytes -= own.num_bytes
                    del waiting[key]
                    yield _record(file, key, own, text, max_pixels)
        except (*_DAMAGED, EOFError):
            # The caller reports it; the last key is incomplete.
            return


def _take(
    own: _Waiting,
    key: str,
    member: _Member,
    archive: tarfile.TarFile,
    num_bytes: int,
    num_waiting: int,
) -> None:
    """Reads a member, unless its document is refused or becomes too large."""
    own.num_members += 1
    header = member.header
    if own.error is None and not header.isfile():
        own.error = BadRecord(
            "link in a tar", f"{header.name} is a link or a device, which is not read"
        )
    elif own.error is None and num_bytes + header.size > MAX_KEY_BYTES:
        own.error = BadRecord(
            "members of a key apart",
            f"the members of {num_waiting} keys are not adjacent, and together have "
            f"more than {MAX_KEY_BYTES} bytes; key {key!r} is one: sort the tar "
            "by name",
        )
    if own.error is not None:
        own.members, own.num_bytes = {}, 0
        return
    stream = archive.extractfile(header)
    data = b"" if stream is None else _read_all(stream, header)
    own.members[member.suffix] = data
    own.num_bytes += len(data)


def _read_all(stream: IO[bytes], header: tarfile.TarInfo) -> bytes:
    data = stream.read()
    if len(data) != header.size:
        raise EOFError(f"the file is truncated inside {header.name}")
    return data


def _record(
    file: SourceFile,
    key: tuple[str, int],
    own: _Waiting,
    text: str | None,
    max_pixels: int,
) -> RawRecord:
    name = key[0] if not key[1] else f"{key[0]}#{key[1] + 1}"
    read = functools.partial(
        _make, f"{file.name}/{name}", own.members, own.error, text, max_pixels
    )
    return RawRecord(f"{file.path.as_posix()}/{name}", read)


def _make(
    id: str,
    members: Mapping[str, bytes],
    error: BadRecord | None,
    text: str | None,
    max_pixels: int,
) -> Record:
    if error is not None:
        raise error
    fields = decode_sidecar(members[".json"]) if ".json" in members else {}
    captions = [decode_text(d) for s, d in members.items() if _is_caption(s)]
    words = unique([*captions, *pick_captions(fields, text)])
    suffixes = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    images = [members[suffix] for suffix in suffixes[:1]]
    if not images:
        _refuse_unread(id, members)
        images, used = find_images(fields, None)
        fields = {name: value for name, value in fields.items() if name != used}
    return make_record(
        id,
        (*words[:1], *images),
        fields,
        more_captions=words[1:],
        left_out=["further image of a key"] * len(suffixes[1:]),
        max_pixels=max_pixels,
    )


def _is_caption(suffix: str) -> bool:
    """`.txt`, and `.jpg.txt` of `cat.jpg.txt`."""
    image, dot, last = suffix.rpartition(".")
    return dot + last in TEXT_SUFFIXES and (not image or image in IMAGE_SUFFIXES)


def _refuse_unread(id: str, members: Mapping[str, bytes]) -> None:
    """Refuses a key with an image of an unsupported suffix.

    Raises:
      BadRecord: its caption alone would be an incomplete document.
    """
    unread = [s for s in members if s in _OTHER_MEDIA]
    if unread:
        raise BadRecord(
            "unsupported file type",
            f"{id} has a member {unread[0]}, which is not supported; convert it to JPEG "
            "or PNG",
        )
    dotted = [s for s in members if "." in s[1:] and not _is_caption(s)]
    ends = [s for s in dotted if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if ends or (dotted and not any(_is_caption(s) or s == ".json" for s in members)):
        raise BadRecord(
            "dots in a member's name",
            f"{id} has the members {', '.join(members)}: webdataset splits names at "
            "the first dot, and none of these suffixes is supported; rename them "
            "without other dots",
        )
