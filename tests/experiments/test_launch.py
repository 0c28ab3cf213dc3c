"""The launch scripts: checked by a shell, and run without a cloud."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAIN = [
    "--config=configs/racm3_2b7.py",
    "--workdir=/mnt/shared/a b",
    '--config.model.remat="full"',
]


def launch(name, *arguments, **variables):
    return subprocess.run(
        [LAUNCH / name, *arguments],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_is_one_for_each_kind_of_machine():
    assert [p.name for p in SCRIPTS] == ["gke_tpus.sh", "slurm_gpus.sh", "tpu_pod.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_syntax_is_valid(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", path], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_without_arguments_it_prints_its_usage(path):
    done = launch(path.name)
    assert done.returncode == 2
    assert f"experiments/launch/{path.name}" in done.stdout
    assert "DRY_RUN=1" in done.stdout and "set -" not in done.stdout


def test_a_tpu_pod():
    done = launch("tpu_pod.sh", "pod", "us-east5-a", "v5p-128", *TRAIN, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    create, copy, ssh = map(shlex.split, done.stdout.splitlines())
    assert (
        "--accelerator-type=v5p-128" in create and "--version=v2-alpha-tpuv5" in create
    )
    assert (
        all((ROOT / name).exists() for name in copy[-5:-1]) and copy[-1] == "pod:racm3/"
    )
    assert "--worker=all" in ssh
    remote = shlex.split(ssh[-1].removeprefix("--command="))
    assert remote[-5:] == ["racm3", "train", *TRAIN]
    done = launch("tpu_pod.sh", "pod", "zone", "v3-8", *TRAIN, DRY_RUN="1")
    assert done.returncode == 2 and "unknown TPU type v3-8" in done.stderr


def test_gpus_under_slurm(tmp_path):
    done = launch("slurm_gpus.sh", *TRAIN, DRY_RUN="1")
    words = shlex.split(done.stdout)
    assert words[0] == "srun" and words[-5:] == ["racm3", "train", *TRAIN]

    # A training ended by a signal is queued again; any other status ends the job.
    for status, queued in ((75, True), (3, False), (0, False)):
        (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        done = launch(
            "slurm_gpus.sh",
            *TRAIN,
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            SLURM_JOB_ID="7",
        )
        assert done.returncode == (0 if queued else status)
        assert done.stdout == ("requeue 7\n" if queued else "")


def test_tpus_of_kubernetes():
    arguments = ("run", "image:1", "v5p", "4x4x4", *TRAIN)
    done = launch("gke_tpus.sh", *arguments, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(done.stdout)
    assert service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == 16
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "run"
    assert "tpu-v5p-slice" in pod["nodeSelector"].values()
    container = pod["containers"][0]
    assert container["args"] == ["train", *TRAIN]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    done = launch("gke_tpus.sh", "run", "image", "v9", "2x2", *TRAIN)
    assert done.returncode == 2 and "unknown TPU v9" in done.stderr
