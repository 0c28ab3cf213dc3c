"""Products in bfloat16: dtypes of gradients, and agreement with float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.model.contract import contract, multiply_panels, to_panels

SPECS = ["bld,dhk->blhk", "blhk,hkd->bld", "bld,vd->blv", "bqkgd,bskd->bkgqs"]
SIZES = dict(zip("bldhkvqsgf", (2, 5, 8, 3, 4, 7, 6, 9, 2, 10), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_gradients_are_close_and_have_the_operands_dtype(spec):
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


@pytest.mark.parametrize(("rows", "outputs"), [((1, 2), (3, 24)), ((3, 50), (32,))])
def test_a_kernel_in_panels_gives_the_product_of_the_kernel(rows, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*rows, 6)).astype(np.float32)
    kernel = rng.normal(size=(2, 3, *outputs)).astype(np.float32)
    panels = to_panels(jnp.asarray(kernel), 2)
    # Of one head each: 8 divides 24.
    assert panels.shape == ((9, 6, 8) if len(outputs) == 2 else (2, 6, 16))
    got = multiply_panels(jnp.asarray(x), panels, "float32")
    np.testing.assert_allclose(got, x @ kernel.reshape(6, -1), atol=1e-5)
