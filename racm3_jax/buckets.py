"""Folders and files in buckets: `gs://bucket/run`, `s3://…`, any URL that fsspec knows.

    Bucket("gs://me/run").put("checkpoints/5/state/0.0", path)     whole files, by name
    BucketPath("gs://me/train-0000.tar").open()                    a stream of ranges

Client exceptions become a `BucketError` whose message names the URL. Listings are not
cached: other machines write there, too.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Bytes of one request of a sequential reader.
RANGE_BYTES = 1 << 22
COPY_BYTES = 1 << 24
_NUM_THREADS = 8
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/")
# Schemes, and our extra that installs the client.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_LOGIN = {
    "gcs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}
_FORBIDDEN = re.compile(
    r"\b40[13]\b|forbidden|access ?denied|permission|credential|anonymous|unauthorized"
    r"|invalidaccesskeyid|signaturedoesnotmatch",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"\b404\b|no ?such|not ?found|does not exist", re.IGNORECASE)


# Metadata keys that change with the file, by client.
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "updated", "mtime", "created")
_VERSIONS += ("LastModified", "last_modified")


def is_url(path: object) -> bool:
    """Whether a path is a URL, also where `Path` removed one slash."""
    return _URL.match(str(path)) is not None


def refuse_url(path: object, what: str) -> None:
    """Refuses a URL where local files are needed.

    Raises:
      ValueError: `path` is a URL; says which paths may be URLs.
    """
    if is_url(path):
        raise ValueError(
            f"{path} is a URL, but {what} must be on this machine: copy it here, or mount "
            "the bucket (URLs may be the --workdir of racm3 train, a --memory that is "
            "only read, config.memory_path, and sources of the kinds webdataset, parquet "
            "and jsonl)"
        )


class BucketError(OSError):
    """A bucket that cannot be read or written, in a sentence that names the URL."""


class MissingError(BucketError, FileNotFoundError):
    """Nothing is there."""


class ForbiddenError(BucketError, PermissionError):
    """It may not be read or written."""


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns the exceptions of any client into readable errors.

    Raises:
      MissingError: nothing is at `url`.
      ForbiddenError: it may not be read or written.
      BucketError: any other failure.
    """
    try:
        yield
    except BucketError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _absent(url) from error
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        status = getattr(error, "code", None) or getattr(error, "status", None)
        if isinstance(error, PermissionError) or _FORBIDDEN.search(words):
            login = _LOGIN.get(_extra(url) or "", "the login of its client")
            raise ForbiddenError(
                f"no permission for {url} ({words}): check its access rights, and the "
                f"login of this machine ({login})"
            ) from error
        if status in (404, "404") or _ABSENT.search(words):
            raise _absent(url) from error
        raise BucketError(f"{url} cannot be reached ({words})") from error


def _absent(url: str) -> MissingError:
    return MissingError(f"there is no {url}: check the bucket and the name in it")


def _extra(url: str) -> str | None:
    scheme = _URL.match(url)
    return _EXTRAS.get(scheme[1].lower()) if scheme else None


def normalise(url: object) -> str:
    """A URL with two slashes and none at its end, also where `Path` removed one."""
    return re.sub(r":/+", "://", str(url), count=1).rstrip("/")


def open_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and its path there.

    Raises:
      ValueError: unknown scheme, or its client package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = _extra(url)
        remedy = f'; pip install "racm3_jax[{extra}]"' if extra else ""
        raise ValueError(f"cannot open {url}: {error}{remedy}") from error
    except ValueError as error:
        raise ValueError(f"cannot open {url}: {error}") from error
    except Exception as error:
        with explained(url):
            raise
        raise AssertionError from error


class Found(NamedTuple):
    """A file of a listing.

    Attributes:
      size: in bytes.
      version: differs after every change.
    """

    size: int
    version: tuple[str, ...]


class Bucket:
    """A folder of a bucket: its files by their relative names.

    Attributes:
      url: of the folder.

    Raises:
      ValueError: see `open_system`.
    """

    def __init__(self, url: str) -> None:
        self.url = normalise(url)
        self.system, root = open_system(self.url)
        self.root = root.rstrip("/")

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(f"{self.url}/{name}")

    def find(self, *, depth: int | None = None) -> dict[str, Found]:
        """All files below the folder, by relative name; {} if there are none.

        Args:
          depth: 1 lists only the folder itself; None is recursive.
        """
        with explained(self.url):
            try:
                if depth is None:
                    found = self.system.find(self.root, detail=True)
                else:
                    found = self._list(self.root, depth)
            except FileNotFoundError:
                return {}
        return {
            path.removeprefix(self.root).lstrip("/"): Found(
                int(facts.get("size") or 0),
                tuple(str(facts[key]) for key in _VERSIONS if key in facts),
            )
            for path, facts in found.items()
        }

    def _list(self, place: str, depth: int) -> dict[str, Any]:
        """Like a client's `find`, which treats what it may not list as empty."""
        found = {}
        for facts in self.system.ls(place, detail=True):
            if facts["type"] != "directory":
                found[facts["name"]] = facts
            elif depth > 1:
                found |= self._list(facts["name"], depth - 1)
        return found

    def read(
        self, name: str, start: int | None = None, stop: int | None = None
    ) -> bytes:
        """The bytes of a file, or of a range of it."""
        with explained(f"{self.url}/{name}"):
            return bytes(self.system.cat_file(self._place(name), start=start, end=stop))

    def write(self, name: str, data: bytes) -> None:
        """Replaces a file in one step, as object stores do."""
        with explained(f"{self.url}/{name}"):
            self.system.pipe_file(self._place(name), data)

    def put(self, name: str, path: Path) -> None:
        """Uploads a local file.

        Raises:
          FileNotFoundError: `path` no longer exists.
        """
        path.stat()
        with explained(f"{self.url}/{name}"):
            self.system.put_file(str(path), self._place(name))

    def get(self, name: str, path: Path) -> None:
        """Downloads a file; creates the folder of `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with explained(f"{self.url}/{name}"):
            self.system.get_file(self._place(name), str(path))

    def remove(self, name: str) -> None:
        """Removes a file; no error if it is already gone."""
        with (
            contextlib.suppress(FileNotFoundError),
            explained(f"{self.url}/{name}"),
        ):
            self.system.rm_file(self._place(name))

    def _place(self, name: str) -> str:
        return f"{self.root}/{name}"


def each(call: Callable[[str], object], names: Iterable[str]) -> None:
    """Calls `call` for every name, in several threads; stops at the first error."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting = [pool.submit(call, name) for name in names]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class BucketPath:
    """A file in a bucket for streaming readers, with what they use of `pathlib.Path`.

    Args:
      url: of the file.
      size: in bytes, if known.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self.url = url
        self._system, self._place = open_system(url)
        self._size = size

    def __str__(self) -> str:
        return self.url

    def as_posix(self) -> str:
        return self.url

    def is_file(self) -> bool:
        with explained(self.url):
            try:
                return self._system.info(self._place)["type"] == "file"
            except FileNotFoundError:
                return False

    @property
    def size(self) -> int:
        if self._size is None:
            with explained(self.url):
                self._size = int(self._system.info(self._place)["size"])
        return self._size

    def open(self) -> io.BufferedReader:
        """A seekable stream that buffers one range of `RANGE_BYTES` at a time."""
        return io.BufferedReader(_Ranges(self), RANGE_BYTES)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, which must exist."""
        with explained(self.url):
            data = self._system.cat_file(self._place, start=start, end=stop)
        if len(data) != stop - start:
            raise BucketError(f"{self.url} gave {len(data)} bytes of {stop - start}")
        return data


class _Ranges(io.RawIOBase):
    """A file read by ranges; `io.BufferedReader` makes them large."""

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._at = 0
        self.name = path.url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, self._path.size)
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._path.size, self._at + len(buffer))
        if stop <= self._at:
            return 0
        data = self._path.read_range(self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)
