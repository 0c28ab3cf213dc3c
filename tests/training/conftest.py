"""A generator of two matrices, and batches for it: enough to train in milliseconds."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from racm3_jax import sharding
from racm3_jax.training.loss import GeneratorLossConfig, make_generator_loss
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    state_shardings,
)
from racm3_jax.types import Batch
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=20, num_image_codes=10, image_length=2, num_sentinels=14)
ROWS, LENGTH, WIDTH = 8, 12, 16
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=2, num_steps=8, weight_decay=0.1
)


class ToyGenerator(nn.Module):
    @nn.compact
    def __call__(self, inputs, positions, segment_ids):
        def weights(name, names, shape):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), names)
            return self.param(name, init, shape)

        x = weights("embedding", ("vocab", "embed"), (VOCAB.size, WIDTH))[inputs]
        x += jnp.sin(positions + segment_ids)[..., None]
        x = nn.relu(x @ weights("up", ("embed", "mlp"), (WIDTH, 32)))
        return x @ weights("down", ("mlp", "embed"), (32, WIDTH))


def make_batch(rng: np.random.Generator, rows: int = ROWS) -> Batch:
    def ids(high):
        return rng.integers(0, high, (rows, LENGTH)).astype(np.int32)

    return Batch(
        inputs=ids(VOCAB.size),
        targets=ids(VOCAB.size),
        loss_weights=rng.choice([0.0, 0.1, 1.0], (rows, LENGTH)).astype(np.float32),
        segment_ids=ids(3),
        positions=ids(LENGTH),
        is_main=rng.random((rows, LENGTH)) < 0.5,
    )


def make_batches(start_step: int = 0) -> Iterator[Batch]:
    step = start_step
    while True:
        yield make_batch(np.random.default_rng((7, step)))
        step += 1


def init_fn(key):
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    return ToyGenerator().init(key, ids, ids, ids)["params"]


def loss_fn_with(config: GeneratorLossConfig):
    return make_generator_loss(
        lambda params, *inputs: ToyGenerator().apply({"params": params}, *inputs),
        lambda params: params["embedding"].T,
        VOCAB,
        config,
    )


@functools.cache
def compiled_trainer(mesh_shape: tuple[int, int, int]):
    """One compilation per mesh for the whole session, and the first state on the host."""
    devices = jax.devices()[: math.prod(mesh_shape)]
    mesh = sharding.make_mesh(*mesh_shape, devices=devices)
    optimizer = build_optimizer(OPTIMIZER)
    shardings = state_shardings(abstract_state(init_fn, optimizer, mesh))
    if mesh_shape == (1, 1, 1):
        state = init_state(init_fn, optimizer, mesh, jax.random.key(0))
        host_state = jax.tree.map(np.array, state)
    else:
        host_state = compiled_trainer((1, 1, 1))[0]
    loss_fn = loss_fn_with(GeneratorLossConfig(chunk_length=5, z_loss=1e-3))
    state = place(host_state, shardings)
    step_fn = make_train_step(loss_fn, optimizer, mesh, state)
    return host_state, shardings, step_fn, optimizer, mesh


def place(host_state: TrainState, shardings: TrainState) -> TrainState:
    # Copied: device_put may alias the host's memory, and the state is donated.
    return jax.tree.map(lambda x, s: jax.device_put(x.copy(), s), host_state, shardings)


def make_trainer(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """(state, step_fn, optimizer, mesh) of the toy model on a number of devices."""
    host_state, shardings, *rest = compiled_trainer((data, fsdp, tensor))
    return place(host_state, shardings), *rest


@pytest.fixture(scope="session")
def toy():
    """The functions above, as attributes."""
    return types.SimpleNamespace(
        vocab=VOCAB,
        optimizer_config=OPTIMIZER,
        make_batch=make_batch,
        make_batches=make_batches,
        make_trainer=make_trainer,
        init_fn=init_fn,
        loss_fn_with=loss_fn_with,
    )


@pytest.fixture(scope="session")
def equal_trees():
    def equal(a, b) -> bool:
        """Bit for bit, on any devices."""
        same = jax.tree.map(
            lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
        )
        return all(jax.tree.leaves(same))

    return equal
