"""Every implementation equals the plain one, and none leaks between segments."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.model.attention import (
    IMPLEMENTATIONS,
    attend_to_cache,
    attention,
    choose_implementation,
)

# Those that run on any machine; the others: test_attention_kernels.py.
PRESENT = ("plain", "blocked")
# Longer than one block of queries, and not a multiple of it.
LENGTH = 150
SEGMENTS = np.repeat([1, 2, 3, 0], [40, 60, 35, 15])[None]


def make_qkv(heads=4, kv_heads=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(1, LENGTH, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=(0,))
def outputs_and_gradients(implementation, q, k, v, direction):
    def loss(q, k, v):
        out = attention(q, k, v, jnp.asarray(SEGMENTS), implementation)
        return (out.astype(jnp.float32) * direction).sum(), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


def test_plain_is_the_diagram_of_the_docstring():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    q = k = jnp.zeros((1, 6, 1, 6))
    v = jnp.eye(6)[None, :, None, :]
    seen = attention(q, k, v, segments, "plain")[0, :, 0] > 0
    rows = ["".join("x" if x else "." for x in row) for row in np.asarray(seen)]
    assert rows == ["x.....", "xx....", "xxx...", "...x..", "...xx.", ".....x"]


@pytest.mark.parametrize("implementation", PRESENT[1:])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_plain_with_its_gradient(implementation, heads, kv_heads):
    inputs = (*make_qkv(heads, kv_heads), jnp.cos(jnp.arange(8.0)))
    expected = outputs_and_gradients("plain", *inputs)
    actual = outputs_and_gradients(implementation, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6),
        actual,
        expected,
    )


@pytest.mark.parametrize("implementation", PRESENT)
def test_bfloat16_is_close_to_float32(implementation):
    direction = jnp.cos(jnp.arange(8.0))
    expected = outputs_and_gradients("plain", *make_qkv(), direction)
    inputs = make_qkv(dtype=jnp.bfloat16)
    actual = outputs_and_gradients(implementation, *inputs, direction)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(actual))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, atol=0.06),
        actual,
        expected,
    )


@pytest.mark.parametrize("implementation", PRESENT)
def test_no_segment_influences_another(implementation):
    perturbed = SEGMENTS[0] == 2
    change = jnp.asarray(perturbed)[None, :, None, None] * 3.0
    q, k, v = make_qkv()
    # Gradients only of what the *other* segments computed.
    direction = jnp.asarray(~perturbed)[None, :, None, None] * 1.0
    out, gradients = outputs_and_gradients(implementation, q, k, v, direction)
    changed, _ = outputs_and_gradients(
        implementation, q + change, k + change, v + change, direction
    )
    np.testing.assert_array_equal(out[:, ~perturbed], changed[:, ~perturbed])
    assert not np.array_equal(out[:, perturbed], changed[:, perturbed])
    for gradient in gradients:
        assert not np.any(gradient[:, perturbed])
        assert np.any(gradient[:, ~perturbed])


def test_cache_of_one_row_equals_plain():
    q, k, v = make_qkv()
    alone = jnp.ones((1, LENGTH), jnp.int32)
    expected = jax.jit(attention, static_argnums=4)(q, k, v, alone, "plain")
    positions = jnp.arange(LENGTH)[None]
    k, v = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
    attend = jax.jit(attend_to_cache)
    np.testing.assert_allclose(attend(q, k, v, positions), expected, atol=2e-6)
    last = attend(q[:, -1:], k, v, positions[:, -1:])
    np.testing.assert_allclose(last, expected[:, -1:], atol=2e-6)


def test_no_pass_copies_or_transposes_a_cache():
    """The compiled step allocates nothing of a cache's size: it reads it in place."""
    shapes = [
        (4, 2, 4, 8),
        (1, 2, 8, 999),
        (1, 2, 999, 8),
        (4, 2, 8, 777),
        (4, 2, 777, 8),
    ]
    q, *caches = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    places = jax.ShapeDtypeStruct((4, 2), jnp.int32)

    @jax.jit
    def step(q, shared_k, shared_v, k, v, positions):
        prefix = (shared_k, shared_v, positions[:, 0])
        return attend_to_cache(q, k, v, positions, prefix)

    text = step.lower(q, *caches, places).compile().as_text()
    sizes = {2 * 999 * 8, 4 * 2 * 777 * 8}
    made = re.findall(r"= f32\[([\d,]+)\]\S* (\w[\w-]*)\(", text)
    large = {op for dims, op in made if math.prod(map(int, dims.split(","))) in sizes}
    assert large <= {"parameter", "bitcast"}, large


def test_auto_is_an_implementation_and_other_names_are_refused():
    assert choose_implementation() in IMPLEMENTATIONS
    if jax.default_backend() == "cpu":
        assert choose_implementation() == "blocked"
        split = jax.sharding.AbstractMesh((2,), ("data",))
        with jax.sharding.use_abstract_mesh(split):
            assert choose_implementation() == "plain"
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match="'flash' does not exist; use 'auto'"):
        attention(q, k, v, jnp.asarray(SEGMENTS), "flash")
