"""Pickles of tensors, read without unpickling.

A pickle is a program for a stack machine, and the standard machine runs any function
that it names. This one imports and calls nothing: it builds dicts, lists, tuples,
numbers and strings, and knows the few names that represent tensors. Any other call
(Lightning's hyper-parameters have a Namespace or a NumPy scalar) becomes an `Inert`
record of its name: not called, not filled, not kept. A file that calls functions that
act on the machine is refused completely.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from typing import Any

from racm3_jax.porting.pickled import (
    Inert,
    Name,
    PickledTensor,
    Script,
    make_tensor,
    read_storage,
)
from racm3_jax.porting.tensors import PortingError

# No checkpoint needs these: such a file is malicious.
_ACTING_MODULES = frozenset(
    [
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "shutil",
        "pty",
        "socket",
        "importlib",
        "runpy",
        "ctypes",
        "webbrowser",
        "pickle",
        "_pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "timeit",
        "pdb",
        "asyncio",
        "urllib",
        "pip",
        "commands",
        "code",
    ]
)
_ACTING_BUILTINS = frozenset(
    [
        "eval",
        "exec",
        "execfile",
        "compile",
        "open",
        "__import__",
        "setattr",
        "delattr",
        "apply",
        "input",
        "breakpoint",
    ]
)
# Limit of instructions and copied items: a few repeated bytes can request gigabytes.
_MAX_STEPS = 2_000_000


class _Mark:
    """Marks the start of a run of items on the stack."""


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
# These push the following argument.
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
        "BYTEARRAY8",
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
      content: the first program; later ones are not read.
      where: the file, for error messages.

    Raises:
      PortingError: it calls a function that acts on the machine, is too long, or
        is damaged.
    """
    machine = _Machine(where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of damaged escapes
        return _run(machine, content)


def _run(machine: _Machine, content: bytes) -> Any:
    where = machine.where
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.spend(1)
            if opcode.name == "STOP":
                result = machine.stack.pop()
                if isinstance(result, Inert):
                    refuse(result.what, where)
                return result
            machine.step(opcode.name, argument)
    except PortingError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise PortingError(
            f"{where} is damaged or truncated ({error}): download it again"
        ) from None
    raise PortingError(f"{where} is truncated (no end): download it again")


class _Machine:
    """The stack and the memo of one program."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._num_steps = 0

    def spend(self, number: int) -> None:
        """Counts instructions and copied items."""
        self._num_steps += number
        if self._num_steps > _MAX_STEPS:
            raise PortingError(
                f"{self.where} holds a program of more than {_MAX_STEPS:,} steps, more "
                "than any checkpoint needs: use a safetensors file, or save its "
                "state_dict alone"
            )

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _GET:
            stack.append(self._memo[int(argument)])
        elif name in _PUT:
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._pop_run()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            stack.append(Name(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(str(module), str(attribute)))
        elif name == "BINPERSID":
            stack.append(read_storage(stack.pop()))
        elif name not in ("PROTO", "FRAME") and not self._join(name):
            self._make(name, argument)

    def _join(self, opcode: str) -> bool:
        """Adds items to a container; returns whether this was such an instruction."""
        stack = self.stack
        if opcode == "TUPLE":
            stack.append(tuple(self._pop_run()))
        elif opcode in _SHORT_TUPLES:
            size = _SHORT_TUPLES[opcode]
            items = tuple(stack[len(stack) - size :])
            if len(items) != size:
                raise ValueError("a tuple lacks its items")
            del stack[len(stack) - size :]
            stack.append(items)
        elif opcode == "LIST":
            stack.append(self._pop_run())
        elif opcode == "DICT":
            stack.append(_pairs(self._pop_run()))
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop_run() if opcode == "APPENDS" else [stack.pop()]
            self._target(list).extend(items)
        elif opcode == "ADDITEMS":
            items = self._pop_run()
            self._target(set).update(map(_key, items))
        elif opcode == "FROZENSET":
            stack.append(frozenset(map(_key, self._pop_run())))
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop_run() if opcode == "SETITEMS" else [stack.pop(-2)]
            if opcode == "SETITEM":
                items.append(stack.pop())
            self._target(dict).update(_pairs(items))
        else:
            return False
        return True

    def _make(self, opcode: str, argument: Any) -> None:
        """Makes an object of a named class or function, or an inert record."""
        stack = self.stack
        if opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif opcode == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, Script):
                if type(state) is not dict:
                    raise TypeError(f"a module of a {type(state).__name__}")
                target.update(state)
            # The attributes of an OrderedDict (`_metadata`) are not items: dropped.
            elif not isinstance(target, (dict, PickledTensor, Inert)):
                refuse(target, self.where)
        elif opcode == "NEWOBJ":
            _, kind = stack.pop(), stack.pop()
            if isinstance(kind, Name) and kind.module.startswith("__torch__"):
                stack.append(Script())
            else:
                stack.append(self._leave(kind))
        elif opcode == "NEWOBJ_EX":
            kind = stack[-3]
            stack[-3:] = [self._leave(kind)]
        elif opcode == "INST":
            self._pop_run()
            module, _, attribute = str(argument).partition(" ")
            stack.append(self._leave(Name(module, attribute)))
        elif opcode == "OBJ":
            stack.append(self._leave(self._pop_run()[0]))
        else:
            refuse(f"the pickle instruction {opcode}", self.where)

    def _call(self, function: Any, arguments: Any) -> Any:
        """Handles the few functions that represent data."""
        known = str(function) if isinstance(function, Name) else ""
        if known in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            storage, offset, shape, strides = arguments[:4]
            self.spend(len(shape) + len(strides))
            return make_tensor(storage, offset, tuple(shape), tuple(strides))
        if known in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
        ):
            return arguments[0]
        if known == "collections.OrderedDict":
            self.spend(sum(map(len, arguments)))
            items = arguments[0] if arguments else {}
            if type(items) is dict:
                return dict(items)
            return {_key(key): value for key, value in items}
        if known == "torch.Size":
            self.spend(len(arguments[0]))
            return tuple(arguments[0])
        return self._leave(function)

    def _leave(self, function: Any) -> Inert:
        """An inert record of a call."""
        if isinstance(function, Inert):
            return function
        if not isinstance(function, Name):
            raise TypeError(f"a {type(function).__name__} cannot be called")
        root = function.module.partition(".")[0]
        builtin = root in ("builtins", "__builtin__", "__builtins__")
        if root in _ACTING_MODULES or (builtin and function.name in _ACTING_BUILTINS):
            refuse(function, self.where)
        return Inert(str(function))

    def _target(self, kind: type) -> Any:
        """The container being filled; inert records accept anything."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            return kind()
        if type(target) is not kind:
            raise TypeError(f"items for a {kind.__name__}: {type(target).__name__}")
        return target

    def _pop_run(self) -> list[Any]:
        """Pops the items above the last mark, and the mark."""
        stack = self.stack
        start = len(stack) - 1
        while start >= 0 and not isinstance(stack[start], _Mark):
            start -= 1
        if start < 0:
            raise ValueError("items without a mark")
        items = stack[start + 1 :]
        del stack[start:]
        return items


def refuse(wanted: Any, where: str) -> None:
    """Raises the error for an unsupported or dangerous call of a file."""
    if str(wanted).startswith("torch."):
        advice = "save the state_dict alone, in float32, float16 or bfloat16"
    else:
        advice = (
            "such a file would run code when unpickled, so it is refused; use a "
            "safetensors file, or save its state_dict alone"
        )
    raise PortingError(
        f"{where} calls {wanted}, which is neither a tensor nor a plain container: "
        f"{advice}"
    )


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, items[::2]), items[1::2], strict=True))


def _key(value: Any) -> Any:
    """Checks a dict key or set item, as hashing recurses into nested tuples."""
    items = value if type(value) is tuple else (value,)
    if any(type(item) in (tuple, frozenset) for item in items):
        raise ValueError("a key of nested tuples")
    return value
