"""Webdataset tars, as img2dataset writes them: members of one key are one document.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000013.jpg …

A key is a member's name up to the first dot of its last part, as webdataset cuts it.
Members are streamed and never unpacked to disk, so names cannot lead anywhere. A first
pass reads the headers alone: it counts the members of each key, so that the second can
wait for those that lie apart, and no document is ever half of one. A tar in a bucket is
read by ranges, and is transferred twice if its members are small.
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

# What the members of one key may sum to, and those of all keys that are waited for.
MAX_KEY_BYTES = 1 << 28
_MAX_MEMBERS = 1_000_000
_MAX_HEADER_BYTES = 1 << 20
_DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError)
_OTHER_MEDIA = UNSUPPORTED_SUFFIXES | VIDEO_SUFFIXES
# Headers whose own content tarfile holds in memory.
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
    """A shard a tar file.

    Args:
      path: a file, or a pattern such as `coco/train-*.tar`.
      text: the JSON field of the caption, where no text member holds it.
      follow_links: read also matching files that are links to other folders.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
    """

    def cut(file: SourceFile) -> list[Shard]:
        read = functools.partial(_read_tar, file, text, max_pixels)
        return [Shard(file.path.as_posix(), size_of(file.path), read)]

    return cut_files(path, "*.tar", follow_links, cut)


class _Header(tarfile.TarInfo):
    """Headers that end a file only at its end, and hold no gigabytes.

    Attributes:
      ended: the last block was one of zeros, which ends a tar.
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
            # TarFile takes it for the end of the file.
            raise tarfile.ReadError(str(error)) from None
        cls.ended = False
        if header.type in _LONG_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


@contextlib.contextmanager
def _opened(
    path: pathlib.Path | BucketPath, mode: Any
) -> Iterator[tuple[tarfile.TarFile, type[_Header]]]:
    """A tar, or several in one file, and the class of its headers alone."""
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
    """A member that belongs to a document.

    Attributes:
      key: of its document, and which of the documents of that key it is.
      suffix: in lower case, from the first dot.
    """

    key: tuple[str, int]
    suffix: str
    header: tarfile.TarInfo


@dataclasses.dataclass
class _Waiting:
    """The members of a key that have been read so far, or why they are dropped."""

    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    num_members: int = 0
    num_bytes: int = 0
    error: BadRecord | None = None


@dataclasses.dataclass
class _Layout:
    """What the headers of a tar say, before any member is read.

    Attributes:
      counts: members of each document.
      sizes: bytes of each document.
      most: members of any document.
      apart: the members of some document do not follow one another.
      broken: where the file breaks off; "" where it does not.
      unlike: keys whose names come again, but not each of them equally often.
    """

    counts: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    sizes: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    most: int = 0
    apart: bool = False
    broken: str = ""
    unlike: frozenset[str] = frozenset()

    def judge(self, key: tuple[str, int]) -> BadRecord | None:
        """Why no document can be made of a key, as far as the headers tell."""
        if key[0] in self.unlike:
            return BadRecord(
                "repeated member",
                f"members of key {key[0]!r} come again, and not all of them",
            )
        if self.sizes[key] > MAX_KEY_BYTES:
            return BadRecord(
                "oversized key",
                f"the members of key {key[0]!r} have {self.sizes[key]} bytes, more than "
                f"the {MAX_KEY_BYTES} allowed",
            )
        if self.broken and self.apart and self.counts[key] < self.most:
            return BadRecord(
                "damaged file", f"members of key {key[0]!r} may be after the break"
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
    """Reads the headers; of a compressed file also what is between them.

    The last document before a break is given one member more: it may not be whole.
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
    """The members that belong to documents: no folders, and nothing hidden."""
    seen: Counter[tuple[str, str]] = Counter()
    for header in archive:
        # TarFile keeps all headers otherwise.
        archive.members = []  # type: ignore[attr-defined]
        name = posixpath.normpath(header.name)
        if header.isdir() or is_hidden(name):
            continue
        folder, slash, last = name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        key, suffix = folder + slash + stem, (dot + suffix).lower()
        # A name that comes again begins the next document of its key.
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
            # Said by the caller, which knows it; the last key is not whole.
            return


def _take(
    own: _Waiting,
    key: str,
    member: _Member,
    archive: tarfile.TarFile,
    num_bytes: int,
    num_waiting: int,
) -> None:
    """Reads a member, unless its document is refused or becomes too large by it."""
    own.num_members += 1
    header = member.header
    if own.error is None and not header.isfile():
        own.error = BadRecord(
            "link in a tar", f"{header.name} is a link or a device, which is not read"
        )
    elif own.error is None and num_bytes + header.size > MAX_KEY_BYTES:
        own.error = BadRecord(
            "members of a key apart",
            f"the members of {num_waiting} keys lie apart, and together have more than "
            f"the {MAX_KEY_BYTES} bytes that are held; key {key!r} is one: sort the tar "
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
        raise EOFError(f"the file breaks off inside {header.name}")
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
    """Refuses a key that has an image, but not under a suffix that is read.

    Raises:
      BadRecord: its caption alone would be half a document.
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
            f"{id} has the members {', '.join(members)}: webdataset cuts a name at its "
            "first dot, and knows none of the rest; rename them without other dots",
        )
