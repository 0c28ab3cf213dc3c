"""Several processes of one `jax.distributed` job: real ones, and threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from racm3_jax import checksums, storage

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started_together(code: str, *arguments, total: int, devices: int):
    """Runs a script in several processes of one job."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={
                **os.environ,
                "RACM3_COORDINATOR": f"localhost:{port}",
                "RACM3_NUM_PROCESSES": str(total),
                "RACM3_PROCESS_ID": str(number),
                "JAX_NUM_CPU_DEVICES": str(devices),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for number in range(total)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


class Reading:
    """Counts hashed bytes by thread."""

    def __init__(self, monkeypatch):
        self.bytes = {}
        self._compute = storage.compute_sha256
        monkeypatch.setattr(storage, "compute_sha256", self._count)

    def _count(self, path):
        own = threading.get_ident()
        self.bytes[own] = self.bytes.get(own, 0) + path.stat().st_size
        return self._compute(path)

    def take(self):
        total = sum(self.bytes.values())
        self.bytes.clear()
        return total


@pytest.fixture
def reading(monkeypatch):
    return Reading(monkeypatch)


@pytest.fixture
def four_hosts(monkeypatch):
    """Calls a function in four threads that act as the processes of a job."""
    number, barrier, held = threading.local(), threading.Barrier(4), [None] * 4

    def gather(values):
        held[number.own] = values
        barrier.wait()
        found = np.stack(held)
        barrier.wait()
        return found

    monkeypatch.setattr(checksums, "_is_alone", lambda: False)
    monkeypatch.setattr(checksums, "_gather", gather)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(number, "own", 0))

    def call(function):
        def as_process(own):
            number.own = own
            return function(own)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(as_process, range(4)))

    return call
