"""Objects from a pickle: names, tensors as views of storages, inert records."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from racm3_jax.porting.tensors import MAX_RANK

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A function or class named in a pickle; never imported, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Inert:
    """A call in a pickle that was not executed; its arguments are dropped."""

    what: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes in the archive, with their element type and number."""

    dtype: np.dtype
    key: str
    num_elements: int


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """A view into a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Script(dict[str, Any]):
    """A TorchScript module (OpenAI's CLIP files): its attributes, none of its code."""


def read_storage(identity: Any) -> Storage | Inert:
    kind, dtype, key, _, num_elements = identity
    if kind != "storage" or not isinstance(dtype, Name):
        raise ValueError("an unknown kind of record")
    if not isinstance(key, str) or type(num_elements) is not int or num_elements < 0:
        raise ValueError("a storage without key or size")
    if dtype.name not in STORAGE_DTYPES:
        return Inert(str(dtype))
    return Storage(STORAGE_DTYPES[dtype.name], key, num_elements)


def make_tensor(
    storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> PickledTensor | Inert:
    if isinstance(storage, Inert):
        return storage
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without storage or strides")
    if len(shape) > MAX_RANK:
        raise ValueError(f"a tensor of {len(shape)} axes")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise ValueError("a size, offset or stride that is no number from 0 up")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.num_elements:
        raise ValueError("a tensor that reaches past its storage")
    return PickledTensor(storage, offset, shape, strides)
