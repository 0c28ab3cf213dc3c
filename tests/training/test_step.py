from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from racm3_jax import sharding
from racm3_jax.training.loss import GeneratorLossConfig
from racm3_jax.training.step import (
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "all": (2, 2, 2),
}


def train(toy, num_steps, *mesh_shape):
    state, step_fn, _, _ = toy.make_trainer(*mesh_shape)
    batches = toy.make_batches()
    losses = []
    for _ in range(num_steps):
        state, metrics = step_fn(state, next(batches))
        losses.append(float(metrics["objective"][0]))
    return losses, state


@pytest.fixture(scope="module")
def reference(toy):
    return train(toy, 3, 1, 1, 1)


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(toy, reference, axes):
    losses, state = train(toy, 3, *MESHES[axes])
    np.testing.assert_allclose(losses, reference[0], rtol=2e-6)
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_state_is_sharded_as_in_the_table(toy):
    state, step_fn, _, _ = toy.make_trainer(2, 2, 2)
    state, _ = step_fn(state, next(toy.make_batches()))
    spec = jax.sharding.PartitionSpec
    assert state.params["embedding"].sharding.spec == spec("tensor", "fsdp")
    assert state.params["up"].sharding.spec == spec("fsdp", "tensor")
    moments = [
        leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 32)
    ]
    assert len(moments) == 2
    assert {leaf.sharding.spec for leaf in moments} == {spec("fsdp", "tensor")}
    assert state.step.sharding.is_fully_replicated
    assert int(state.step) == 1


def test_state_is_donated(toy):
    state, step_fn, _, _ = toy.make_trainer()
    step_fn(state, next(toy.make_batches()))
    assert state.params["up"].is_deleted()


def test_abstract_state_has_the_shapes_and_places_of_the_real_one(toy):
    like, _, optimizer, mesh = toy.make_trainer(2, 2, 2)
    state = init_state(toy.init_fn, optimizer, mesh, jax.random.key(0))
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    abstract = abstract_state(toy.init_fn, optimizer, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for like, leaf in zip(
        jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True
    ):
        assert (like.shape, like.dtype) == (leaf.shape, leaf.dtype)
        assert like.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert state_shardings(abstract) is not None


def test_keys_follow_from_seed_and_step(toy):
    """The key differs from step to step and from seed to seed, and nothing else."""
    _, _, optimizer, mesh = toy.make_trainer()

    def noise(params, batch, key, step):
        value = jax.random.normal(key)
        return 0.0 * params["w"].sum() + value, {"step": (step, 1)}

    def run(seed):
        state = init_state(
            lambda key: {"w": jnp.ones(2)}, optimizer, mesh, jax.random.key(0)
        )
        step_fn = make_train_step(noise, optimizer, mesh, state, seed=seed)
        values = []
        for _ in range(3):
            state, metrics = step_fn(state, {"x": np.zeros(8)})
            values.append(float(metrics["objective"][0]))
        assert int(metrics["step"][0]) == 2
        return values

    first = run(0)
    assert len(set(first)) == 3
    assert run(0) == first
    assert not set(run(1)) & set(first)


def test_given_parameters_are_used(toy, equal_trees):
    state, step_fn, optimizer, mesh = toy.make_trainer(2, 2, 2)
    params = jax.tree.map(lambda p: np.asarray(p) + 1, state.params)
    given = init_state(toy.init_fn, optimizer, mesh, jax.random.key(0), params=params)
    assert equal_trees(given.params, params)
    assert equal_trees(given.opt_state, state.opt_state)
    step_fn(given, next(toy.make_batches()))


def test_given_parameters_must_fit(toy):
    state, _, optimizer, mesh = toy.make_trainer()
    params = jax.tree.map(np.asarray, state.params)
    short = {**params, "up": params["up"][:2], "sideways": params["down"]}
    with pytest.raises(ValueError, match="sideways is unknown; up is"):
        init_state(toy.init_fn, optimizer, mesh, jax.random.key(0), params=short)


def test_a_metric_is_a_pair(toy):
    _, _, optimizer, mesh = toy.make_trainer()
    state = init_state(
        lambda key: {"w": jnp.ones(2)}, optimizer, mesh, jax.random.key(0)
    )
    step_fn = make_train_step(
        lambda params, batch, key, step: (params["w"].sum(), {"bad": 1.0}),
        optimizer,
        mesh,
        state,
    )
    with pytest.raises(TypeError, match=r"metric 'bad' is float; .* \(sum, weight\)"):
        step_fn(state, {})


def test_eval_step_reports_the_loss_and_changes_nothing(toy):
    state, step_fn, _, mesh = toy.make_trainer(2, 2, 2)
    eval_step = make_eval_step(toy.loss_fn_with(GeneratorLossConfig()), mesh)
    batch = next(toy.make_batches())
    first, second = (eval_step(state.params, batch) for _ in range(2))
    assert float(first["loss"][0]) == float(second["loss"][0])
    _, metrics = step_fn(state, batch)
    np.testing.assert_allclose(first["loss"][0], metrics["loss"][0], rtol=1e-5)


def test_rows_must_divide(toy):
    state, step_fn, _, _ = toy.make_trainer(8)
    batch = toy.make_batch(np.random.default_rng(0), rows=6)
    with pytest.raises(sharding.ShardingError, match="6 rows does not divide over 8"):
        step_fn(state, batch)


def test_an_assigned_parameter_moves_by_its_gradient_unseen_by_the_optimizer():
    mesh = sharding.make_mesh(data=-1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))

    def loss_fn(params, batch, key, step):
        del key, step
        # 0, whose gradient is the old mean less the new one, 103.
        old = jax.lax.stop_gradient(params["means"]["a"])
        zero = (params["means"]["a"] - old) * (old - 103.0)
        loss = 0.5 * params["w"] ** 2 * batch.mean() + zero
        return loss, {"loss": (loss, jnp.ones(()))}

    params = {"w": jnp.float32(0.5), "means": {"a": jnp.float32(3.0)}}
    state = init_state(
        lambda key: params, optimizer, mesh, jax.random.key(0), params=params
    )
    step_fn = make_train_step(loss_fn, optimizer, mesh, state, assigned=("means",))
    state, metrics = step_fn(state, np.ones(8, np.float32))
    assert float(state.params["means"]["a"]) == 103.0
    assert (
        float(state.params["w"]) == 0.25
    )  # not clipped by the other's gradient of 100
    assert float(metrics["gradient_norm"][0]) == 0.5
