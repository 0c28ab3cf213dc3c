"""Finished weights: one safetensors file and one JSON file, verified at load."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from racm3_jax.checkpoints.manifest import (
    FORMAT_VERSION,
    CheckpointError,
    write_aside,
)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

STORAGE_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def save_weights(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> str:
    """Writes the weights of one model.

    Other files of the directory are left alone. Both files are written aside and
    renamed, `config.json` last, so an interrupted save is noticed at load.

    Args:
      directory: created when missing.
      params: nested dict of arrays (unboxed).
      kind: what the model is ("vqgan", "clip", "generator"); checked at load.
      config: JSON-serialisable fields that rebuild the module.
      extra: further JSON-serialisable facts (fingerprints, the command that made it).
      dtype: "float16" or "bfloat16" stores float32 tensors at half the size;
        `load_weights` gives float32 back. None keeps every dtype.

    Returns:
      The fingerprint: sha256 over names, dtypes, shapes and bytes as stored.

    Raises:
      CheckpointError: a name or a dtype that cannot be stored.
    """
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise CheckpointError(
            f"cannot store weights as {dtype!r}: choose one of {sorted(STORAGE_DTYPES)}"
        )
    tensors = _flatten(params)
    if dtype is not None:
        tensors = {
            name: t.astype(STORAGE_DTYPES[dtype]) if t.dtype == np.float32 else t
            for name, t in tensors.items()
        }
    fingerprint = compute_fingerprint(tensors)
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": dict(config),
        "extra": dict(extra or {}),
        "storage_dtype": dtype,
        "num_parameters": int(sum(t.size for t in tensors.values())),
        "fingerprint": fingerprint,
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_aside(directory / WEIGHTS_NAME, safetensors.numpy.save(tensors))
    write_aside(directory / CONFIG_NAME, text.encode())
    return fingerprint


def round_to_half(params: Any) -> Any:
    """float32 parameters with float16's precision.

    Models that others are trained on top of (tokenizers, encoders) are rounded before
    they are used, so that storing them at half size changes nothing afterwards.
    """
    return jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32), params
    )


def load_weights(
    directory: str | os.PathLike[str], kind: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote, and verifies it.

    Args:
      directory: the directory given to `save_weights`.
      kind: the kind that is wanted, or None for any.

    Returns:
      (params, config, extra): params is a nested dict of NumPy arrays; tensors that
      were stored at half size are float32 again.

    Raises:
      CheckpointError: missing files, another kind, or damaged content.
    """
    directory = Path(directory)
    record = read_config(directory)
    if kind is not None and record["kind"] != kind:
        raise CheckpointError(
            f"{directory} holds weights of a {record['kind']!r}, not of a {kind!r}: "
            "point to the other directory"
        )
    try:
        tensors = _deserialize((directory / WEIGHTS_NAME).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: copy the "
            "directory again"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME} is truncated or damaged ({error}): copy it "
            "again"
        ) from None
    if compute_fingerprint(tensors) != record["fingerprint"]:
        raise CheckpointError(
            f"the checksum of {directory / WEIGHTS_NAME} differs from the one in "
            f"{CONFIG_NAME}: the weights are damaged or of another save; copy the "
            "directory again"
        )
    storage_dtype = record["storage_dtype"]
    if storage_dtype is not None:
        narrow = STORAGE_DTYPES[storage_dtype]
        tensors = {
            name: t.astype(np.float32) if t.dtype == narrow else t
            for name, t in tensors.items()
        }
    return _unflatten(tensors), record["config"], record["extra"]


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The whole `config.json` of a weights directory, without reading the weights.

    Raises:
      CheckpointError: no such directory, or not a weights directory.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        problem = "has no" if path.parent.is_dir() else "does not exist: no"
        raise CheckpointError(
            f"{path.parent} {problem} {CONFIG_NAME}; give a directory that "
            "save_weights wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): copy the directory again"
        ) from None
    missing = {"kind", "config", "extra", "storage_dtype", "fingerprint"} - set(record)
    if missing:
        raise CheckpointError(
            f"{path} lacks {sorted(missing)}; give a directory that save_weights wrote"
        )
    return record


def compute_fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over the sorted names with dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        shape = ",".join(map(str, tensors[name].shape))
        digest.update(f"{name}\0{tensor.dtype.name}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise CheckpointError(
                f"parameter name {prefix + str(key)!r} cannot be stored: names are "
                "non-empty strings without '/'"
            )
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
            continue
        array = np.asarray(value)
        if array.dtype == object:
            raise CheckpointError(
                f"parameter {prefix + key!r} is a {type(value).__name__}, not an "
                "array: unbox the parameters before saving"
            )
        flat[prefix + key] = np.asarray(array, order="C")
    return flat


def _deserialize(content: bytes) -> dict[str, np.ndarray]:
    # safetensors.numpy.load does not know bfloat16.
    return {
        name: np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in safetensors.deserialize(content)
    }


def _unflatten(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(tensors):
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensors[name]
    return tree
