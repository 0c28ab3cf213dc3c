"""A split table equals a whole one, and so do its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from racm3_jax import sharding
from racm3_jax.model.embedding import look_up
from racm3_jax.training.collectives import find_collectives


@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
)
def test_every_mesh_gives_the_same(shape, rows):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((800, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 800, (rows, 5)), jnp.int32)
    direction = jnp.asarray(rng.standard_normal((rows, 5, 16)), jnp.float32)

    def total(table, tokens):
        found = look_up(table, tokens)
        return (found * direction).sum(), found

    both = jax.jit(jax.grad(total, has_aux=True))
    gradient, found = both(table, tokens)
    np.testing.assert_array_equal(found, np.asarray(table)[np.asarray(tokens)])
    mesh = sharding.make_mesh(*shape)
    spec = sharding.partition_spec("e", ("vocab", "embed"), table.shape, mesh)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, spec))
        if rows == 8:
            tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
        split_gradient, split_found = both(table, tokens)
        program = both.lower(table, tokens).compile().as_text()
    np.testing.assert_array_equal(split_found, found)
    np.testing.assert_allclose(split_gradient, gradient, rtol=1e-6, atol=1e-6)
    if rows == 8 and shape[1] > 1:
        copies = shape[0] > 1  # of the table, whose gradients are summed
        largest = max(c.whole_bytes for c in find_collectives(program))
        assert largest <= table.nbytes / (shape[1] * shape[2] if copies else 8)


def test_gradients_are_those_of_jnp():
    table = jnp.arange(12.0).reshape(4, 3)
    tokens = jnp.asarray([[1, 1, 3]])
    gradient = jax.grad(lambda t: look_up(t, tokens).sum())(table)
    assert gradient.tolist() == [[0, 0, 0], [2, 2, 2], [0, 0, 0], [1, 1, 1]]
