"""Joining processes by environment, and the watchdog; a slow test has two real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from joined_processes import ROOT, free_port, started_together

from racm3_jax.training import processes
from racm3_jax.training.processes import (
    STUCK,
    ProcessHeartbeats,
    Watchdog,
    join_processes,
)


class FakeCluster:
    """An environment with a number of processes, or none."""

    def __init__(self, name, count):
        self.__name__ = name
        self.count = count

    def is_env_present(self):
        return self.count > 0

    def get_process_count(self):
        return self.count


@pytest.fixture
def given(monkeypatch):
    """The settings of every joining."""
    found = []
    monkeypatch.setattr(processes, "_initialise", lambda **s: found.append(s))
    return found


LIMITS = {
    "initialization_timeout": 300,
    "heartbeat_timeout_seconds": 100,
    "shutdown_timeout_seconds": 100,
}


def test_three_variables_describe_the_job(given):
    clusters = [FakeCluster("SlurmCluster", 4)]
    variables = {
        "RACM3_COORDINATOR": "a:1",
        "RACM3_NUM_PROCESSES": "2",
        "RACM3_PROCESS_ID": "1",
    }
    join_processes(variables, clusters)
    named = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert given == [named | LIMITS]
    join_processes(
        variables | {"RACM3_HEARTBEAT_SECONDS": "7", "RACM3_JOIN_SECONDS": "9"},
        clusters,
    )
    assert list(given[-1].values())[-3:] == [9, 7, 7]
    with pytest.raises(
        ValueError, match="RACM3_JOIN_SECONDS is '0.5': give an integer"
    ):
        join_processes(variables | {"RACM3_JOIN_SECONDS": "0.5"}, clusters)
    del variables["RACM3_PROCESS_ID"]
    with pytest.raises(ValueError, match="RACM3_PROCESS_ID is not"):
        join_processes(variables, clusters)
    join_processes({"RACM3_NUM_PROCESSES": "1"}, clusters)
    assert len(given) == 2


@pytest.mark.parametrize(
    ("clusters", "joins", "words"),
    [
        ([("SlurmCluster", 0), ("GceTpuCluster", 0)], False, "no cluster"),
        ([("SlurmCluster", 4), ("GceTpuCluster", 8)], True, "SLURM"),
        ([("SlurmCluster", 0), ("GceTpuCluster", 8)], True, "a TPU pod (GCE)"),
        ([("GkeTpuCluster", 1)], False, "a TPU pod (GKE)"),
        ([("K8sCluster", 4)], False, "no cluster"),  # a separate pod
        ([("NewCluster", 2)], True, "NewCluster"),
    ],
)
def test_the_first_cluster_that_jax_finds_is_joined_and_named(
    given, capsys, clusters, joins, words
):
    join_processes({}, [FakeCluster(*c) for c in clusters])
    assert given == [LIMITS] * joins
    said = f"racm3: process 0 of 1 ({words})\n"
    assert capsys.readouterr().err == ("" if words == "no cluster" else said)


def test_pods_of_an_indexed_job_are_joined_or_explained(given):
    job = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    join_processes(job, [FakeCluster("K8sCluster", 4)])
    assert given == [LIMITS]
    with pytest.raises(ValueError, match=r"this is pod 3 .* pip install \"jax\[k8s\]"):
        join_processes(job, [FakeCluster("K8sCluster", 0)])  # the package is missing
    join_processes(job | {"RACM3_NUM_PROCESSES": "1"}, [])
    assert len(given) == 1


def test_the_clusters_are_those_that_jax_knows(monkeypatch):
    clusters = {c.__name__: c for c in processes._list_clusters()}
    assert set(processes._NAMES) <= set(clusters)
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "a",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    found = processes._find_cluster({}, list(clusters.values()))
    assert found is not None and found.__name__ == "SlurmCluster"
    assert found.get_process_count() == 4


def test_the_watchdog_ends_a_silent_process_and_not_a_busy_one(capfd):
    ended = []
    with Watchdog(0.4, end=ended.append) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.heartbeat()
        assert ended == []
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [STUCK]
    assert "has not finished a step" in capfd.readouterr().err


def test_the_first_step_may_take_longer():
    ended = []
    with Watchdog(0.2, end=ended.append):
        time.sleep(0.5)
        assert ended == []


def test_a_silent_or_lagging_peer_is_named(tmp_path):
    own, late, silent = (ProcessHeartbeats(tmp_path / "p", i, 3) for i in range(3))
    own.beat("computes step 3")
    late.beat("reads the batch of step 3")
    silent.beat("computes step 2")
    alive = threading.Timer(0.05, late.beat, ["reads the batch of step 3"])
    alive.start()
    found = own.find_stalled(0.3, "computes step 3")
    assert found == "process 2 is not responding (last heartbeat: computes step 2)"
    for peer, activity in (
        (late, "reads the batch of step 3"),
        (silent, "computes step 3"),
    ):
        threading.Timer(0.05, peer.beat, [activity]).start()
    found = own.find_stalled(0.3, "computes step 3")
    assert found == "process 1 reads the batch of step 3"


def test_without_seconds_there_is_no_watchdog():
    with Watchdog(0.0) as watchdog:
        assert not watchdog._thread.is_alive()


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
        "--config.pipeline.groups=4",
        *flags,
    ]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT)


# Shards a batch of 8 numbered rows, and prints the rows of its devices.
SHARDING = """
from racm3_jax.training.processes import join_processes
join_processes()
import sys
import jax, numpy as np
from racm3_jax import sharding
for sizes in ((1, 1, 1, 4), (1, 2, 1, 2), (1, 2, 2, 1), (2, 1, 1, 2)):
    devices = np.array(jax.devices())[[0, 2, 1, 3]]  # neighbours are on two processes
    mesh = jax.sharding.Mesh(devices.reshape(sizes), sharding.MESH_AXES)
    rows = sharding.local_rows(mesh, 8)
    batch = sharding.shard_batch({"x": np.stack([rows, rows], 1)}, mesh)["x"]
    held = [int(x) for s in batch.addressable_shards for x in s.data[:, 0]]
    wanted = [
        int(x)
        for s in batch.addressable_shards
        for x in range(8)[s.index[0]]
    ]
    assert batch.shape == (8, 2) and held == wanted, (sizes, batch.shape, held, wanted)
"""


# Trains a number that increases until it is stopped; prints the step of its checkpoint.
STOPPING = """
from racm3_jax.training.processes import join_processes
join_processes()
import itertools, time, types
import jax, jax.numpy as jnp
from racm3_jax.training.loop import FitSettings, fit
from racm3_jax.training.step import TrainState
def step_fn(state, batch):
    time.sleep(0.02)
    return state.replace(step=state.step + 1), {"objective": (1.0, 1.0)}
class Saver:
    def should_save(self, step):
        if step == 5:
            print("started", flush=True)
        return False
    def save(self, step, state, extra=None):
        print("saved", step, flush=True)
    def wait(self):
        pass
state = TrainState(step=jnp.int32(0), params={}, opt_state={})
fit(state, step_fn, itertools.repeat({}), FitSettings(
    num_steps=5000, log_every=5000, checkpoints=Saver(), progress=False))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number):
    """Long before the next line of the log."""
    with started_together(STOPPING, total=2, devices=1) as running:
        for process in running:
            assert process.stdout.readline() == b"started\n"
        running[1].send_signal(number)
        saved = [process.communicate(timeout=60) for process in running]
    for process, (_, errors) in zip(running, saved, strict=True):
        assert process.returncode == 0, errors.decode()[-2000:]
    steps = [int(output.removeprefix(b"saved ")) for output, _ in saved]
    assert steps[0] == steps[1] < 1000


def test_a_tensor_axis_across_processes_gets_the_same_rows_on_both():
    with started_together(SHARDING, total=2, devices=2) as running:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-2000:]


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["objective"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("total", "mesh"), [(2, (2, 1)), (4, (4, 1)), (2, (1, 2)), (4, (2, 2))]
)
def test_several_processes_give_the_loss_curve_of_one(tmp_path, total, mesh):
    """To 1 in 1000: bfloat16 products of other shapes, sums in another order.

    With a tensor axis, here across processes, two of them make the same rows.
    """
    port = free_port()
    alone = [start(0, 1, 0, tmp_path / "one")]
    flags = [
        f"--config.mesh.{k}={n}" for k, n in zip(("data", "tensor"), mesh, strict=True)
    ]
    several = [
        start(i, total, port, tmp_path / "several", *flags) for i in range(total)
    ]
    for process in alone + several:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()[-2000:]
    np.testing.assert_allclose(
        losses(tmp_path / "several"), losses(tmp_path / "one"), rtol=1e-3
    )


@pytest.mark.slow
def test_faults_in_the_short_form(tmp_path):
    """Five kills, stuck peers, NaN, damage, full disks; and each without its guard."""
    command = [sys.executable, ROOT / "experiments" / "faults.py", "--kills=5"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/faults"],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
