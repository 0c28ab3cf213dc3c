"""Finished weights: one safetensors file and one JSON file, verified on load."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from racm3_jax import storage
from racm3_jax.checkpoints.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CheckpointError,
    read_object,
    sealed_folder,
    verify_folder,
)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Allowed files in folders of format 1, which had no manifest.
_UNSEALED_NAMES = {WEIGHTS_NAME, CONFIG_NAME, "tokenizer.json", MANIFEST_NAME}
_UNSEALED_VERSION = 1
# Types of the required fields of `config.json`.
_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "config": (dict,),
    "extra": (dict,),
    "storage_dtype": (str, type(None)),
    "fingerprint": (str,),
}
_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
}
# Parameter trees are traversed recursively.
_MAX_DEPTH = 50

T = TypeVar("T")

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
    """Writes the weights of one model to a folder of their own, with a manifest.

    Atomic; replaces a folder of the same kind.

    Args:
      directory: created if missing.
      params: nested dict of arrays (unboxed).
      kind: of the model ("vqgan", "clip", "generator"); checked on load.
      config: JSON-serialisable fields that rebuild the module.
      extra: more JSON-serialisable metadata (fingerprints, the command that made it).
      dtype: "float16" or "bfloat16" stores float32 tensors at half the size;
        `load_weights` returns float32. None keeps every dtype.

    Returns:
      The fingerprint: sha256 over names, dtypes, shapes and bytes as stored.

    Raises:
      CheckpointError: a name or a dtype that cannot be stored.
      FileExistsError: `directory` holds something else.
    """
    with weights_folder(directory, kind) as folder:
        return write_weights(
            folder, params, kind=kind, config=config, extra=extra, dtype=dtype
        )


@contextlib.contextmanager
def weights_folder(directory: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """A `sealed_folder` for weights of one kind and their other files."""
    with sealed_folder(
        directory,
        kind,
        overwrite=True,
        is_old=lambda path: _is_unsealed_folder(path, kind),
    ) as folder:
        yield folder


def _is_unsealed_folder(path: Path, kind: str) -> bool:
    try:
        record = _read_record(path)
    except CheckpointError:
        return False
    names = set(storage.list_files(path))
    return record["kind"] == kind and names <= _UNSEALED_NAMES


def write_weights(
    folder: Path,
    params: Mapping[str, Any],
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> str:
    """Writes both files to a folder; the caller writes the manifest."""
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
    (folder / WEIGHTS_NAME).write_bytes(safetensors.numpy.save(tensors))
    write_config(
        folder,
        kind=kind,
        config=config,
        extra=extra,
        storage_dtype=dtype,
        num_parameters=int(sum(t.size for t in tensors.values())),
        fingerprint=fingerprint,
    )
    return fingerprint


def write_config(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    storage_dtype: str | None,
    num_parameters: int,
    fingerprint: str,
) -> None:
    """Writes the `config.json` of a weights folder; the caller writes the manifest."""
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": dict(config),
        "extra": dict(extra or {}),
        "storage_dtype": storage_dtype,
        "num_parameters": num_parameters,
        "fingerprint": fingerprint,
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_bytes(text.encode())


def round_to_half(params: Any) -> Any:
    """Rounds float32 parameters to float16 precision.

    Models on which others are trained (tokenizers, encoders) are rounded before use, so
    that storing them at half size does not change them.
    """
    return jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32), params
    )


def load_weights(
    directory: str | os.PathLike[str], kind: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Loads and verifies weights from `save_weights`.

    Args:
      directory: the directory given to `save_weights`.
      kind: the expected kind, or None for any.

    Returns:
      (params, config, extra): params is a nested dict of NumPy arrays; tensors that
      were stored at half size are float32 again.

    Raises:
      CheckpointError: missing files, another kind, or damaged content.
    """
    directory = Path(directory)
    record = _read_verified(directory, None)
    if kind is not None and record["kind"] != kind:
        raise CheckpointError(
            f"{directory} holds weights of a {record['kind']!r}, not of a {kind!r}: "
            "point to the other directory"
        )
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: copy the "
            "directory again"
        )
    try:
        tensors = _deserialize(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}): copy it again"
        ) from None
    # A manifest covers the bytes already.
    if record["format_version"] == _UNSEALED_VERSION and (
        compute_fingerprint(tensors) != record["fingerprint"]
    ):
        raise CheckpointError(
            f"the checksum of {path} differs from the one in {CONFIG_NAME}: the weights "
            "are damaged or from another save; copy the directory again"
        )
    storage_dtype = record["storage_dtype"]
    if storage_dtype is not None:
        narrow = STORAGE_DTYPES[storage_dtype]
        tensors = {
            name: t.astype(np.float32) if t.dtype == narrow else t
            for name, t in tensors.items()
        }
    return _unflatten(tensors, path), record["config"], record["extra"]


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The whole `config.json` of a weights directory, verified, without the weights.

    Raises:
      CheckpointError: no such directory, not a weights directory, or a damaged one.
    """
    return _read_verified(Path(directory), [CONFIG_NAME])


def _read_verified(directory: Path, only: Sequence[str] | None) -> dict[str, Any]:
    sealed = verify_folder(directory, only)
    record = _read_record(directory)
    if sealed is None and record["format_version"] != _UNSEALED_VERSION:
        raise CheckpointError(
            f"{directory} has no {MANIFEST_NAME}: not all files were copied, or one "
            "of another version was added; copy the directory again"
        )
    return record


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        record = read_object(path, "copy the directory again")
    except FileNotFoundError:
        problem = "has no" if directory.is_dir() else "does not exist: no"
        raise CheckpointError(
            f"{directory} {problem} {CONFIG_NAME}; give a directory that save_weights "
            "wrote"
        ) from None
    missing = {*_FIELDS, "format_version"} - set(record)
    if missing:
        raise CheckpointError(
            f"{path} lacks {sorted(missing)}; give a directory that save_weights wrote"
        )
    for name, types in _FIELDS.items():
        if not isinstance(record[name], types):
            raise CheckpointError(
                f"{path} says {name}={record[name]!r:.80}, which is not a "
                f"{types[0].__name__}: copy the directory again"
            )
    if record["storage_dtype"] not in (None, *STORAGE_DTYPES):
        raise CheckpointError(
            f"{path} says storage_dtype={record['storage_dtype']!r:.80}; known are "
            f"{sorted(STORAGE_DTYPES)}: copy the directory again"
        )
    if record["format_version"] not in (_UNSEALED_VERSION, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format {record['format_version']!r:.80}; this version reads "
            f"formats up to {FORMAT_VERSION}: update racm3_jax"
        )
    return record


def build_config(kind: type[T], fields: Mapping[str, Any], where: Path) -> T:
    """Builds a frozen dataclass from a config file.

    Args:
      kind: the dataclass.
      fields: from the file.
      where: the file or folder, for the error.

    Raises:
      CheckpointError: unknown fields, wrong types, or invalid values.
    """
    assert dataclasses.is_dataclass(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(map(str, fields)) - known)
    if unknown:
        raise CheckpointError(
            f"{where} says {', '.join(unknown[:3])}, which {kind.__name__} does not "
            "have: it is damaged, or of a later version of racm3_jax"
        )
    hints = get_type_hints(kind)
    for name, value in fields.items():
        wanted = hints[name]
        if wanted in _PLAIN and type(value) not in _PLAIN[wanted]:
            raise CheckpointError(
                f"{where} says {name}={value!r:.80}, but {kind.__name__} wants "
                f"{wanted.__name__} there: copy it again"
            )
    try:
        return kind(**fields)  # pyright: ignore[reportReturnType]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{where} is not a valid {kind.__name__} ({error}): copy it again"
        ) from None


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
                f"parameter name {prefix + str(key)!r} cannot be stored: names must be "
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
    # safetensors.numpy.load does not support bfloat16.
    return {
        name: np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in safetensors.deserialize(content)
    }


def _unflatten(tensors: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(tensors):
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents[:_MAX_DEPTH]:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or leaf in node or len(parents) > _MAX_DEPTH:
            raise CheckpointError(
                f"{path} holds {name[:80]!r}, not a name of a parameter: give a "
                "directory that save_weights wrote"
            )
        node[leaf] = tensors[name]
    return tree
