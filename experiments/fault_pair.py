"""Runs and watches two processes of one training: part of experiments/faults.py."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

WORKER = Path(__file__).with_name("fault_worker.py")
SAVE_EVERY = 5
HEARTBEAT, WATCHDOG, JOIN = 10, 30, 60
# Seconds beyond the detection (heartbeat, watchdog, joining), to report and exit.
GRACE = 10
# Imports before joining take long on a busy machine.
IMPORTS = 60
# A step may take long on a busy machine, but a pair silent for this long hangs.
PATIENCE = 400
STUCK = 76
METRICS = "metrics.jsonl"


class PairEnded(RuntimeError):
    """A process ended, or made no progress, without an injected fault."""


@dataclasses.dataclass
class Pair:
    """Two processes of one training; a context manager that stops both at the end."""

    workdir: Path
    flags: list[str]
    heartbeat: int = HEARTBEAT
    processes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.workdir.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            environment = os.environ | {
                "RACM3_COORDINATOR": f"localhost:{port}",
                "RACM3_NUM_PROCESSES": "2",
                "RACM3_PROCESS_ID": str(number),
                "RACM3_HEARTBEAT_SECONDS": str(self.heartbeat),
                "RACM3_JOIN_SECONDS": str(JOIN),
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.workdir.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            with open(self.workdir / f"errors{number}", "ab") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), f"--workdir={self.workdir}"]
                        + self.flags,
                        env=environment,
                        stdout=errors,
                        stderr=errors,
                        start_new_session=True,  # its children are found by it
                    )
                )
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self, number: int, seconds: float) -> tuple[int | None, float]:
        """(exit status, or None if it still runs; seconds waited)."""
        start = time.monotonic()
        try:
            status = self.processes[number].wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        return status, time.monotonic() - start

    def wait_for_lines(self, name: str, count: int) -> None:
        """Waits until a JSONL file has `count` lines.

        Raises:
          PairEnded: a process ended before, or there is no progress.
        """
        deadline = time.monotonic() + PATIENCE
        while len(read_lines(self.workdir / name)) < count:
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise PairEnded(
                    f"{'a process ended' if ended else 'nothing happens'}: "
                    f"{self.errors(0)[-800:]}\n{self.errors(1)[-800:]}"
                )
            time.sleep(0.01)

    def count_orphans(self) -> int:
        """Number of live processes in the sessions of ended ones."""
        ended = {p.pid for p in self.processes if p.poll() is not None}
        found = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            found += int(session) in ended and state != "Z"
        return found

    def errors(self, number: int) -> str:
        return (self.workdir / f"errors{number}").read_text(errors="replace")


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in lines]


def read_losses(workdir: Path) -> list[tuple[int, float]]:
    """All lines ever written: a step that ran twice occurs twice."""
    lines = read_lines(workdir / METRICS)
    return [(line["step"], line["objective"]) for line in lines]
