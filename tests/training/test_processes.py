"""Joining processes by environment, and the watchdog; two real ones are a slow test."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from racm3_jax.training import processes
from racm3_jax.training.processes import STUCK, Watchdog, join_processes

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_three_variables_name_the_others(monkeypatch):
    given = []
    monkeypatch.setattr(processes, "_initialise", lambda **s: given.append(s))
    join_processes({})
    join_processes({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert given == []
    variables = {
        "RACM3_COORDINATOR": "a:1",
        "RACM3_NUM_PROCESSES": "2",
        "RACM3_PROCESS_ID": "1",
    }
    join_processes(variables)
    join_processes({"SLURM_NTASKS": "4"})
    join_processes({"TPU_WORKER_HOSTNAMES": "a,b"})
    named = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert given == [named, {}, {}]
    del variables["RACM3_PROCESS_ID"]
    with pytest.raises(ValueError, match="RACM3_PROCESS_ID is not"):
        join_processes(variables)


def test_the_watchdog_ends_a_silent_process_and_spares_a_busy_one(capfd):
    ended = []
    with Watchdog(0.4, end=ended.append) as dog:
        for _ in range(8):
            time.sleep(0.1)
            dog.pat()
        assert ended == []
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [STUCK]
    assert "has not ended a step" in capfd.readouterr().err


def test_without_seconds_nobody_watches():
    with Watchdog(0.0) as dog:
        assert not dog._thread.is_alive()


def start(number: int, total: int, port: int, workdir, *flags):
    environment = {
        **os.environ,
        "RACM3_COORDINATOR": f"localhost:{port}",
        "RACM3_NUM_PROCESSES": str(total),
        "RACM3_PROCESS_ID": str(number),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    if total == 1:
        for name in ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID"):
            del environment[name]
    command = [
        *(sys.executable, "-m", "racm3_jax.cli", "train", f"--workdir={workdir}"),
        f"--config={ROOT}/configs/flagworld_tiny.py",
        "--config.pipeline.groups=2",
        *flags,
    ]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT)


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["objective"] for line in lines]


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = [start(0, 1, 0, tmp_path / "one")]
    pair = [start(i, 2, port, tmp_path / "two") for i in range(2)]
    for process in alone + pair:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3
    )
