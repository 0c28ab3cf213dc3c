"""Uploads of visitors: in a private temporary folder with a total limit.

    <temporary>/racm3_demo_x/   one folder per process, only for its user, locked by it

It is deleted when the process ends, also by Ctrl-C or a signal. A killed process leaves
its folder unlocked: the next demo deletes it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from racm3_jax import storage

MAX_TOTAL_BYTES = 128 << 20
MAX_TOTAL_PIXELS = 64_000_000
# Uploads are read immediately; older files can be deleted.
_READ_AFTER_SECONDS = 60.0
# A starting demo may not have locked its folder before this.
_LOCKED_AFTER_SECONDS = 60.0
_PREFIX = "racm3_demo_"
_ENDING = (signal.SIGTERM, signal.SIGHUP)

Image = UInt8[np.ndarray, "height width 3"]


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder for uploads, deleted at the end; signals end the block, too."""
    delete_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        for number in _ENDING:
            signal.signal(number, _leave)
        with storage.locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def delete_abandoned() -> None:
    """Deletes the folders of this user's killed demos."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        state = folder.stat()
        is_new = time.time() - state.st_mtime < _LOCKED_AFTER_SECONDS
        if state.st_uid != os.getuid() or is_new:
            continue
        with storage.locked(folder, wait=False) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)


class UploadFolder:
    """Counts the bytes in a folder and of uploads in progress.

    Args:
      folder: where the page's server writes uploads.
      max_bytes: of all of them.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.arriving = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether `num_bytes` more fit; if not, first deletes files that were read."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        found = []
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime, state.st_size, path))
        total = self.arriving + num_bytes + sum(size for _, size, _ in found)
        for written, size, path in sorted(found):
            if total <= self.max_bytes or time.time() - written < _READ_AFTER_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= self.max_bytes


class _TooMuch(Exception):
    """The rest of an upload is not read."""


class UploadLimit:
    """ASGI middleware: refuses uploads that exceed the folder's limit."""

    def __init__(self, app: Any, uploads: UploadFolder) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and not self.uploads.has_room(int(announced)):
            await refuse(send, 413, "the demo has too many uploads: try again later")
            return
        taken = 0

        async def receive_counted() -> Any:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            if size and not self.uploads.has_room(size):
                raise _TooMuch
            taken += size
            self.uploads.arriving += size
            return message

        has_answered = False

        async def send_noted(message: Any) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            await self.app(scope, receive_counted, send_noted)
        except _TooMuch:
            if not has_answered:
                words = "the demo has too many uploads: try again later"
                await refuse(send, 413, words)
        finally:
            self.uploads.arriving -= taken


async def refuse(send: Any, status: int, words: str) -> None:
    """Answers a request with a message."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{words}\n".encode()})


class KeptPixels:
    """Counts the pixels of all live images of visitors."""

    def __init__(self, max_pixels: int = MAX_TOTAL_PIXELS) -> None:
        self.max_pixels = max_pixels
        self._num_pixels = 0
        self._forgotten: collections.deque[int] = collections.deque()
        self._lock = threading.Lock()

    def keep(self, image: Image) -> Image:
        """The image itself, counted until it is garbage-collected.

        Raises:
          ValueError: the total is too large.
        """
        size = image.shape[0] * image.shape[1]
        with self._lock:
            while self._forgotten:
                self._num_pixels -= self._forgotten.popleft()
            if self._num_pixels + size > self.max_pixels:
                raise ValueError(
                    "the demo has too many images of its visitors: close other "
                    "pages of it, or try again later"
                )
            self._num_pixels += size
        # Called by the garbage collector in any thread: it must not wait for a lock.
        weakref.finalize(image, self._forgotten.append, size)
        return image
