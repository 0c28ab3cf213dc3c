"""Corrupted checkpoints and full disks: part of experiments/faults.py."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from racm3_jax.checkpoints import Checkpoints, states

STEPS = (2, 4, 6)


def make_state(step: int) -> dict[str, Any]:
    """A state that differs in every leaf from those of other steps."""
    rng = np.random.default_rng(step)
    shapes = {"embedding": (60, 32), "kernel": (32, 128), "bias": (128,)}
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    moments = jax.tree.map(lambda x: x * np.float32(0.1), params)
    state = {"step": np.int32(step), "params": params, "mu": moments}
    return jax.tree.map(jnp.asarray, state)


def is_of(state: Any, step: int) -> bool:
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        state,
        make_state(step),
    )
    return all(jax.tree.leaves(same))


def make_run(folder: Path, keep: int = 3) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, make_state(step), {"step": step})


def _flip(path: Path, rng: random.Random, count: int) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _overwrite(path: Path, rng: random.Random, fill: Callable[[int], bytes]) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    stop = min(len(content), start + 64)
    content[start:stop] = fill(stop - start)
    path.write_bytes(content)


def _keep(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def _older(path: Path) -> Path:
    """The same file of the previous step."""
    run = next(p for p in path.parents if p.name == str(STEPS[-1])).parent
    return run / str(STEPS[-2]) / path.relative_to(run / str(STEPS[-1]))


def _take_older(path: Path) -> None:
    """Replaces the file by an older one of the same name, or any older one."""
    older = _older(path)
    if not older.exists():  # data files have random names
        others = sorted(p for p in older.parent.glob("*") if p.is_file())
        older = others[0] if others else path.parent.parent / "_METADATA"
    path.write_bytes(older.read_bytes() if older.exists() else b"older")


Damage = Callable[[Path, random.Random], None]
# Kinds of damage to one file of the newest step.
DAMAGES: dict[str, Damage] = {
    "one bit flipped": lambda p, r: _flip(p, r, 1),
    "100 bits flipped": lambda p, r: _flip(p, r, 100),
    "last byte missing": lambda p, r: _keep(p, -1),
    "cut in half": lambda p, r: _keep(p, p.stat().st_size // 2),
    "empty": lambda p, r: _keep(p, 0),
    "removed": lambda p, r: p.unlink(),
    "a byte appended": lambda p, r: p.write_bytes(p.read_bytes() + b"\0"),
    "64 bytes of zeros": lambda p, r: _overwrite(p, r, bytes),
    "64 random bytes": lambda p, r: _overwrite(p, r, r.randbytes),
    "replaced by an older one": lambda p, r: _take_older(p),
    "a stray file next to it": lambda p, r: p.with_name("stray").write_bytes(b"x"),
    "its directory removed": lambda p, r: shutil.rmtree(p.parent),
}


def restore_newest(folder: Path) -> tuple[int | None, Any]:
    """(step, state) from which a training would resume; raises what it would raise."""
    with Checkpoints(folder, keep=3) as checkpoints:
        step = checkpoints.latest_good()
        if step is None:
            return None, None
        return step, checkpoints.restore(step, make_state(0))[0]


def judge(folder: Path) -> str:
    """What a training finds in `folder`: "right", "wrong" (silently), or "error"."""
    try:
        step, state = restore_newest(folder)
    except Exception:  # noqa: BLE001  any error is reported, as required
        return "error"
    return "right" if step is not None and is_of(state, int(state["step"])) else "wrong"


@contextlib.contextmanager
def without_manifest() -> Iterator[None]:
    """Disables the guard: trusts the files on disk, as Orbax does."""
    with mock.patch.object(states, "verify_manifest", lambda directory: None):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def run_corruptions(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Every kind of damage to every kind of file; with and without the manifest.

    Returns:
      Counts of "right" (the previous step was restored, bit for bit), "error" and
      "wrong", with the manifest and without it.
    """
    rng = random.Random(seed)
    make_run(folder / "base")
    newest = folder / "base" / str(STEPS[-1])
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    # The large data files first, whose damage is the hardest to detect.
    files.sort(key=lambda name: -(newest / name).stat().st_size)
    pairs = list(itertools.product(files, DAMAGES))
    # Each kind in turn, each time on another file.
    kinds = list(DAMAGES)
    chosen = [
        (files[(i // len(kinds) + i) % len(files)], kinds[i % len(kinds)])
        for i in range(min(count, len(pairs)))
    ]
    found = {"guarded": collections.Counter(), "unguarded": collections.Counter()}
    with _quiet():
        for number, (name, kind) in enumerate(chosen):
            copy = folder / f"copy{number}"
            shutil.copytree(folder / "base", copy)
            DAMAGES[kind](copy / str(STEPS[-1]) / name, rng)
            twin = folder / f"twin{number}"
            shutil.copytree(copy, twin)
            found["guarded"][judge(copy)] += 1
            with without_manifest():
                found["unguarded"][judge(twin)] += 1
            shutil.rmtree(copy)
            shutil.rmtree(twin)
    return {
        "corruptions": len(chosen),
        "kinds": len({kind for _, kind in chosen}),
        "files": len({name for name, _ in chosen}),
        "fell_back_bit_for_bit": found["guarded"]["right"],
        "errors": found["guarded"]["error"],
        "silent_wrong_restores": found["guarded"]["wrong"],
        "without_manifest_silent_wrong": found["unguarded"]["wrong"],
        "without_manifest_errors": found["unguarded"]["error"],
    }


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A separate disk of 4 MB if mounting is allowed; yields whether it is."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = False
    if os.geteuid() == 0 and shutil.which("mount"):
        mounted = not subprocess.run(
            command, capture_output=True, check=False
        ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


@contextlib.contextmanager
def _no_room(folder: Path, mounted: bool, free: int) -> Iterator[None]:
    """In this context, writes fail after about `free` bytes."""
    if mounted:
        filler = folder / "filler"
        room = shutil.disk_usage(folder).free
        filler.write_bytes(bytes(max(0, room - free)))
        try:
            yield
        finally:
            filler.unlink()
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_full_disks(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Disks that are full at some byte of a save; half of the runs keep only one step.

    Returns:
      Numbers of saves that failed, reported it, and kept the last good step.
    """
    rng = random.Random(seed)
    found = collections.Counter()
    with _quiet(), _small_disk(folder / "disk") as mounted:
        for number in range(count):
            run = folder / "disk" / f"run{number}"
            keep = 1 + number % 2
            with Checkpoints(run, keep=keep) as checkpoints:
                checkpoints.save(STEPS[0], make_state(STEPS[0]), {"step": STEPS[0]})
            used = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
            free = int(used * rng.random() * (1.0 if mounted else 0.6))
            failed = False
            with _no_room(folder / "disk", mounted, free):
                checkpoints = Checkpoints(run, keep=keep)
                try:
                    checkpoints.save(STEPS[1], make_state(STEPS[1]), {"step": STEPS[1]})
                    checkpoints.wait()
                except Exception:  # noqa: BLE001  of any kind
                    failed = True
                # The step from which Orbax alone would have resumed.
                named = checkpoints._manager.latest_step()
                with contextlib.suppress(Exception):
                    checkpoints.close()
            found["failed and said so"] += failed
            found["Orbax lost it"] += failed and named != STEPS[0]
            expected = STEPS[0] if failed else STEPS[1]
            step, state = restore_newest(run)
            found["last good kept"] += step == expected and is_of(state, expected)
            with Checkpoints(run, keep=keep) as checkpoints:  # space again: resumes
                checkpoints.save(STEPS[2], make_state(STEPS[2]), {"step": STEPS[2]})
                found["goes on"] += checkpoints.latest_good() == STEPS[2]
            shutil.rmtree(run)
    return {
        "disk_full": count,
        "means": "a tmpfs that is full" if mounted else "a limit of the file size",
        "failed_and_said_so": found["failed and said so"],
        "last_good_kept": found["last good kept"],
        "goes_on_with_room": found["goes on"],
        "orbax_alone_lost_it": found["Orbax lost it"],
    }
