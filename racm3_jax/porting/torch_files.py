"""Files of `torch.save` as a source of tensors, without torch or unpickling.

    archive.zip   <root>/data.pkl     the program, see `pickles`
                  <root>/data/<key>   the bytes of each storage, not compressed

Every size in the archive is checked against the size of the file before allocating.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.porting.pickled import Inert, PickledTensor, Script
from racm3_jax.porting.pickles import read_plain_pickle, refuse
from racm3_jax.porting.tensors import PortingError, TensorInfo

# Exceptions of unsupported, encrypted or damaged zip files.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,  # encrypted; NotImplementedError is one
    LookupError,
    ValueError,
    OverflowError,
)
_MAX_PROGRAM_BYTES = 32_000_000
_MAX_DIRECTORY_BYTES = 16_000_000
# Keys under which frameworks save the weights, most common first.
_STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "params",
    "net",
    "network",
    "weights",
)
# Optimizer states and schedules have tensors too.
_TRAINING_KEYS = ("optim", "sched", "scaler", "callback", "loop", "rng", "hyper_param")
_MAX_DEPTH = 4
_MAX_DICTS = 200_000
_MAX_MODULES = 100_000


class _Directory(io.FileIO):
    """A zip file that limits the size of reads of its directory."""

    def read(self, size: int | None = -1) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return super().read(size)


class TorchFile:
    """A `.pt`, `.pth`, `.ckpt` or `.bin` file, as a source of tensors.

    Args:
      path: of the file.
      part: which weights of a larger checkpoint, "ema" or "state.model"; None takes the
        only ones, or those under the usual keys.

    Raises:
      PortingError: not torch's zip form, damaged, or without weights.
    """

    def __init__(self, path: str | os.PathLike[str], part: str | None = None) -> None:
        self.path = Path(path)
        self.where = str(path)
        entries, self._root, content = self._read_archive()
        pickled = read_plain_pickle(content, self.where)
        try:
            self._pickled = find_state_dict(pickled, self.where, part)
        except (TypeError, RecursionError) as error:
            raise PortingError(
                f"the data.pkl of {path} is damaged ({error}): download it again"
            ) from None
        for name, tensor in self._pickled.items():
            self._check(name, tensor, entries)
        self._entries = entries
        self.tensors = {
            name: TensorInfo(t.shape, t.storage.dtype)
            for name, t in self._pickled.items()
        }

    def _read_archive(self) -> tuple[dict[str, zipfile.ZipInfo], str, bytes]:
        try:
            with _Directory(self.path) as file, zipfile.ZipFile(file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                programs = [n for n in entries if n.rpartition("/")[2] == "data.pkl"]
                if len(programs) != 1:
                    raise zipfile.BadZipFile("no data.pkl")
                root = programs[0].removesuffix("data.pkl")
                order = entries.get(f"{root}byteorder")
                if order is not None:
                    with archive.open(order) as part:
                        if part.read(100) != b"little":
                            raise PortingError(
                                f"{self.path} is big-endian: save it on another host"
                            )
                with archive.open(programs[0]) as part:
                    content = part.read(_MAX_PROGRAM_BYTES + 1)
        except PortingError:
            raise
        except FileNotFoundError:
            raise
        except _ZIP_ERRORS as error:
            raise PortingError(
                f"{self.path} is truncated or not a zip file as torch >= 1.6 writes it "
                f"({error}): download it again, or give a safetensors file"
            ) from None
        if len(content) > _MAX_PROGRAM_BYTES:
            raise PortingError(
                f"the data.pkl of {self.path} has more than {_MAX_PROGRAM_BYTES:,} "
                "bytes, more than any checkpoint needs: give a safetensors file"
            )
        return entries, root, content

    def _check(
        self, name: str, tensor: PickledTensor, entries: Mapping[str, zipfile.ZipInfo]
    ) -> None:
        """Checks sizes against the file before allocating."""
        storage = tensor.storage
        entry = entries.get(f"{self._root}data/{storage.key}")
        expected = storage.num_elements * storage.dtype.itemsize
        found = -1 if entry is None else entry.file_size
        # A compressed entry could expand to any size; torch never compresses.
        if (
            entry is None
            or not expected <= found <= self.path.stat().st_size
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != found
        ):
            raise PortingError(
                f"{self.where} is truncated or damaged: {name} needs {expected} "
                f"stored bytes and has {max(found, 0)}; download it again"
            )
        reach = 1
        for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
            if size > 1:
                if stride < reach:
                    raise PortingError(
                        f"{name} of {self.where} is a view whose elements overlap "
                        f"(shape {list(tensor.shape)}, strides {list(tensor.strides)}):"
                        " save it with .contiguous()"
                    )
                reach += (size - 1) * stride
        if math.prod(tensor.shape) > storage.num_elements:
            raise PortingError(f"{name} of {self.where} is larger than its storage")

    def read(self, name: str) -> np.ndarray:
        tensor = self._pickled[name]
        dtype = tensor.storage.dtype
        try:
            with zipfile.ZipFile(self.path) as archive:
                content = archive.read(f"{self._root}data/{tensor.storage.key}")
            flat = np.frombuffer(content, dtype, tensor.storage.num_elements)
        except _ZIP_ERRORS as error:
            raise PortingError(
                f"{name} of {self.where} is damaged ({error}): download it again"
            ) from None
        return np.lib.stride_tricks.as_strided(
            flat[tensor.offset :],
            tensor.shape,
            tuple(stride * dtype.itemsize for stride in tensor.strides),
            writeable=False,
        )


def find_state_dict(
    value: Any, where: str, part: str | None = None
) -> dict[str, PickledTensor]:
    """Finds the tensors by name, for all frameworks.

        {"state_dict": {…}, "optimizer_states": […], "hyper_parameters": …}

    Args:
      value: content of the file.
      where: the file, for error messages.
      part: path of the wanted ones, keys joined by dots; None detects them.

    Raises:
      PortingError: there are none, or several without `part`.
    """
    parts = dict(_find_parts(value)) if isinstance(value, dict) else {}
    chosen = [p for p in parts if not _mentions(p, _TRAINING_KEYS)]
    if len(chosen) > 1:
        chosen = [p for p in chosen if not _mentions(p, ("ema",))] or chosen
    if part is not None:
        found = _find_part(parts, sorted(parts, key=lambda p: p not in chosen), part)
        if found is None:
            raise PortingError(
                f"{where} has no weights under {part!r}: give --part as one of "
                + (", ".join(parts) or "none, it holds no named tensors")
            )
        return _take(found, where)
    if len(chosen) > 1:
        chosen = [
            p for key in _STATE_KEYS for p in chosen if p.rpartition(".")[2] == key
        ][:1] or chosen
    if len(chosen) > 1:
        raise PortingError(
            f"{where} has several sets of weights: choose one with --part, one of "
            + ", ".join(chosen)
        )
    if chosen:
        return _take(parts[chosen[0]], where)
    inert = _first_inert(value)
    if inert is not None:
        refuse(inert.what, where)
    raise PortingError(f"{where} has no named tensors: save the model's state_dict")


def _find_parts(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, dict) of every dict with named tensors; "." is the outermost."""
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", value, ())]
    # Grows during iteration: breadth-first search.
    for number, (path, values, above) in enumerate(waiting):
        if number > _MAX_DICTS:
            raise PortingError(f"the file nests more than {_MAX_DICTS:,} dicts")
        if isinstance(values, Script):
            yield path or ".", _flatten_script(values)
            continue
        # A dict may contain itself.
        if len(above) > _MAX_DEPTH or id(values) in above:
            continue
        named = {k: v for k, v in values.items() if isinstance(k, str)}
        if any(isinstance(item, PickledTensor) for item in named.values()):
            yield path or ".", named
        waiting += [
            (f"{path}.{key}" if path else key, item, (*above, id(values)))
            for key, item in named.items()
            if isinstance(item, dict)
        ]


def _find_part(
    parts: Mapping[str, Mapping[str, Any]], order: list[str], part: str
) -> Mapping[str, Any] | None:
    """A dict by its path, or the entries with a prefix of their names."""
    if part in parts:
        return parts[part]
    for path in order:
        prefix = f"{part.removeprefix(f'{path}.')}."
        found = {
            name.removeprefix(prefix): item
            for name, item in parts[path].items()
            if name.startswith(prefix)
        }
        if found:
            return found
    return None


def _mentions(path: str, words: tuple[str, ...]) -> bool:
    return any(word in path.lower() for word in words)


def _take(values: Mapping[str, Any], where: str) -> dict[str, PickledTensor]:
    """The tensors of one part, without other values."""
    tensors = {}
    for name, item in values.items():
        if isinstance(item, PickledTensor):
            tensors[name] = item
        elif isinstance(item, Inert) and not name.endswith("_extra_state"):
            refuse(f"{item.what} (at {name})", where)
    return tensors


def _first_inert(value: Any) -> Inert | None:
    seen, waiting = set(), [value]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, Inert):
            return item
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values()
    return None


def _flatten_script(module: Script) -> dict[str, PickledTensor]:
    tensors: dict[str, PickledTensor] = {}
    waiting: list[tuple[str, Script]] = [("", module)]
    for number, (prefix, inner) in enumerate(waiting):
        if number > _MAX_MODULES:
            raise PortingError(
                f"a TorchScript file of more than {_MAX_MODULES:,} modules is damaged"
            )
        for name, item in inner.items():
            if isinstance(item, PickledTensor):
                tensors[f"{prefix}{name}"] = item
            elif isinstance(item, Script):
                waiting.append((f"{prefix}{name}.", item))
    return tensors
