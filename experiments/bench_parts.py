"""Time breakdown of a training step: part of experiments/bench_train.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from racm3_jax.model.attention import attention
from racm3_jax.model.contract import contract
from racm3_jax.model.transformer import head_weights
from racm3_jax.training.loss import chunked_cross_entropy


def time_call(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds, after one call for compilation."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def time_parts(ours: Any, config: Any, repeats: int) -> dict[str, float]:
    """Seconds of the parts of a step, each compiled separately.

    Args:
      ours: the `Ours` of bench_train.py.
      config: of its model.
      repeats: number of calls for the median.
    """
    params, batch = ours.state.params, ours.batch
    key, step = jax.random.key(0), jnp.int32(0)
    gradient = jax.jit(jax.grad(lambda p: ours.loss_fn(p, batch, key, step)[0]))
    forward = jax.jit(lambda p: ours.loss_fn(p, batch, key, step)[0])
    gradients = gradient(params)

    @jax.jit
    def update(params: Any, opt_state: Any) -> Any:
        updates, opt_state = ours.optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rows, length = batch.inputs.shape
    dtype = jnp.dtype(config.compute_dtype)
    shape = (rows, length, config.num_heads, config.head_dim)
    q = jax.random.normal(key, shape, dtype)
    attend = jax.jit(
        jax.grad(
            lambda q: attention(q, q, q, batch.segment_ids).astype(jnp.float32).sum()
        )
    )
    x = jax.random.normal(key, (rows, length, config.d_model), dtype)
    head = jax.jit(
        jax.grad(
            lambda x, w: (
                chunked_cross_entropy(
                    x,
                    head_weights({"embedding": w}, config),
                    batch.targets,
                    batch.loss_weights,
                ).total
            ),
            (0, 1),
        )
    )
    wide = jax.random.normal(key, (config.d_model, config.d_ff))
    product = jax.jit(
        jax.grad(
            lambda x, w: contract("bld,df->blf", x, w, config.compute_dtype).sum(),
            (0, 1),
        )
    )
    layers = config.num_layers
    # A layer's matmuls, in units of d_model x d_ff: up, down, q, k, v, out.
    units = 2 + 4 * config.num_heads * config.head_dim / config.d_ff
    return {
        "forward": time_call(lambda: forward(params), repeats),
        "forward and backward": time_call(lambda: gradient(params), repeats),
        "of it: matmuls of all layers": layers
        * units
        * time_call(lambda: product(x, wide), repeats),
        "of it: attention of all layers": layers
        * time_call(lambda: attend(q), repeats),
        "of it: head and loss": time_call(
            lambda: head(x, params["embedding"]), repeats
        ),
        "clipping and AdamW": time_call(
            lambda: update(params, ours.state.opt_state), repeats
        ),
    }
