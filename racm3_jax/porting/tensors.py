"""Sources of named tensors, read one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from racm3_jax.checkpoints.weights import SAFETENSORS_DTYPES

# A header has names and shapes; 32 MB are enough for 200,000 tensors.
_MAX_HEADER_BYTES = 32_000_000
_FINITE_CHUNK = 1 << 22
_MAX_SIZE = 1 << 48
MAX_RANK = 8


class PortingError(ValueError):
    """External weights that cannot be used; says what was found and how to fix it."""


@contextlib.contextmanager
def foreign_settings(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns type errors in another project's settings into one readable error."""
    try:
        yield
    except (PortingError, FileNotFoundError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        raise PortingError(
            f"the settings of {where} are damaged or of another kind of model ({e}): "
            "download it again"
        ) from None


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors of one or more files; `read` reads from disk each time."""

    @property
    def where(self) -> str:
        """The file or folder, for error messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        ...


class SafetensorsFile:
    """A `.safetensors` file; its header is checked on opening.

    Args:
      path: of the file.

    Raises:
      PortingError: another kind of file, truncated, or with an invalid header.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.where = str(path)
        num_bytes = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if num_bytes < 8 or length > min(num_bytes - 8, _MAX_HEADER_BYTES):
                raise PortingError(
                    f"{path} is truncated or not a safetensors file (its header would "
                    f"have {length} bytes, the file has {num_bytes}): download it again"
                )
            header = file.read(length)
        self._data_start = 8 + length
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            entries = json.loads(header, object_pairs_hook=_unique)
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                self.tensors[name], self._offsets[name] = _read_entry(name, entry)
            end = self._check_extents()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PortingError(
                f"the header of {path} is damaged or of an unknown dtype ({error}): "
                "download it again"
            ) from None
        except RecursionError:
            raise PortingError(
                f"the header of {path} is damaged (nested too deeply): download it again"
            ) from None
        if self._data_start + end != num_bytes:
            raise PortingError(
                f"{path} is truncated or damaged: its header needs "
                f"{self._data_start + end} bytes and it has {num_bytes}; download it "
                "again"
            )

    def _check_extents(self) -> int:
        """Checks that tensors are contiguous; returns the end of the last one."""
        end = 0
        for name in sorted(self._offsets, key=self._extent):
            start, stop = self._extent(name)
            if start != end:
                raise ValueError(f"{name} overlaps another tensor, or leaves a gap")
            end = stop
        return end

    def _extent(self, name: str) -> tuple[int, int]:
        start = self._offsets[name]
        return start, start + self.tensors[name].num_bytes

    def read(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        content = np.fromfile(
            self.path,
            np.uint8,
            info.num_bytes,
            offset=self._data_start + self._offsets[name],
        )
        return content.view(info.dtype).reshape(info.shape)


def _read_entry(name: str, entry: Mapping[str, Any]) -> tuple[TensorInfo, int]:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if any(
        type(n) is not int or not 0 <= n <= _MAX_SIZE for n in (start, stop, *shape)
    ):
        raise ValueError(f"{name} has an invalid size or offset")
    if len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) > _MAX_SIZE:
        raise ValueError(f"{name} has an invalid shape")
    info = TensorInfo(tuple(shape), SAFETENSORS_DTYPES[entry["dtype"]])
    if stop - start != info.num_bytes:
        raise ValueError(f"the extent of {name} does not match its shape")
    return info, start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


class MergedTensors:
    """Several sources (shards) as one, with unique names.

    Raises:
      PortingError: two sources have a tensor of the same name.
    """

    def __init__(self, where: str, sources: list[TensorSource]) -> None:
        self.where = where
        self._owner: dict[str, TensorSource] = {}
        for source in sources:
            for name in source.tensors:
                if name in self._owner:
                    raise PortingError(
                        f"{name} is in {self._owner[name].where} and in {source.where}: "
                        "pieces of one tensor (tensor parallelism) are not joined; give "
                        "a checkpoint of one piece or of Hugging Face's shards"
                    )
                self._owner[name] = source

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: source.tensors[name] for name, source in self._owner.items()}

    def read(self, name: str) -> np.ndarray:
        return self._owner[name].read(name)


class RenamedTensors:
    """A source with other names.

    Args:
      source: the tensors.
      names: new name -> name in `source`; others are omitted.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.where = source.where
        self._source, self._names = source, names
        tensors = source.tensors
        self.tensors = {new: tensors[old] for new, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._names[name])


def without_prefix(source: TensorSource, prefix: str) -> RenamedTensors:
    """The tensors below `prefix`, with the prefix removed."""
    names = {n.removeprefix(prefix): n for n in source.tensors if n.startswith(prefix)}
    return RenamedTensors(source, names)


def read_finite(source: TensorSource, name: str) -> np.ndarray:
    """Reads a tensor and checks that it is finite.

    Raises:
      PortingError: it has NaN or infinite values, or is not floating-point.
    """
    array = source.read(name)
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise PortingError(
            f"{name} of {source.where} is {array.dtype.name}, not floating-point: "
            "quantised weights are not supported, give the original ones"
        )
    flat = array.reshape(-1)
    for start in range(0, flat.size, _FINITE_CHUNK):
        # In chunks: the mask of a whole embedding would be hundreds of MB.
        chunk = flat[start : start + _FINITE_CHUNK]
        if not np.isfinite(chunk).all():
            kind = "NaN" if np.isnan(chunk).any() else "infinite value"
            raise PortingError(
                f"{name} of {source.where} holds a {kind}: the checkpoint is damaged or "
                "its training diverged; use another one"
            )
    return array
