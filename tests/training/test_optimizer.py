from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from racm3_jax.model.config import tiny, tiny_chameleon
from racm3_jax.model.transformer import abstract_params, unstack_layers
from racm3_jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    find_decayed,
)


def test_schedule_rises_then_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, num_steps=8)
    schedule = build_schedule(config)
    rates = [float(schedule(step)) for step in range(9)]
    np.testing.assert_allclose(
        rates, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("schedule", "last"), [("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)]
)
def test_schedule_ends_at_the_final_fraction(schedule, last):
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=0,
        num_steps=10,
        schedule=schedule,
        final_fraction=0.1,
    )
    rate = build_schedule(config)
    assert float(rate(0)) == 1.0
    assert float(rate(10)) == pytest.approx(last)
    assert float(rate(100)) == pytest.approx(last)


def test_only_matrices_decay():
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.5)
    optimizer = build_optimizer(config)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2), "scale": jnp.zeros(())}
    updates, _ = update(optimizer, zeros, params)
    assert (updates["kernel"] < 0).all()
    assert not updates["bias"].any()
    assert not updates["scale"].any()


def update(optimizer, gradients, params):
    """The first update, and the state after it."""

    @jax.jit
    def compute(gradients, params):
        return optimizer.update(gradients, optimizer.init(params), params)

    return compute(gradients, params)


@pytest.mark.parametrize("style", [tiny, tiny_chameleon])
def test_scanned_equals_unrolled_after_steps_with_decay(style):
    """Stacked norms and biases have two axes, and query biases have them anyway."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    rng = np.random.default_rng(0)
    scanned = jax.tree.map(
        lambda shape: rng.normal(0.5, 0.2, shape.shape).astype(np.float32),
        nn.unbox(abstract_params(style(scan_layers=True, num_layers=3))),
    )

    def train(model, params):
        optimizer = build_optimizer(config, abstract_params(model))

        @jax.jit
        def step(params, state):
            gradients = jax.tree.map(jnp.sin, params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(optimizer.init)(params)
        for _ in range(5):
            params, state = step(params, state)
        return jax.device_get(params)

    got = unstack_layers(train(style(scan_layers=True, num_layers=3), scanned))
    want = train(style(num_layers=3), unstack_layers(scanned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("style", [tiny, tiny_chameleon])
def test_only_kernels_and_tables_decay(style, scan_layers):
    decayed = find_decayed(abstract_params(style(scan_layers=scan_layers)))
    for name, decays in decayed.items():
        last = name.split("/")[-1]
        assert decays == (last in ("kernel", "head") or "embedding" in last), name
    assert set(decayed.values()) == {True, False}


def test_gradients_are_clipped_by_global_norm():
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0, eps=1.0)
    optimizer = build_optimizer(config)
    params = {"w": jnp.zeros((2, 2))}
    big, bigger = ({"w": jnp.full((2, 2), size)} for size in (10.0, 1000.0))
    first, _ = update(optimizer, big, params)
    second, _ = update(optimizer, bigger, params)
    np.testing.assert_allclose(first["w"], second["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'; allowed: linear, cosine"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"clip_norm": -1.0}, "clip_norm must be >= 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_the_first_moment_may_be_bfloat16():
    params = {"w": jnp.ones((4, 4))}
    optimizer = build_optimizer(OptimizerConfig(first_moment_dtype="bfloat16"))
    updates, state = update(optimizer, {"w": jnp.ones((4, 4))}, params)
    moments = [x.dtype for x in jax.tree.leaves(state) if x.shape == (4, 4)]
    assert sorted(map(str, moments)) == ["bfloat16", "float32"]
    assert updates["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match="first_moment_dtype is 'int8'"):
        OptimizerConfig(first_moment_dtype="int8")  # pyright: ignore
