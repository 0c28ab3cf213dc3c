"""`racm3 doctor`: what is installed, what is missing and why, and a short self-test."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "note", "problem"]

_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "tokenizers",
    "safetensors",
    "numpy",
)
_MIN_FREE_GB = 5.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      name: what was looked at.
      verdict: "problem" prevents the main job, "note" concerns something optional.
      words: what was found, and what to do about it.
    """

    name: str
    verdict: Verdict
    words: str


def examine(workdir: str | Path = ".", *, self_test: bool = True) -> Iterator[Finding]:
    """Yields findings one by one, quick checks first.

    Args:
      workdir: where results would be written.
      self_test: retrieve and generate on this machine, about 10 seconds.
    """
    checks: list[Callable[[], Finding]] = [
        _check_python,
        *(lambda name=name: _check_library(name) for name in _LIBRARIES),
        _check_search,
        _check_java,
        lambda: _check_disk(Path(workdir)),
        _check_memory,
        _check_processes,
        _check_devices,
        _check_shipped,
    ]
    if self_test:
        checks.append(_run_self_test)
    for check in checks:
        try:
            yield check()
        except Exception as error:  # noqa: BLE001, reports any failure
            name = getattr(check, "__name__", "check").strip("_").replace("_", " ")
            yield Finding(name, "problem", f"{type(error).__name__}: {error}")


def _check_python() -> Finding:
    version = platform.python_version()
    words = f"{version} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "problem", f"{words}; racm3_jax needs 3.11 to 3.13")
    return Finding("Python", "ok", words)


def _check_library(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "problem", "not installed: pip install -e .")


def _check_search() -> Finding:
    """Optional search libraries; one is enough."""
    from racm3_jax.index import registry

    found, missing = [], []
    for kind, entry in registry.TABLE.items():
        if entry.library is not None:
            try:
                registry.get_backend(kind).import_library()
                found.append(kind)
            except ImportError as error:
                missing.append(str(error))
    if found:
        return Finding("search", "ok", ", ".join([*found, "exact"]))
    words = "; ".join([*missing, "memories use the exact index instead"])
    return Finding("search", "note", words)


def _check_java() -> Finding:
    path = shutil.which("java")
    if path is None:
        words = "not found: caption scores omit METEOR and SPICE"
        return Finding("Java", "note", words)
    return Finding("Java", "ok", path)


def _check_disk(workdir: Path) -> Finding:
    existing = next(
        p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(existing).free / 1e9
    words = f"{free:,.1f} GB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "problem", f"{existing} cannot be written to")
    if free < _MIN_FREE_GB:
        return Finding("disk", "problem", f"{words}: less than {_MIN_FREE_GB:g} GB")
    return Finding("disk", "ok", words)


def _check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding("memory", "ok", f"{total:,.1f} GB, {os.cpu_count()} CPU cores")


def _check_processes() -> Finding:
    """Whether the coordinator of a multi-process training is reachable."""
    address = os.environ.get("RACM3_COORDINATOR", "")
    if not address:
        words = "one (RACM3_COORDINATOR is not set)"
        return Finding("processes", "ok", words)
    host, _, port = address.rpartition(":")
    if os.environ.get("RACM3_PROCESS_ID") == "0":
        words = f"this is the coordinator, {address}"
        return Finding("processes", "ok", words)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        words = f"{address} does not answer ({error}): start process 0, open the port"
        return Finding("processes", "problem", words)
    return Finding("processes", "ok", f"{address} answers")


def _check_devices() -> Finding:
    from racm3_jax import sharding

    mesh = sharding.make_mesh()
    device = mesh.devices.flat[0]
    words = f"{mesh.size} x {device.device_kind} ({device.platform})"
    if device.platform == "cpu":
        if shutil.which("nvidia-smi"):
            words += "; there is an NVIDIA GPU: pip install -e '.[gpu]' lets jax use it"
            return Finding("devices", "note", words)
        if importlib.util.find_spec("libtpu"):
            words += "; libtpu is installed, but jax found no TPU"
            return Finding("devices", "note", words)
    return Finding("devices", "ok", words)


def _check_shipped() -> Finding:
    """Whether the shipped weights match their manifest."""
    import hashlib
    import json

    from racm3_jax import wiring

    folder = wiring.resolve("shipped:flagworld")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
            words = f"{name} differs from its manifest: install the package again"
            return Finding("shipped weights", "problem", words)
    total = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    words = f"{len(manifest['files'])} files, {total:.1f} MB, as in their manifest"
    return Finding("shipped weights", "ok", words)


def _run_self_test() -> Finding:
    """Embeds, retrieves and generates with the shipped models."""
    import tempfile

    from racm3_jax import wiring
    from racm3_jax.flagworld import FlagworldConfig, read_flagworld
    from racm3_jax.memory.memory import Memory

    started = time.monotonic()
    directory = wiring.resolve("shipped:flagworld")
    plain = wiring.load_generator(directory, None)
    world = FlagworldConfig(num_nations=0, num_heldout=16, documents_per_heldout=4)
    documents = list(read_flagworld(world, "heldout_memory"))
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory.build(
            documents,
            tokenizer=plain.tokenizer,
            embedder=plain.embedder,
            path=Path(folder) / "memory",
            index="exact",
        )
        generator = wiring.load_generator(directory, memory)
        nation = documents[0].metadata["nation"]
        output = generator.text_to_image(f"the flag of {nation} on the moon")
        found = [d.metadata["nation"] for d in output.retrieved.documents]
        memory.close()
    seconds = time.monotonic() - started
    if nation not in found:
        words = f"queried {nation}, retrieved {', '.join(found)}: please report this"
        return Finding("self-test", "problem", words)
    words = f"memory, retrieval and generation work ({seconds:.1f} s)"
    return Finding("self-test", "ok", words)
