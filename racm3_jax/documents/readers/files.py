"""Which files a reader may read: rules for hidden files, links and sizes.

A file is read only if it is inside the folder that the user named. Links to outside are
refused and counted, or followed with `follow_links`; links of a Hugging Face snapshot
to the blobs of its own repository are always followed:

    datasets--me--pets/snapshots/<revision>/0.jpg -> ../../blobs/<hash>
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from racm3_jax.buckets import BucketPath
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard
from racm3_jax.types import Document

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
        *(".avif", ".avifs", ".heic", ".heif", ".hif"),
    )
)
# Image formats that are not supported.
UNSUPPORTED_SUFFIXES = frozenset(
    (
        *(
            ".jp2",
            ".j2k",
            ".jpx",
            ".jxl",
            ".jxr",
            ".svg",
            ".svgz",
            ".eps",
            ".ai",
            ".psd",
        ),
        *(".xcf", ".tga", ".ico", ".exr", ".hdr", ".dds", ".pcx", ".dcm", ".raw"),
        *(
            ".dng",
            ".cr2",
            ".cr3",
            ".nef",
            ".arw",
            ".orf",
            ".rw2",
            ".raf",
            ".pef",
            ".srw",
        ),
    )
)
VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg"))
TEXT_SUFFIXES = (".txt", ".text", ".caption", ".cap")
# A larger file or record is not a caption or a photograph.
MAX_FILE_BYTES = 1 << 28
RECORDS_PER_SHARD = 4096
# Files of operating systems and tools next to the user's files.
_LEFT_BEHIND = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN"))
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden (`._0.jpg`, `.ipynb_checkpoints/0.jpg`)."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _LEFT_BEHIND
        for part in name.split("/")
    )


def expand_home(path: str) -> str:
    """`~/pets` -> `/home/me/pets`.

    Raises:
      ValueError: there is no such user.
    """
    try:
        return str(pathlib.Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError(f"the path {path!r} cannot be expanded: {error}") from None


def open_file(path: pathlib.Path | BucketPath) -> IO[bytes]:
    """Opens a local file or a file in a bucket as a seekable stream."""
    return path.open() if isinstance(path, BucketPath) else open(path, "rb")


def size_of(path: pathlib.Path | BucketPath) -> int:
    """Size in bytes of a local file or a file in a bucket."""
    return path.size if isinstance(path, BucketPath) else path.stat().st_size


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file of a corpus.

    Raises:
      BadRecord: it is larger than allowed, or a device, pipe or folder.
      OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord("not a file", f"{path} is a folder, a device or a pipe")
    if status.st_size > MAX_FILE_BYTES:
        raise BadRecord(
            "oversized file",
            f"{path} has {status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed",
        )
    return path.read_bytes()


class Folder:
    """The folder of a source, and the files below it that may be read.

    Args:
      path: the folder.
      follow_links: also follow links to outside.
    """

    def __init__(
        self, path: str | os.PathLike[str], follow_links: bool = False
    ) -> None:
        self.path = pathlib.Path(path)
        self.follow_links = follow_links
        self._start = pathlib.Path(os.path.abspath(path))
        # A link to itself cannot be resolved; opening it raises the error.
        self._real = pathlib.Path(os.path.realpath(self._start))
        blobs = {_find_blobs(self._start), _find_blobs(self._real)}
        self._allowed = [self._real, *(b for b in blobs if b is not None)]

    def find(self, name: str) -> pathlib.Path:
        """The path of a file name in a table or record; the file may not exist.

        Args:
          name: relative to the folder, absolute, or a `file://` URL; Windows
            backslashes are accepted.

        Raises:
          BadRecord: a URL, or a path or link to outside the folder.
        """
        if name.startswith("file://"):
            name = urllib.parse.unquote(urllib.parse.urlsplit(name).path)
        elif _URL.match(name):
            raise BadRecord(
                "image is a URL",
                f"{name[:200]} is not downloaded; download the images first, with "
                "img2dataset for instance",
            )
        if "\0" in name:
            raise BadRecord("path outside the folder", f"{name[:200]!r} is not a path")
        path = pathlib.Path(os.path.normpath(self._start / name))
        if "\\" in name and not path.exists():
            path = pathlib.Path(os.path.normpath(self._start / name.replace("\\", "/")))
        if not any(path.is_relative_to(top) for top in (self._start, self._real)):
            raise BadRecord(
                "path outside the folder",
                f"{name[:200]!r} leads out of {self.path}; only files below it are read",
            )
        self.check(path)
        return path

    def check(self, path: pathlib.Path) -> None:
        """Refuses a path below the folder that is a link to outside.

        Raises:
          BadRecord: it is.
        """
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:
            raise BadRecord("broken link", f"{path} leads nowhere: {error}") from None
        if not self.follow_links and not self._holds(real):
            raise BadRecord(
                "link outside the folder",
                f"{path} is a link that leads out of {self.path}; --follow_links (or "
                ";follow_links=true after the source) reads it",
            )

    def read(self, name: str | pathlib.Path) -> bytes:
        """The bytes of a file below the folder; see `find` and `read_file`."""
        return read_file(self.find(str(name)))

    def walk(self) -> tuple[list[str], list[BadRecord]]:
        """All files below the folder, and the refused links to folders.

        Hidden files and folders are skipped. A folder is visited once, even with
        several links to it.

        Returns:
          (names, refused): names are relative to the folder, with `/`, and sorted.
        """
        names: list[str] = []
        refused: list[BadRecord] = []
        visited = {self._real}
        waiting = [self.path]
        links: list[pathlib.Path] = []
        while waiting or links:
            if not waiting:
                link = links.pop(0)
                real = link.resolve()
                if real in visited:
                    continue
                try:
                    self.check(self._start / link.relative_to(self.path))
                except BadRecord as error:
                    refused.append(error)
                    continue
                visited.add(real)
                waiting.append(link)
            place = waiting.pop()
            try:
                entries = list(os.scandir(place))
            except OSError as error:
                if place == self.path:
                    raise
                refused.append(BadRecord("unreadable folder", f"{place}: {error}"))
                continue
            for entry in entries:
                path = pathlib.Path(entry.path)
                if is_hidden(entry.name):
                    continue
                if path.is_dir():
                    if path.is_symlink():
                        links.append(path)
                    else:
                        visited.add(path.resolve())
                        waiting.append(path)
                elif entry.is_symlink() or entry.is_file():
                    names.append(path.relative_to(self.path).as_posix())
            links.sort()
        return sorted(names, key=lambda name: name.split("/")), refused

    def _holds(self, real: pathlib.Path) -> bool:
        return any(real.is_relative_to(top) for top in self._allowed)


def _find_blobs(path: pathlib.Path) -> pathlib.Path | None:
    """`…/repository/blobs` where `path` is `…/repository/snapshots/<revision>/…`."""
    for above in (path, *path.parents):
        blobs = above.parent / "blobs"
        if above.name == "snapshots" and blobs.is_dir():
            return blobs.resolve()
    return None


def cut_shards(
    name: str, records: Sequence[tuple[str, Callable[[], Record | Document]]]
) -> list[Shard]:
    """Splits a list of records into shards."""

    def open_range(start: int) -> Iterator[RawRecord]:
        for record, read in records[start : start + RECORDS_PER_SHARD]:
            yield RawRecord(f"{name}/{record}", read)

    return [
        Shard(
            f"{name}[{start}:{min(len(records), start + RECORDS_PER_SHARD)}]",
            min(RECORDS_PER_SHARD, len(records) - start),
            functools.partial(open_range, start),
        )
        for start in range(0, len(records), RECORDS_PER_SHARD)
    ]
