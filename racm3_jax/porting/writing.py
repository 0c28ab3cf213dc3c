"""Writes weights one tensor at a time, to a folder that appears atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import racm3_jax
from racm3_jax import storage
from racm3_jax.checkpoints import WEIGHTS_NAME, sealed_folder, write_config
from racm3_jax.checkpoints.weights import SAFETENSORS_DTYPES
from racm3_jax.porting.rules import Rule
from racm3_jax.porting.tensors import (
    PortingError,
    TensorInfo,
    TensorSource,
    read_finite,
)

_HALVES = ("float16", "bfloat16")
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def converted_folder(
    out: str | os.PathLike[str],
    kind: str,
    facts: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Iterator[Path]:
    """A folder to fill, which appears at `out` atomically, with a manifest.

    Args:
      out: new or empty; see `overwrite`.
      kind: of its content.
      facts: source, layout, licence and whether it was acknowledged, for the manifest.
      overwrite: replace a folder of the same kind.

    Raises:
      FileExistsError: `out` exists.
    """
    origin = {"converted_by": f"racm3_jax {racm3_jax.__version__}", **facts}
    with sealed_folder(
        out, kind, overwrite=overwrite, facts={"origin": origin}
    ) as folder:
        yield folder


def convert_weights(
    directory: Path,
    source: TensorSource,
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights for `checkpoints.load_weights`, one tensor at a time.

    float32, float16 and bfloat16 tensors keep their dtype; others become float32, and so
    do all if both half formats occur, because a weights folder has one dtype.

    Args:
      directory: of the result.
      source: the checkpoint, checked by `rules.check_names`.
      rules: one for each of our parameters.
      shapes: of our parameters, from `rules.parameter_shapes`.
      kind: "clip", "vqgan" or "generator".
      config: fields of the model's config.
      extra: more fields of `config.json`.

    Raises:
      PortingError: a tensor with NaN, or a rule that gives a wrong shape.
    """
    by_name = {rule.ours: rule for rule in rules}
    if set(by_name) != set(shapes):
        raise PortingError(
            "the rules do not cover the model: "
            + ", ".join(sorted(set(by_name) ^ set(shapes)))
        )
    found = {source.tensors[rule.theirs].dtype.name for rule in rules}
    halves = [name for name in _HALVES if name in found]
    kept = {"float32", *halves} if len(halves) < 2 else {"float32"}
    plan: dict[str, TensorInfo] = {}
    for name in sorted(by_name):
        dtype = source.tensors[by_name[name].theirs].dtype
        plan[name] = TensorInfo(
            shapes[name], dtype if dtype.name in kept else np.dtype(np.float32)
        )

    def make(name: str) -> np.ndarray:
        rule = by_name[name]
        return rule.form.to_ours(read_finite(source, rule.theirs))

    directory.mkdir(parents=True, exist_ok=True)
    fingerprint = write_safetensors(directory / WEIGHTS_NAME, plan, make)
    write_config(
        directory,
        kind=kind,
        config=config,
        extra=extra,
        storage_dtype=halves[0] if len(halves) == 1 else None,
        num_parameters=sum(math.prod(info.shape) for info in plan.values()),
        fingerprint=fingerprint,
    )


def write_safetensors(
    path: Path,
    plan: Mapping[str, TensorInfo],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Streams tensors to a file, sorted by name.

    Args:
      path: of the file, written atomically.
      plan: shape and dtype of every tensor.
      make: returns the tensor of a name; it is cast to the planned dtype.
      metadata: strings for the header.

    Returns:
      The fingerprint, equal to `checkpoints.compute_fingerprint` of all tensors.

    Raises:
      PortingError: `make` returns another shape than planned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(plan):
        info = plan[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with storage.replacing(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(plan):
            info = plan[name]
            array = make(name)
            if array.shape != info.shape:
                raise PortingError(
                    f"{name} has shape {list(array.shape)}, not {list(info.shape)}: "
                    "the checkpoint is of another model"
                )
            array = np.asarray(array, info.dtype, order="C")
            shape = ",".join(map(str, info.shape))
            digest.update(f"{name}\0{info.dtype.name}\0{shape}\0".encode())
            content = array.reshape(-1).view(np.uint8).data
            del array
            digest.update(content)
            file.write(content)
            del content
    return digest.hexdigest()
