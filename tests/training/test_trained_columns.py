"""Training some columns of the head changes no bit of the other parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from racm3_jax import sharding
from racm3_jax.training.optimizer import (
    OptimizerConfig,
    TrainedColumns,
    build_optimizer,
)
from racm3_jax.training.step import init_state, make_train_step

WIDTH, VOCAB = 8, 16
COLUMNS = TrainedColumns("head", 5, 9)
CONFIG = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, num_steps=9, weight_decay=0.3, clip_norm=0.5
)


def init_fn(key):
    def boxed(names, shape, key):
        init = nn.with_logical_partitioning(nn.initializers.normal(), names)
        return init(key, shape)

    return {
        "head": boxed(("embed", "vocab"), (WIDTH, VOCAB), key),
        "layer": {"kernel": boxed(("embed", "mlp"), (WIDTH, WIDTH), key)},
    }


def loss_fn(params, batch, key, step):
    hidden = jnp.tanh(batch["x"] @ params["layer"]["kernel"])
    log_probs = jax.nn.log_softmax(hidden @ params["head"])
    nll = -jnp.take_along_axis(log_probs, batch["y"][:, None], 1).mean()
    return nll, {"loss": (nll, 1.0)}


def make_batch(step):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((8, WIDTH)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, VOCAB, 8).astype(np.int32)}


def train(mesh_shape, num_steps=3):
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.make_mesh(*mesh_shape, devices=devices)
    optimizer = COLUMNS.restrict(build_optimizer(CONFIG))
    params = nn.unbox(jax.device_get(init_fn(jax.random.key(0))))
    params = jax.tree.map(np.array, params)
    # A training must not turn the one zero into the other.
    params["head"][0, :8] = -0.0
    params["layer"]["kernel"][0] = -0.0
    state = init_state(
        init_fn,
        optimizer,
        mesh,
        jax.random.key(0),
        params=jax.tree.map(np.copy, params),
    )
    loss = COLUMNS.restrict_loss(loss_fn)
    step_fn = make_train_step(loss, optimizer, mesh, state)
    for step in range(num_steps):
        state, metrics = step_fn(state, make_batch(step))
    return params, jax.device_get(state), metrics


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_all_else_keeps_its_bits(mesh_shape):
    before, state, metrics = train(mesh_shape)
    after = state.params
    kept = np.r_[0 : COLUMNS.start, COLUMNS.stop : VOCAB]
    for old, new in (
        (before["layer"]["kernel"], after["layer"]["kernel"]),
        (before["head"][:, kept], np.asarray(after["head"])[:, kept]),
    ):
        assert old.tobytes() == np.ascontiguousarray(new).tobytes()
    assert (COLUMNS.take(before) != COLUMNS.take(after)).any(axis=0).all()
    # Only the columns have moments, and these are used.
    moments = [x for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
    assert [x.shape for x in moments] == [(WIDTH, COLUMNS.stop - COLUMNS.start)] * 2
    assert all(np.any(x) for x in moments)
    assert float(metrics["gradient_norm"][0]) > 0


def test_columns_move_as_in_a_full_training():
    """One step without clipping: the same gradients, moments, decay and rate."""
    optimizer = build_optimizer(dataclasses.replace(CONFIG, clip_norm=0))
    params, batch = nn.unbox(init_fn(jax.random.key(1))), make_batch(0)
    results = []
    for part in (None, COLUMNS):
        chosen, loss = optimizer, loss_fn
        if part is not None:
            chosen, loss = part.restrict(optimizer), part.restrict_loss(loss_fn)

        @jax.jit
        def update(params, chosen=chosen, loss=loss):
            gradients = jax.grad(lambda p: loss(p, batch, None, 0)[0])(params)
            updates, _ = chosen.update(gradients, chosen.init(params), params)
            return COLUMNS.take(updates)

        results.append(update(params))
    np.testing.assert_allclose(*results, rtol=1e-6)
