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
# Axes of the kernel that are summed over, where it is not one.
_NUM_INPUTS = {"out": 2}


def num_inputs_of(name: str) -> int:
    """Axes of the kernel of the layer of this name that are summed over."""
    return _NUM_INPUTS.get(name, 1)


def quantize_kernel(
    kernel: Float[Array, " *shape"], num_inputs: int = 1, outputs_first: bool = False
) -> tuple[Int8[Array, " *shape"], Float[Array, " *outputs"]]:
    """A kernel in 8 bits, and the size of a step in each output channel."""
    kernel = kernel.astype(jnp.float32)
    inputs = (1,) if outputs_first else tuple(range(num_inputs))
    scale = jnp.abs(kernel).max(inputs, keepdims=True) / _STEPS
    steps = jnp.round(kernel / jnp.where(scale > 0, scale, 1.0))
    return steps.astype(jnp.int8), scale.squeeze(inputs)


def quantize_weights(
    params: Params, name: str = "", *, outputs_first: bool = False
) -> Params:
    """Parameters of an unrolled model with every kernel in 8 bits; a copy.

    Args:
      params: as `prepare_decoding` gives them.
      name: of the module that `params` are of, when it is not the whole model.
      outputs_first: of the model's config.

    Raises:
      ValueError: stacked layers, whose kernels have one more axis.
    """
    if "layers" in params:
        raise ValueError("layers are stacked; quantise what prepare_decoding returns")
    out: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            out[key] = quantize_weights(value, key, outputs_first=outputs_first)
        elif key == "kernel":
            out[key], out[SCALE] = quantize_kernel(
                value, num_inputs_of(name), outputs_first
            )
        else:
            out[key] = value
    return out
