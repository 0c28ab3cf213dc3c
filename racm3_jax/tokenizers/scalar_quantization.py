"""Finite scalar quantization: the codebook is a grid (arXiv 2309.15505).

Each of a few numbers is bounded and rounded to some levels; the code has these as mixed
radix digits. There is no learned codebook, so codes cannot die.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def round_to_grid(z: Float[Array, "*rest d"], levels: tuple[int, ...]) -> Array:
    """Bounds each number and rounds it to its grid in [-1, 1] (arXiv 2309.15505, A.1).

        8 levels:  -4 -3 -2 -1 0 1 2 3, divided by 4    5 levels:  -2 … 2, divided by 2

    The gradient is that of the bound, without the rounding (straight-through).
    """
    steps = jnp.asarray(levels, jnp.float32)
    # A little wider than the grid: with 2 levels the shift below would be infinite.
    half_range = (steps - 1) * (1 + 1e-3) / 2
    # An even grid has no middle: shifted by half a step so that 0 maps to 0.
    offset = jnp.where(steps % 2 == 0, 0.5, 0.0)
    bounded = jnp.tanh(z + jnp.arctanh(offset / half_range)) * half_range - offset
    rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
    return rounded / (steps // 2)


def _basis(levels: tuple[int, ...]) -> list[int]:
    return [math.prod(levels[:i]) for i in range(len(levels))]


def codes_of_grid(
    z_q: Float[Array, "*rest d"], levels: tuple[int, ...]
) -> Int[Array, "*rest"]:
    """Grid points to indices; the first number varies fastest."""
    half = jnp.asarray(levels) // 2
    digits = jnp.round(z_q * half).astype(jnp.int32) + half
    return (digits * jnp.asarray(_basis(levels))).sum(-1).astype(jnp.int32)


def grid_of_codes(
    codes: Int[Array, "*rest"], levels: tuple[int, ...]
) -> Float[Array, "*rest d"]:
    """The inverse of `codes_of_grid`."""
    steps = jnp.asarray(levels)
    digits = codes[..., None] // jnp.asarray(_basis(levels)) % steps
    return (digits - steps // 2).astype(jnp.float32) / (steps // 2)
