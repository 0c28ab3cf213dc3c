"""Checks only the shapes in signatures, with beartype.

`pytest --jaxtyping-packages=racm3_jax,shape_checks.check tests/model` calls `check` on
every function of the package. All other annotations are checked by pyright.
"""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray

# Pytrees: between two steps their leaves are arrays, but also shapes and shardings.
_OF_ANY_LEAVES = ("TrainState.__init__",)


def check(function: Callable) -> Callable:
    """The function with its arrays checked, and without its other annotations."""
    if function.__qualname__ in _OF_ANY_LEAVES:
        return function
    function.__annotations__ = {
        name: hint if names_array(hint) else Any
        for name, hint in function.__annotations__.items()
    }
    return beartype(function)


def names_array(hint: Any) -> bool:
    """Whether an annotation is an array, or an optional, list, tuple, ... of arrays."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(names_array(part) for part in typing.get_args(hint))
