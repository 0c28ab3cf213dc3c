"""One rule per parameter: its name and form in another project, and here."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from racm3_jax.porting.tensors import PortingError, TensorSource


@dataclasses.dataclass(frozen=True)
class Form:
    """The conversion of an array on import, and on export if possible."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray] | None


def _same(x: np.ndarray) -> np.ndarray:
    return x


SAME = Form(_same, _same)
# Linear [out, in] <-> kernel [in, out].
LINEAR = Form(np.transpose, np.transpose)
# Convolution OIHW <-> HWIO.
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# A linear layer that is a 1x1 convolution here.
POINTWISE = Form(lambda x: x.T[None, None], lambda x: x[0, 0].T)


def _uncut_patches(x: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(x) // 3)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# The patch convolution <-> the matrix for flattened patches.
PATCHES = Form(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _uncut_patches
)


def linear_part(part: int, num_parts: int) -> Form:
    """One of several fused linear layers (or their biases)."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        size = len(x) // num_parts
        return x[part * size : (part + 1) * size].T

    return Form(to_ours, None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The source of one of our parameters.

    Attributes:
      ours: path in our parameters, `vision/layers_0/mlp/up/kernel`.
      theirs: name in the other project's checkpoint.
      shape: of their tensor.
      form: its conversion.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    form: Form = SAME


def linear(
    ours: str, theirs: str, shape: tuple[int, int], *, bias: bool = True
) -> list[Rule]:
    """A linear layer; `shape` is [out, in]."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", shape, LINEAR)]
    if bias:
        rules.append(Rule(f"{ours}/bias", f"{theirs}.bias", shape[:1]))
    return rules


def norm(ours: str, theirs: str, width: int) -> list[Rule]:
    """A LayerNorm or GroupNorm: scale and bias."""
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", (width,)),
        Rule(f"{ours}/bias", f"{theirs}.bias", (width,)),
    ]


def check_names(
    rules: Iterable[Rule],
    source: TensorSource,
    layout: str,
    ignored: Sequence[str] = (),
) -> None:
    """Compares a checkpoint with the rules before reading tensors.

    Args:
      rules: of every parameter.
      source: the checkpoint.
      layout: its name for messages, e.g. "Hugging Face CLIP".
      ignored: regular expressions (full match) of keys that may be present and are
        ignored.

    Raises:
      PortingError: lists all missing and unexpected tensors, and wrong shapes.
    """
    wanted = {rule.theirs: rule.shape for rule in rules}
    found = source.tensors
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(
        name
        for name in set(found) - set(wanted)
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    )
    misshaped = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
        )
        if names
    ]
    if problems:
        raise PortingError(
            f"{source.where} does not match the {layout} layout of its config, so "
            f"nothing was loaded: {'; '.join(problems)}"
        )


def parameter_shapes(init: Callable[[Any], Any]) -> Mapping[str, tuple[int, ...]]:
    """`{path: shape}` of the parameters of `init(key)`."""
    tree = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return types.MappingProxyType(shapes)  # callers keep and share it


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number in the group of `pattern`; 0 if none.

    Raises:
      PortingError: there are fewer names than this.
    """
    names = list(names)
    found = (re.match(pattern, name) for name in names)
    number = 1 + max((int(m.group(1)) for m in found if m), default=-1)
    check_count(number, names, f"names like {pattern} go up to {number - 1}")
    return number


def check_count(number: int, names: Collection[str], what: str) -> None:
    """Refuses more layers than a checkpoint has tensors.

    Raises:
      PortingError: with `what` in the message.
    """
    if number > len(names):
        raise PortingError(
            f"{what}, but the checkpoint has only {len(names)} tensors: it is damaged"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested parameters -> `{path: array}`."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = np.asarray(value)
    return flat
