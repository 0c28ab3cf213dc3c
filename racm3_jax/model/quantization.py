"""Weights in 8 bits for decoding, where reading them is what takes the time.

    kernel [inputs, outputs] float   ->   kernel int8, kernel_scale float32 [outputs]

Symmetric, one scale an output channel, rounded to nearest: the largest weight of a
channel is 127 steps. Products run in the compute dtype; embedding, head and norms stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

Params = Mapping[str, Any]
SCALE = "kernel_scale"
_STEPS = 127
# Leading axes of the kernel that are summed over, where it is not one.
_NUM_INPUTS = {"out": 2}


def quantize_kernel(
    kernel: Float[Array, " *shape"], num_inputs: int = 1
) -> tuple[Int8[Array, " *shape"], Float[Array, " *outputs"]]:
    """A kernel in 8 bits, and the size of a step in each output channel."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(tuple(range(num_inputs))) / _STEPS
    steps = jnp.round(kernel / jnp.where(scale > 0, scale, 1.0))
    return steps.astype(jnp.int8), scale


def quantize_weights(params: Params, name: str = "") -> Params:
    """Parameters of an unrolled model with every kernel in 8 bits; a copy.

    Args:
      params: as `prepare_decoding` gives them.
      name: of the module that `params` are of, when it is not the whole model.

    Raises:
      ValueError: stacked layers, whose kernels have one more axis.
    """
    if "layers" in params:
        raise ValueError("layers are stacked; quantise what prepare_decoding returns")
    out: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            out[key] = quantize_weights(value, key)
        elif key == "kernel":
            out[key], out[SCALE] = quantize_kernel(value, _NUM_INPUTS.get(name, 1))
        else:
            out[key] = value
    return out
