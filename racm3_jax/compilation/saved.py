"""Saved training steps: `racm3 estimate --save`, `racm3 train --compiled`.

    line 1     description: sealed JSON (versions, devices, program, config)
    the rest   the executable from XLA; its sha256 is in line 1

No pickle: shapes and trees come from the training that opens the file, and the file is
refused unless its program equals that training's, which is traced again (seconds;
compiling takes minutes). The executable is machine code: only run files that you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import racm3_jax
from racm3_jax import storage
from racm3_jax.compilation.programs import trace_step
from racm3_jax.training.step import TrainStep

FORMAT = "racm3_jax compiled training step, 1"
_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
    "cpu": (),
}


class CompiledFileError(ValueError):
    """Not a compiled step, damaged, or of another training."""


def save_step(
    path: pathlib.Path,
    compiled: jax.stages.Compiled,
    traced: jax.stages.Traced,
    mesh: Mesh,
    config: Mapping[str, Any],
) -> int:
    """Writes a compiled training step.

    Args:
      path: replaced if it is already such a file.
      compiled: the step, compiled inside of `without_cache`.
      traced: the traced program it was compiled from.
      mesh: of the compilation.
      config: of the training, as plain values; compared in error messages.

    Returns:
      Bytes of the file.

    Raises:
      CompiledFileError: another kind of file is at `path`.
    """
    if path.exists() and not _is_ours(path):
        raise CompiledFileError(
            f"{path} exists and is not a compiled step: not replaced; give another name"
        )
    executable: Any = compiled.runtime_executable()
    payload = bytes(executable.serialize())
    head = {
        "format": FORMAT,
        "versions": find_versions(mesh),
        "devices": describe_devices(mesh),
        "program": fingerprint(traced),
        "config": json.loads(json.dumps(config, sort_keys=True)),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    line = json.dumps({**head, "sha256": storage.content_digest(head)})
    content = line.encode("ascii") + b"\n" + payload
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_file(path, content)
    return len(content)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compiles without the compilation cache, for saving.

    A CPU executable from JAX's compilation cache lacks its functions when it is
    serialised again, and fails when run.
    """
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def load_step(
    path: pathlib.Path, step: TrainStep, state: Any, batch: Any, config: Mapping
) -> TrainStep:
    """Loads a training step from a file instead of compiling it.

    Args:
      path: written by `save_step`.
      step: of the training; its mesh has attached devices.
      state: its state, real or abstract.
      batch: its batch, abstract.
      config: see `save_step`.

    Returns:
      A step equivalent to `step`.

    Raises:
      CompiledFileError: says what differs, and how to make a new file.
    """
    check_step(path, step.mesh)
    head, payload = _read(path)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    traced = trace_step(step, state, batch)
    if head["program"] != fingerprint(traced):
        raise CompiledFileError(
            f"{path} has another program than this training's: "
            f"{_name_differences(head['config'], config)}; {_REMEDY}"
        )
    run = _Executable(payload, traced, step.mesh)
    return TrainStep(run, step.mesh)


def check_step(path: pathlib.Path, mesh: Mesh) -> None:
    """Refuses a file of other versions or devices, before loading anything else.

    Raises:
      CompiledFileError: see `load_step`.
    """
    head = _read_head(path)
    _check("it was made by", head["versions"], find_versions(mesh), path)
    _check("it was compiled for", head["devices"], describe_devices(mesh), path)


_REMEDY = (
    "make it again with `racm3 estimate --compile --save=FILE`, or remove --compiled"
)


class _Executable:
    """Calls a saved executable like the jitted step."""

    def __init__(self, payload: bytes, traced: Any, mesh: Mesh) -> None:
        self._loaded = _deserialize(payload, list(mesh.devices.flat))
        self._outputs, self._out_tree = jax.tree.flatten(traced.out_info)
        infos = jax.tree.leaves(traced.args_info)
        self._inputs = [(info.shape, info.dtype) for info in infos]

    def __call__(self, state: Any, batch: Any) -> Any:
        leaves = jax.tree.leaves((state, batch))
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if shapes != self._inputs:
            wrong = next(
                f"{a} instead of {b}"
                for a, b in zip(shapes, self._inputs, strict=True)
                if a != b
            )
            raise ValueError(f"the compiled step got an array of {wrong}")
        results = self._loaded.execute_sharded(leaves)
        arrays = results.disassemble_into_single_device_arrays()
        made = [
            jax.make_array_from_single_device_arrays(
                info.shape, info.sharding, shards, dtype=info.dtype
            )
            for info, shards in zip(self._outputs, arrays, strict=True)
        ]
        return jax.tree.unflatten(self._out_tree, made)


def _deserialize(payload: bytes, devices: Sequence[Any]) -> Any:
    from jaxlib import xla_client

    try:
        return devices[0].client.deserialize_executable(
            payload, executable_devices=xla_client.DeviceList(tuple(devices))
        )
    except jax.errors.JaxRuntimeError as error:
        words = " ".join(str(error).split())[:300]
        raise CompiledFileError(
            f"these devices cannot load the executable: {words}; {_REMEDY}"
        ) from None


def find_versions(mesh: Mesh) -> dict[str, str]:
    """Versions on which an executable depends."""
    platform = mesh.devices.flat[0].platform
    found = {"racm3_jax": racm3_jax.__version__}
    for name in ("jax", "jaxlib", *_COMPILERS.get(platform, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_devices(mesh: Mesh) -> dict[str, Any]:
    """Kind, number, mesh, and position of each device of the mesh in its torus."""
    devices = list(mesh.devices.flat)
    places = [
        [*map(int, device.coords), int(getattr(device, "slice_index", 0) or 0)]
        for device in devices
        if getattr(device, "coords", None) is not None
    ]
    return {
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "number": len(devices),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "places": places,
    }


def fingerprint(traced: Any) -> str:
    """The sha256 of a program: operations, and shapes and shardings of arguments."""
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
    arguments = [
        f"{info.shape} {np.dtype(info.dtype).name} {_spec(info)}"
        for info in jax.tree.leaves((traced.args_info, traced.out_info))
    ]
    return hashlib.sha256("\n".join([text, *arguments]).encode()).hexdigest()


def _spec(info: Any) -> str:
    return str(getattr(getattr(info, "sharding", None), "spec", ""))


def _check(words: str, stored: Mapping, own: Mapping, path: pathlib.Path) -> None:
    for name in {**stored, **own}:
        if stored.get(name) == own.get(name):
            continue
        if name == "places":
            raise CompiledFileError(
                f"{path}: {words} the same devices in another order or topology: give "
                f"estimate the --topology of this machine and {_REMEDY}"
            )
        raise CompiledFileError(
            f"{path}: {words} {name} {stored.get(name)}, here is {own.get(name)}; "
            f"{_REMEDY}"
        )


def _name_differences(stored: Mapping, own: Mapping) -> str:
    """The settings in which two configs differ, or that the code differs."""
    own = json.loads(json.dumps(own, sort_keys=True))
    before, now = _flatten(stored), _flatten(own)
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    if not names:
        return "the configs are equal, so the code has changed"
    listed = "; ".join(
        f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names[:3]
    )
    return f"{listed}" + (f" ({len(names)} differences)" if len(names) > 3 else "")


def _flatten(section: Any, name: str = "config") -> dict[str, Any]:
    if not isinstance(section, Mapping):
        return {name: section}
    return {
        inner: value
        for key, part in section.items()
        for inner, value in _flatten(part, f"{name}.{key}").items()
    }


def _is_ours(path: pathlib.Path) -> bool:
    try:
        _read_head(path)
    except CompiledFileError:
        return False
    return True


def _read_head(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise CompiledFileError(
            f"there is no file {path}: racm3 estimate --compile --save={path} makes it"
        )
    with open(path, "rb") as file:
        line = file.readline(1 << 22)
    try:
        head = json.loads(line)
        seal = head.pop("sha256")
        is_format = head["format"] == FORMAT
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CompiledFileError(
            f"{path} is not a compiled step of racm3_jax: {_REMEDY}"
        ) from None
    if not is_format:
        raise CompiledFileError(
            f"{path} is a {head['format']!r}, this version reads {FORMAT!r}: {_REMEDY}"
        )
    if seal != storage.content_digest(head):
        raise CompiledFileError(f"{path} is damaged: {_REMEDY}")
    return head


def _read(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    head = _read_head(path)
    with open(path, "rb") as file:
        file.readline()
        payload = file.read()
    if (
        len(payload) != head["payload_bytes"]
        or hashlib.sha256(payload).hexdigest() != head["payload_sha256"]
    ):
        raise CompiledFileError(f"{path} is damaged or truncated: {_REMEDY}")
    return head, payload
