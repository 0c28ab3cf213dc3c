"""A work directory in a bucket: written locally, synchronised while it runs.

    gs://bucket/run/  <- pull at the start, push every half minute and at the end ->  /tmp/…
      config.json  metrics.jsonl  tensorboard/  memory/  model/  …
      checkpoints/     copied by `checkpoints.bucket`, each when it is complete

Any fsspec URL works (`gs://` with the package gcsfs, `s3://` with s3fs). With several
processes each has its own local folder. Process 0 pushes; the others pull where they
wait for its files (`sharding.leader_first`), and push only their traces.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from absl import logging

from racm3_jax import storage
from racm3_jax.buckets import Bucket, Found, each

PUSH_SECONDS = 30.0
_PREFIX = "racm3-mirror-"
# Useless on another machine, or copied elsewhere.
_NOT_COPIED = re.compile(r"(^|/)(processes/|training\.lock$)|^checkpoints/")
# Written by every process.
_OF_ALL = re.compile(r"profile/")


class Mirror:
    """Keeps a folder of a bucket in sync with a local `folder`, which it creates.

    ```
    with Mirror("gs://bucket/run") as mirror:
        write_into(mirror.folder)
    ```

    Args:
      url: of the folder in the bucket.
      seconds: interval of pushes.
      leads: whether this is process 0.

    Attributes:
      url: of the folder in the bucket.
      bucket: the remote folder.
      folder: the local folder, in TMPDIR; removed at the end, once it is fully copied.

    Raises:
      ValueError: the client package for this kind of bucket is not installed.
      OSError: the bucket cannot be read.
    """

    def __init__(
        self, url: str, seconds: float = PUSH_SECONDS, *, leads: bool = True
    ) -> None:
        self.url = url
        self.bucket = Bucket(url)
        self._held = contextlib.ExitStack()
        self.folder = _make_folder(self._held)
        self._leads = leads
        self._seconds = seconds
        # Local size and time of every file that is the same on both sides.
        self._copied: dict[str, tuple[int, int]] = {}
        self._pulled: dict[str, Found] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._push_often, daemon=True)

    def __enter__(self) -> Self:
        try:
            self.pull()
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        self._thread.join()
        try:
            self.push()
        except Exception as error:
            # Under a name that later runs do not remove.
            kept = self.folder.with_name(f"{self.folder.name}-kept")
            self.folder = self.folder.rename(kept)
            self._held.close()
            raise OSError(
                f"could not copy all of the work directory to {self.url} ({error}): it "
                f"is kept in {kept}"
            ) from error
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def pull(self) -> None:
        """Downloads what is new in the bucket since the last call."""
        found = {
            name: facts
            for name, facts in self.bucket.find().items()
            if not _NOT_COPIED.search(name) and storage.is_inside(name)
        }

        def get(name: str) -> None:
            local = self.folder / name
            self.bucket.get(name, local)
            self._copied[name] = _stamp(local)

        each(get, [n for n in sorted(found) if self._pulled.get(n) != found[n]])
        self._pulled = found

    def push(self) -> None:
        """Uploads what changed since the last call, and removes what was removed here.

        Raises:
          OSError: the bucket cannot be written; files uploaded so far stay there.
        """
        with self._lock:
            found = self._list()

            def put(name: str) -> None:
                try:
                    self.bucket.put(name, self.folder / name)
                except FileNotFoundError:
                    if (self.folder / name).exists():
                        raise
                    return  # replaced or removed meanwhile
                self._copied[name] = found[name]

            changed = [n for n in found if self._copied.get(n) != found[n]]
            each(put, [n for n in changed if not _is_manifest(n)])
            # Manifests last, after all the files that they list.
            each(put, [n for n in changed if _is_manifest(n)])
            gone = self._copied.keys() - found.keys() if self._leads else ()
            for name in sorted(gone, key=lambda n: not _is_manifest(n)):
                self.bucket.remove(name)
                del self._copied[name]

    def _list(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if _NOT_COPIED.search(name) or storage.is_leftover(path.name):
                continue
            if not self._leads and not _OF_ALL.match(name):
                continue
            try:
                if path.is_file():
                    found[name] = _stamp(path)
            except FileNotFoundError:
                continue
        return found

    def _push_often(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self.push()
            except Exception as error:  # noqa: BLE001 (a later push may succeed)
                logging.warning(
                    "could not copy to %s (%s); will retry", self.url, error
                )


def _make_folder(held: contextlib.ExitStack) -> Path:
    """A locked folder; removes those of killed processes (their buckets have all)."""
    top = Path(tempfile.gettempdir())
    for left in top.glob(f"{_PREFIX}*"):
        if not left.name.endswith("-kept"):
            with contextlib.suppress(OSError), storage.locked(left, wait=False) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix="racm3-new-"))
    held.enter_context(storage.locked(new))
    return new.rename(top / f"{_PREFIX}{new.name.rpartition('-')[2]}")


def _is_manifest(name: str) -> bool:
    return name.rpartition("/")[2] == "manifest.json"


def _stamp(path: Path) -> tuple[int, int]:
    status: Any = path.stat()
    return status.st_size, status.st_mtime_ns
