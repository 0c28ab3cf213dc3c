"""Matmuls in a compute dtype, with float32 accumulation and correct gradients."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Outputs per panel. On one AVX2 core, 4 MB of weights, in microseconds: kernels with
# their outputs first took 277, 589, 866, 1112, 1456 for 1, 2, 8, 16, 32 rows; panels of 16
# took 296, 380, 617, 980, 1841; panels of 32 and 64 more from 4 rows on.
PANEL = 16
# With more rows, the copies for the panels cost more than one kernel.
_FEW_ROWS = 64


def contract(
    spec: str, x: Float[Array, " *x"], y: Float[Array, " *y"], dtype: str
) -> Float[Array, " *out"]:
    """`einsum(spec, x, y)` computed in `dtype`, summed and returned in float32.

    In bfloat16 the cotangent is cast to bfloat16 as well: otherwise the backward pass
    is a mixed float32 x bfloat16 product, which XLA runs slowly on CPU. The gradients
    have the operands' own dtype, so float32 master weights get float32 sums.

    Args:
      spec: two operands, explicit output; every index occurs in two of the three terms.
      x: first operand.
      y: second operand.
      dtype: "float32" or "bfloat16".
    """
    if dtype == "float32":
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
    return _contract(spec, dtype, x, y)


def panel_shape(shape: tuple[int, ...], num_inputs: int) -> tuple[int, int, int]:
    """The panel form of a kernel of `shape`: (panels, inputs, outputs per panel).

    A panel has outputs of one head only, so that heads can be on several devices.
    """
    inputs, outputs = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
    width = math.gcd(shape[-1], PANEL)
    return outputs // width, inputs, width


def to_panels(
    kernel: Float[Array, " *shape"], num_inputs: int
) -> Float[Array, "panels inputs width"]:
    """A kernel `[inputs..., outputs...]` as panels of a few outputs each."""
    panels, inputs, width = panel_shape(kernel.shape, num_inputs)
    return kernel.reshape(inputs, panels, width).swapaxes(0, 1)


def multiply_panels(
    x: Float[Array, "*rows inputs"],
    panels: Float[Array, "panels inputs width"],
    dtype: str,
) -> Float[Array, "*rows outputs"]:
    """`x` times a kernel in panels, summed and returned in float32.

    With few rows, each panel is read once, contiguously, without transposes.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= _FEW_ROWS:
        rows = jnp.broadcast_to(rows, (len(panels), *rows.shape))
        y = contract("pri,pio->pro", rows, panels, dtype).swapaxes(0, 1)
    else:
        y = contract("ri,pio->rpo", rows, panels, dtype)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec, dtype, x, y):
    return jnp.einsum(
        spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )


def _contract_fwd(spec, dtype, x, y):
    return _contract(spec, dtype, x, y), (x, y)


def _contract_bwd(spec, dtype, operands, cotangent):
    x, y = operands
    terms, out = spec.split("->")
    x_term, y_term = terms.split(",")
    x_gradient = _ordered(dtype, (out, cotangent), (y_term, y), x_term)
    y_gradient = _ordered(dtype, (x_term, x), (out, cotangent), y_term)
    return x_gradient.astype(x.dtype), y_gradient.astype(y.dtype)


def _ordered(dtype, first, second, out) -> Array:
    """Contracts with the operand first whose indices start the output.

    Otherwise XLA folds the transposition into the dot, and the CPU back end has no
    bfloat16 kernel for some of those ("Unsupported element type for DotThunk").
    """
    leading = next(i for i in out if (i in first[0]) != (i in second[0]))
    if leading in second[0]:
        first, second = second, first
    return _contract(f"{first[0]},{second[0]}->{out}", dtype, first[1], second[1])


_contract.defvjp(_contract_fwd, _contract_bwd)
