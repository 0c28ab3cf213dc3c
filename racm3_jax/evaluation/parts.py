"""Work in numbered chunks that survive a kill: `workdir/parts/<variant>-<chunk>.npz`.

A finished chunk is one file, written atomically; finished chunks are not computed again.
Process p of n computes the chunks p, p + n, …; chunks do not depend on the process, so any
number of processes gives the same figures. Each file has the settings of its run, and
files of another run are refused.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from racm3_jax import storage

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The chunks of one run.

    Attributes:
      workdir: shared by all processes.
      num_items: of the whole list.
      chunk_size: items in a chunk; part of the settings.
      settings: everything that the figures depend on.
    """

    workdir: Path
    num_items: int
    chunk_size: int
    settings: Mapping[str, Any]

    @property
    def num_chunks(self) -> int:
        return -(-self.num_items // self.chunk_size)

    @property
    def fingerprint(self) -> str:
        text = json.dumps(dict(self.settings), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, variant: str, chunk: int) -> Path:
        return self.workdir / "parts" / f"{variant}-{chunk:05d}.npz"

    def make(
        self,
        variant: str,
        compute: Callable[[range, Any], Arrays],
        *,
        process_index: int = 0,
        process_count: int = 1,
        devices: Sequence[Any] = (None,),
    ) -> int:
        """Computes this process's missing chunks of a variant.

        Args:
          variant: names the files.
          compute: (positions of items, device) -> arrays, one row per item. Called from
            one thread per device, with that device as jax's default.
          process_index: 0 … process_count - 1.
          process_count: processes that share the work directory.
          devices: of this process; None is all that jax finds.

        Returns:
          How many chunks were computed.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index must be in 0..{process_count - 1}; got {process_index}"
            )
        waiting: list[int] = []
        for chunk in range(process_index, self.num_chunks, process_count):
            path = self.path(variant, chunk)
            if path.exists():
                self._read(path)
            else:
                waiting.append(chunk)
        made, lock = len(waiting), threading.Lock()

        def take() -> int | None:
            with lock:
                return waiting.pop(0) if waiting else None

        def work(device: Any) -> None:
            try:
                with jax.default_device(device):
                    while (chunk := take()) is not None:
                        self._make_one(variant, chunk, compute, device)
            except BaseException:
                waiting.clear()  # the other devices stop after their chunk
                raise

        workers = devices[: max(1, made)]
        if len(workers) == 1:
            work(workers[0])  # an interrupt ends it at once
            return made
        with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
            for future in [pool.submit(work, device) for device in workers]:
                future.result()
        return made

    def _make_one(
        self,
        variant: str,
        chunk: int,
        compute: Callable[[range, Any], Arrays],
        device: Any,
    ) -> None:
        start = chunk * self.chunk_size
        items = range(start, min(start + self.chunk_size, self.num_items))
        started = time.monotonic()
        arrays = compute(items, device)
        for name, column in arrays.items():
            if len(column) != len(items):
                raise ValueError(
                    f"{variant}/{name} has {len(column)} rows for {len(items)} items"
                )
        path = self.path(variant, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        named: dict[str, Any] = {**arrays, "fingerprint": self.fingerprint}
        np.savez(stream, **named, seconds=time.monotonic() - started)
        storage.write_file(path, stream.getvalue())

    def wait(self, variants: Sequence[str], log: Callable[[str], None] = print) -> None:
        """Waits for all chunks, also those of other processes."""
        missing = self.missing(variants)
        if missing:
            log(f"waiting for {len(missing)} chunks of the other processes")
        while missing:
            time.sleep(0.5)
            missing = self.missing(variants)

    def missing(self, variants: Sequence[str]) -> list[Path]:
        """Unfinished chunks."""
        paths = [self.path(v, c) for v in variants for c in range(self.num_chunks)]
        return [path for path in paths if not path.exists()]

    def load(self, variant: str) -> dict[str, np.ndarray]:
        """All chunks of a variant, joined in the order of the items."""
        chunks = [self._read(self.path(variant, c)) for c in range(self.num_chunks)]
        return {
            name: np.concatenate([chunk[name] for chunk in chunks])
            for name in chunks[0]
        }

    def read_seconds(self, variant: str) -> float:
        """The total seconds of the chunks of a variant."""
        total = 0.0
        for chunk in range(self.num_chunks):
            with np.load(self.path(variant, chunk), allow_pickle=False) as file:
                total += float(file["seconds"])
        return total

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = dict(file)
                found = str(arrays.pop("fingerprint"))
                arrays.pop("seconds", None)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and run again"
            ) from error
        if found != self.fingerprint:
            raise ValueError(
                f"{path} belongs to a run with other settings, models or data: use "
                "another --workdir, or remove this one"
            )
        return arrays
