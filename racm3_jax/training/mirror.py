"""A work directory in a bucket: written on this machine, copied there all the time.

    gs://bucket/run/  <- pull at the start, push every half minute and at the end ->  /tmp/…
      config.json  metrics.jsonl  tensorboard/  memory/  model/  …
      checkpoints/2000/  its manifest.json last: without that it is unfinished

Any URL that fsspec knows will do (`gs://` with the package gcsfs, `s3://` with s3fs). Only
what a run needs to go on comes back: of its checkpoints the newest whole one. Processes
of several machines write parts of one checkpoint: they need a file system that they
share, as a mounted bucket is.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from absl import logging

from racm3_jax import storage
from racm3_jax.checkpoints.manifest import MANIFEST_NAME

PUSH_SECONDS = 30.0
_CHECKPOINT = re.compile(r"checkpoints/(\d+)/")
# What is of no use to another machine, or is not whole yet.
_NOT_COPIED = re.compile(
    r"(^|/)(processes/|training\.lock$|quarantine/|[^/]*orbax-checkpoint-tmp)"
)


def is_url(path: object) -> bool:
    """Whether a path names a place in a bucket, also where a `Path` took one slash."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(path)) is not None


def refuse_url(path: object, what: str) -> None:
    """Refuses a URL where files of this machine are wanted.

    Raises:
      ValueError: `path` is one; says what may be a URL.
    """
    if is_url(path):
        raise ValueError(
            f"{path} is a URL, but {what} must be on this machine: copy it here or mount "
            "the bucket (only the --workdir of `racm3 train` may be a URL)"
        )


class Mirror:
    """Keeps a folder of a bucket equal to `folder`, which it makes.

    ```
    with Mirror("gs://bucket/run") as mirror:
        write_into(mirror.folder)
    ```

    Args:
      url: of the folder.
      seconds: between two pushes.

    Attributes:
      url: of the folder.
      folder: where to write; removed at the end, once all of it was copied.

    Raises:
      ValueError: the package that speaks to such buckets is not installed.
    """

    def __init__(self, url: str, seconds: float = PUSH_SECONDS) -> None:
        import fsspec

        self.url = url
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {url}: {error}") from error
        self.folder = Path(tempfile.mkdtemp(prefix="racm3-workdir-"))
        self._seconds = seconds
        # Of every file that is the same here and there: its size and time here.
        self._copied: dict[str, tuple[int, int]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._push_often, daemon=True)

    def __enter__(self) -> Self:
        self.pull()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        self._thread.join()
        try:
            self.push()
        except Exception as error:
            raise OSError(
                f"could not copy all of the work directory to {self.url} ({error}): it "
                f"is kept in {self.folder}"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def pull(self) -> None:
        """Copies what is there into the folder."""
        names = {
            path.removeprefix(self._root).lstrip("/"): path
            for path in self._system.find(self._root)
        }
        steps = [
            int(m[1])
            for m in map(_CHECKPOINT.match, names)
            if m and f"{m[0]}{MANIFEST_NAME}" in names
        ]
        for name, path in sorted(names.items()):
            step = _CHECKPOINT.match(name)
            if _NOT_COPIED.search(name) or (
                step and int(step[1]) != max(steps, default=-1)
            ):
                continue
            local = self.folder / name
            local.parent.mkdir(parents=True, exist_ok=True)
            self._system.get_file(path, str(local))
            self._copied[name] = _stamp(local)

    def push(self) -> None:
        """Copies what changed since the last time, and removes what was removed here.

        Raises:
          OSError: the bucket cannot be written; what was copied stays so.
        """
        # Listed first: what is whole now is whole when its manifest is copied, as the last.
        found = dict(self._list())
        for name in sorted(found, key=lambda n: (n.endswith(MANIFEST_NAME), n)):
            if self._copied.get(name) == found[name]:
                continue
            try:
                self._system.put_file(str(self.folder / name), f"{self._root}/{name}")
            except FileNotFoundError:
                continue  # a checkpoint that made room for a newer one meanwhile
            self._copied[name] = found[name]
        # The manifest first: a checkpoint that loses files is no longer whole.
        gone = self._copied.keys() - found.keys()
        for name in sorted(gone, key=lambda n: (not n.endswith(MANIFEST_NAME), n)):
            self._system.rm_file(f"{self._root}/{name}")
            del self._copied[name]

    def _list(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if _NOT_COPIED.search(name) or storage.is_leftover(path.name):
                continue
            try:
                if path.is_file():
                    yield name, _stamp(path)
            except FileNotFoundError:
                continue

    def _push_often(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self.push()
            except Exception as error:  # noqa: BLE001 (every client has its own)
                logging.warning(
                    "could not copy to %s (%s); tried again", self.url, error
                )


def _stamp(path: Path) -> tuple[int, int]:
    status: Any = path.stat()
    return status.st_size, status.st_mtime_ns
