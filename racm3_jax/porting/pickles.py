"""What `torch.save` wrote, read without torch and without unpickling.

A pickle is a program for a stack machine, and the standard machine runs any function
that the program names. This one has no import and calls nothing: it builds dicts, lists,
tuples, numbers and strings, knows the few names that stand for tensors, and refuses the
file as soon as it wants anything else called, naming what that was. A class that is
merely mentioned (Lightning keys its callbacks by class) stays an inert `Name`.

    archive.zip   <root>/data.pkl     the program
                  <root>/data/<key>   the bytes of each storage, not compressed
"""

from __future__ import annotations

import dataclasses
import os
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from racm3_jax.porting.tensors import PortingError, TensorInfo

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
# Where frameworks put the weights inside what they save.
_STATE_KEYS = ("state_dict", "model", "module", "params")


@dataclasses.dataclass(frozen=True)
class Name:
    """A function or class that a pickle mentions; never imported, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of the archive, and how many elements of what they are."""

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


class _Script(dict[str, Any]):
    """A TorchScript module (OpenAI's CLIP files): its attributes, none of its code."""


class _Mark:
    """Where a run of items on the stack begins."""


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": _Mark,
}
# These push the argument that stands in the program.
_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
    ]
)
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(content: bytes, where: str) -> Any:
    """Builds the tensors and plain containers of a pickle.

    Args:
      content: the program; later ones behind it are not read.
      where: the file, for error messages.

    Raises:
      PortingError: it wants something called that is no tensor or plain container, or
        it is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in _GET:
                stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
            elif name in _PUT:
                memo[int(argument)] = stack[-1]  # pyright: ignore[reportArgumentType]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                _build(name, argument, stack, where)
    except PortingError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise PortingError(
            f"{where} is damaged or truncated ({error}): download it again"
        ) from None
    raise PortingError(f"{where} is truncated (no end): download it again")


def _build(opcode: str, argument: Any, stack: list[Any], where: str) -> None:
    """One step that joins what is on the stack."""
    if opcode == "TUPLE":
        stack.append(tuple(_pop_run(stack)))
    elif opcode in _SHORT_TUPLES:
        size = _SHORT_TUPLES[opcode]
        items = tuple(stack[len(stack) - size :])
        if len(items) != size:
            raise ValueError("a tuple lacks its items")
        del stack[len(stack) - size :]
        stack.append(items)
    elif opcode == "LIST":
        stack.append(_pop_run(stack))
    elif opcode == "DICT":
        stack.append(_pairs(_pop_run(stack)))
    elif opcode == "APPEND":
        item = stack.pop()
        _as(list, stack[-1]).append(item)
    elif opcode == "APPENDS":
        items = _pop_run(stack)
        _as(list, stack[-1]).extend(items)
    elif opcode == "ADDITEMS":
        items = _pop_run(stack)
        _as(set, stack[-1]).update(items)
    elif opcode == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _as(dict, stack[-1])[key] = value
    elif opcode == "SETITEMS":
        items = _pop_run(stack)
        _as(dict, stack[-1]).update(_pairs(items))
    elif opcode == "POP":
        stack.pop()
    elif opcode == "GLOBAL":
        module, _, name = str(argument).partition(" ")
        stack.append(Name(module, name))
    elif opcode == "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(Name(str(module), str(name)))
    elif opcode == "BINPERSID":
        stack.append(_read_storage(stack.pop()))
    elif opcode == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments, where))
    elif opcode == "BUILD":
        state, target = stack.pop(), stack[-1]
        if isinstance(target, _Script):
            target.update(_as(dict, state))
        # An OrderedDict's attributes (`_metadata`) are not its items: dropped.
        elif not isinstance(target, (dict, PickledTensor)):
            _refuse(target, where)
    elif opcode == "NEWOBJ":
        kind = stack[-2]
        if not isinstance(kind, Name) or not kind.module.startswith("__torch__"):
            _refuse(kind, where)
        stack[-2:] = [_Script()]
    elif opcode == "NEWOBJ_EX":
        _refuse(stack[-3], where)
    elif opcode == "INST":
        _refuse(str(argument).replace(" ", "."), where)
    elif opcode == "OBJ":
        _refuse(_pop_run(stack)[0], where)
    else:
        _refuse(f"the pickle instruction {opcode}", where)


def _refuse(wanted: Any, where: str) -> None:
    raise PortingError(
        f"{where} asks for {wanted}, which is neither a tensor nor a plain container: "
        "such a file runs code where it is unpickled, so it is refused; use a "
        "safetensors file, or save its state_dict alone"
    )


def _call(function: Any, arguments: Any, where: str) -> Any:
    """The few functions that stand for data."""
    known = str(function) if isinstance(function, Name) else ""
    if known in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        storage, offset, shape, strides = arguments[:4]
        return _make_tensor(storage, offset, tuple(shape), tuple(strides))
    if known in (
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
    ):
        return arguments[0]
    if known == "collections.OrderedDict":
        return dict(*arguments)
    if known == "torch.Size":
        return tuple(arguments[0])
    _refuse(function, where)


def _read_storage(identity: Any) -> Storage:
    kind, dtype, key, _, num_elements = identity
    if kind != "storage" or not isinstance(dtype, Name):
        raise ValueError(f"unknown kind of record {kind!r}")
    return Storage(STORAGE_DTYPES[dtype.name], str(key), int(num_elements))


def _make_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> PickledTensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without storage or strides")
    if min((offset, *shape, *strides), default=0) < 0:
        raise ValueError("a negative size, offset or stride")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.num_elements:
        raise ValueError("a tensor that reaches past its storage")
    return PickledTensor(storage, offset, shape, strides)


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"items for a {kind.__name__}, but it is a {type(value)}")
    return value


def _pop_run(stack: list[Any]) -> list[Any]:
    """Items above the last mark, which goes too."""
    start = len(stack) - 1
    while not isinstance(stack[start], _Mark):
        start -= 1
        if start < 0:
            raise ValueError("items without a mark")
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


class TorchFile:
    """A `.pt`, `.pth`, `.ckpt` or `.bin` file, as a source of tensors.

    Args:
      path: of the file.

    Raises:
      PortingError: not torch's zip form, damaged, or holding more than data.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.where = str(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                programs = [n for n in entries if n.rpartition("/")[2] == "data.pkl"]
                if len(programs) != 1:
                    raise zipfile.BadZipFile("no data.pkl")
                self._root = programs[0].removesuffix("data.pkl")
                order = entries.get(f"{self._root}byteorder")
                if order is not None and archive.read(order) != b"little":
                    raise PortingError(f"{path} is big-endian: save it on another host")
                content = archive.read(programs[0])
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise PortingError(
                f"{path} is truncated or not a zip file as torch >= 1.6 writes it "
                f"({error}): download it again, or give a safetensors file"
            ) from None
        pickled = read_plain_pickle(content, self.where)
        self._pickled = find_state_dict(pickled, self.where)
        self._check_storages(entries)
        self.tensors = {
            name: TensorInfo(t.shape, t.storage.dtype)
            for name, t in self._pickled.items()
        }

    def _check_storages(self, entries: Mapping[str, zipfile.ZipInfo]) -> None:
        for name, tensor in self._pickled.items():
            storage = tensor.storage
            entry = entries.get(f"{self._root}data/{storage.key}")
            expected = storage.num_elements * storage.dtype.itemsize
            found = -1 if entry is None else entry.file_size
            # A compressed entry could unpack to any size; torch never compresses.
            if entry is None or found < expected or entry.compress_type:
                raise PortingError(
                    f"{self.where} is truncated or damaged: {name} needs {expected} "
                    f"stored bytes and has {max(found, 0)}; download it again"
                )

    def read(self, name: str) -> np.ndarray:
        tensor = self._pickled[name]
        dtype = tensor.storage.dtype
        try:
            with zipfile.ZipFile(self.path) as archive:
                content = archive.read(f"{self._root}data/{tensor.storage.key}")
        except (zipfile.BadZipFile, EOFError) as error:
            raise PortingError(
                f"{name} of {self.where} is damaged ({error}): download it again"
            ) from None
        return np.lib.stride_tricks.as_strided(
            np.frombuffer(content, dtype)[tensor.offset :],
            tensor.shape,
            tuple(stride * dtype.itemsize for stride in tensor.strides),
            writeable=False,
        )


def find_state_dict(value: Any, where: str) -> dict[str, PickledTensor]:
    """The tensors by name, wherever the saving framework put them.

    Raises:
      PortingError: there are none.
    """
    for _ in range(3):
        if not isinstance(value, dict):
            break
        if isinstance(value, _Script):
            return _flatten_script(value)
        tensors = {
            key: item
            for key, item in value.items()
            if isinstance(key, str) and isinstance(item, PickledTensor)
        }
        inner = [k for k in _STATE_KEYS if isinstance(value.get(k), dict)]
        if inner:
            value = value[inner[0]]
            continue
        if tensors:
            if all(name.startswith("module.") for name in tensors):
                return {n.removeprefix("module."): t for n, t in tensors.items()}
            return tensors
        break
    raise PortingError(
        f"{where} holds no named tensors: save the model's state_dict, not another part"
    )


def _flatten_script(module: _Script, prefix: str = "") -> dict[str, PickledTensor]:
    tensors = {}
    for name, item in module.items():
        if isinstance(item, PickledTensor):
            tensors[prefix + name] = item
        elif isinstance(item, _Script):
            tensors.update(_flatten_script(item, f"{prefix}{name}."))
    return tensors
