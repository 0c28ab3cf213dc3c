"""The checkpoints of a run in a bucket; several processes write parts of each.

    checkpoints/2000/  state/ extra/           files of all processes
                       parts/1f3a-0001.json    what process 1 wrote, after that
                       manifest.json           by process 0, when all parts are there

Each process saves to its own folder (Orbax's mode for machines without a shared disk),
uploads its files and then their list. A checkpoint without a manifest is unfinished and
is never read; otherwise only the files in the manifest are read. So no renames are
needed, which buckets do not have, and leftovers of crashed processes are harmless.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from racm3_jax import storage
from racm3_jax.buckets import Bucket, each
from racm3_jax.checkpoints import manifest as manifest_lib
from racm3_jax.checkpoints.manifest import MANIFEST_NAME

# Zarr chunks, written by every process; process 0 uploads everything else.
_OF_ALL = re.compile(r"state/(?:.+/\d+(?:\.\d+)*|array_metadatas/[^/]+)")
_WHOLE = re.compile(rf"(\d+)/{re.escape(MANIFEST_NAME)}")
_DAMAGED_NAME = f"{MANIFEST_NAME}.damaged"
_DAMAGED = re.compile(rf"(\d+)/{re.escape(_DAMAGED_NAME)}")
_POLL_SECONDS = 1.0


class BucketSteps:
    """The folder `checkpoints` of a run in a bucket.

    Args:
      bucket: that folder.
      directory: of this process; one folder per step.
      index: of this process.
      count: number of processes.
      attempt: equal in all processes of this run, different in every other run.
      poll_seconds: polling interval for the other processes.
    """

    def __init__(
        self,
        bucket: Bucket,
        directory: Path,
        *,
        index: int = 0,
        count: int = 1,
        attempt: str = "0",
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self.bucket = bucket
        self.directory = directory
        self._index = index
        self._count = count
        self._attempt = attempt
        self._poll_seconds = poll_seconds

    def steps(self) -> list[int]:
        """The finished steps, oldest first."""
        found = map(_WHOLE.fullmatch, self.bucket.find())
        return sorted(int(m[1]) for m in found if m)

    def publish(
        self, step: int, keep: int, before: Callable[[], None] | None = None
    ) -> None:
        """Uploads this process's files; process 0 returns when the step is finished.

        Args:
          step: saved in `directory`.
          keep: number of finished steps to keep in the bucket.
          before: called by process 0 before the step is marked as finished.

        Raises:
          OSError: the bucket cannot be written.
        """
        folder = self.directory / str(step)
        names = [
            name
            for name in storage.list_files(folder)
            if name != MANIFEST_NAME and (self._index == 0 or _OF_ALL.fullmatch(name))
        ]
        files = storage.describe_files(folder, names)
        each(lambda name: self.bucket.put(f"{step}/{name}", folder / name), names)
        if self._index != 0:
            data = json.dumps({"files": files}).encode()
            self.bucket.write(self._part(step, self._index), data)
            return
        for index in range(1, self._count):
            files |= self._read_part(step, index)
        if before is not None:
            before()
        self.bucket.write(f"{step}/{MANIFEST_NAME}", manifest_lib.encode(files))
        self.bucket.remove(f"{step}/{_DAMAGED_NAME}")
        self._prune(keep)

    def _part(self, step: int, index: int) -> str:
        return f"{step}/parts/{self._attempt}-{index:04d}.json"

    def _read_part(self, step: int, index: int) -> Mapping[str, Any]:
        """Waits for another process's part; if that dies, JAX ends this one, too."""
        while True:
            try:
                return json.loads(self.bucket.read(self._part(step, index)))["files"]
            except FileNotFoundError:
                time.sleep(self._poll_seconds)

    def _prune(self, keep: int) -> None:
        """Removes older steps, finished or not, except damaged ones.

        A manifest is removed before its files.
        """
        found = sorted(self.bucket.find(), key=lambda n: not _WHOLE.fullmatch(n))
        whole = sorted(int(m[1]) for m in map(_WHOLE.fullmatch, found) if m)
        kept = set(whole[-keep:])
        kept |= {int(m[1]) for m in map(_DAMAGED.fullmatch, found) if m}
        for name in found:
            step = name.partition("/")[0]
            if step.isdecimal() and int(step) < whole[-1] and int(step) not in kept:
                self.bucket.remove(name)

    def fetch(self, step: int) -> str | None:
        """Downloads a finished step to `directory` and verifies it.

        Returns:
          What is wrong with it, or None.

        Raises:
          OSError: the bucket cannot be read.
        """
        folder = self.directory / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        storage.write_file(
            folder / MANIFEST_NAME, self.bucket.read(f"{step}/{MANIFEST_NAME}")
        )
        try:
            record = manifest_lib.read_manifest(folder)
            assert record is not None
            each(
                lambda name: self.bucket.get(f"{step}/{name}", folder / name),
                record["files"],
            )
        except (manifest_lib.CheckpointError, FileNotFoundError) as error:
            return str(error)
        return manifest_lib.verify_manifest(folder)

    def set_aside(self, step: int) -> None:
        """Marks a damaged step as unfinished; its files stay for inspection."""
        data = self.bucket.read(f"{step}/{MANIFEST_NAME}")
        self.bucket.write(f"{step}/{_DAMAGED_NAME}", data)
        self.bucket.remove(f"{step}/{MANIFEST_NAME}")
