"""The product in bfloat16: dtypes of gradients, and agreement with float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.model.contract import contract

SPECS = ["bld,dhk->blhk", "blhk,hkd->bld", "bld,vd->blv", "bqkgd,bskd->bkgqs"]
SIZES = dict(zip("bldhkvqsgf", (2, 5, 8, 3, 4, 7, 6, 9, 2, 10), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_gradients_are_near_and_in_the_operands_dtype(spec):
    rng = np.random.default_rng(0)
    terms = spec.split("->")[0].split(",")
    x, y = (
        rng.normal(size=[SIZES[index] for index in term]).astype(np.float32)
        for term in terms
    )

    def gradients(dtype):
        def loss(x, y):
            return jnp.sin(contract(spec, x, y, dtype)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, y)

    for near, exact in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert near.dtype == jnp.float32
        np.testing.assert_allclose(near, exact, atol=0.03 * np.abs(exact).max() + 0.1)


def test_output_is_float32():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert contract("ab,bc->ac", x, x.T, "bfloat16").dtype == jnp.float32
