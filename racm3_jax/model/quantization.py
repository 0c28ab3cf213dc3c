"""8-bit weights for decoding, which is bound by reading weights.

    kernel [inputs, outputs] float   ->   kernel int8, kernel_scale float32 [outputs]

Symmetric, one scale an output channel, rounded to nearest: the largest weight of a
channel is 127 steps. Matmuls run in the compute dtype; embedding, head and norms are
kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

Params = Mapping[str, Any]
SCALE = "kernel_scale"
_STEPS = 127
# Number of contracted kernel axes, if not one.
_NUM_INPUTS = {"out": 2}


def num_inputs_of(name: str) -> int:
    """Number of contracted kernel axes of the layer with this name."""
    return _NUM_INPUTS.get(name, 1)


def quantize_kernel(
    kernel: Float[Array, " *shape"], num_inputs: int = 1, outputs_first: bool = False
) -> tuple[Int8[Array, " *shape"], Float[Array, " *outputs"]]:
    """An 8-bit kernel, and the scale of each output channel."""
    kernel = kernel.astype(jnp.float32)
    inputs = (1,) if outputs_first else tuple(range(num_inputs))
    scale = jnp.abs(kernel).max(inputs, keepdims=True) / _STEPS
    steps = jnp.round(kernel / jnp.where(scale > 0, scale, 1.0))
    return steps.astype(jnp.int8), scale.squeeze(inputs)


def quantize_weights(
    params: Params, name: str = "", *, outputs_first: bool = False
) -> Params:
    """A copy of the parameters of an unrolled model with 8-bit kernels.

    Args:
      params: from `prepare_decoding`.
      name: of the module of `params`, if it is not the whole model.
      outputs_first: of the model's config.

    Raises:
      ValueError: layers are stacked.
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
