"""The training step: one `jax.jit` over a named mesh, even with one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from racm3_jax import sharding

# Overlaps the gathers of weights with the matmul before; without these options libtpu
# waits for every gather on v5p.
_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    }
}

Metrics = dict[str, tuple[Any, Any]]
"""`{name: (sum, weight)}`; see `racm3_jax.metrics`."""

LossFn = Callable[[Any, Any, jax.Array, jax.Array], tuple[Float[Array, ""], Metrics]]
"""`loss_fn(params, batch, key, step) -> (loss, metrics)`.

`batch` is any pytree of arrays, `key` is fresh for each step, `step` is an int32 scalar
(0 in the first step).
"""


class TrainState(flax.struct.PyTreeNode):
    """The training state. A step's randomness depends on `step` and the seed only.

    Attributes:
      step: number of updates so far.
      params: unboxed parameters, float32 master weights.
      opt_state: the optimizer's.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


class TrainStep:
    """`state, metrics = train_step(state, batch)`; `state` is donated.

    The call returns once the work is enqueued. Metrics are device scalars; reading one
    waits for the step.
    """

    def __init__(self, compiled: Callable[[TrainState, Any], Any], mesh: Mesh) -> None:
        self.compiled = compiled
        self.mesh = mesh

    def put_batch(self, batch: Any) -> Any:
        """Host arrays -> device arrays, rows split over the mesh."""
        return sharding.shard_batch(batch, self.mesh)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # `sharding.constrain_rows` uses the current mesh.
        with jax.set_mesh(self.mesh):
            return self.compiled(state, self.put_batch(batch))


def abstract_state(
    init_fn: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating anything.

    For `Checkpoints.restore`, and for checking an 8-GPU config on a laptop. See
    `init_state` for the arguments.
    """
    boxed = jax.eval_shape(init_fn, jax.random.key(0))
    param_shardings = sharding.shardings_for(boxed, mesh)
    params = meta.unbox(boxed)
    opt_state = jax.eval_shape(optimizer.init, params)
    # Moments are sharded like their parameters; counters etc. are replicated.
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, where: where,
        opt_state,
        param_shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(step=step, params=params, opt_state=opt_state)
    step_place: Any = sharding.replicated(mesh)
    places = TrainState(
        step=step_place, params=param_shardings, opt_state=opt_shardings
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        places,
    )


def state_shardings(state: TrainState) -> TrainState:
    """The `NamedSharding` of every leaf of a state, abstract or real."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(
    init_fn: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
    *,
    params: Any = None,
) -> TrainState:
    """Creates the initial state directly sharded on the mesh.

    Args:
      init_fn: `init_fn(key) -> params`, boxed with logical axis names or not, for
        example `lambda key: module.init(key, dummy)["params"]`.
      optimizer: from `optimizer.build_optimizer`.
      mesh: from `sharding.make_mesh`.
      key: for the initial parameters; equal keys give equal parameters on every mesh.
      params: start from these instead (unboxed, for example from `load_weights`).

    Raises:
      ValueError: `params` has other names or shapes than `init_fn` returns.
    """
    abstract = abstract_state(init_fn, optimizer, mesh)
    shardings = state_shardings(abstract)

    def with_optimizer(params: Any) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
        )

    if params is None:

        def create(key: jax.Array) -> TrainState:
            return with_optimizer(meta.unbox(init_fn(key)))

        return jax.jit(create, out_shardings=shardings)(key)
    check_same_shapes(abstract.params, params)
    placed = jax.tree.map(
        lambda where, leaf, like: jax.device_put(
            jnp.asarray(leaf, dtype=like.dtype), where
        ),
        shardings.params,
        params,
        abstract.params,
    )
    return jax.jit(with_optimizer, out_shardings=shardings)(placed)


def check_same_shapes(expected: Any, params: Any) -> None:
    """Compares two parameter trees by name and shape.

    Raises:
      ValueError: names the first missing or unknown parameters, or wrong shapes.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
        }

    want, got = shapes(expected), shapes(params)
    problems = [f"{name} is missing" for name in want if name not in got]
    problems += [f"{name} is unknown" for name in got if name not in want]
    problems += [
        f"{name} is {list(got[name])}, not {list(want[name])}"
        for name in want
        if name in got and got[name] != want[name]
    ]
    if problems:
        raise ValueError(
            f"the given parameters do not fit the model: {'; '.join(problems[:3])}"
            f" ({len(problems)} differences); check the model's config"
        )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    *,
    seed: int = 0,
    schedule: optax.Schedule | None = None,
    num_microbatches: int = 1,
    skip_nonfinite: bool = False,
    assigned: tuple[str, ...] = (),
) -> TrainStep:
    """Compiles forward, backward and update into one function.

    It adds to the loss's own metrics: `objective` (the scalar that is minimised),
    `gradient_norm` before clipping, `learning_rate` if a schedule is given, and
    `skipped_steps` with `skip_nonfinite`.

    Args:
      loss_fn: see `LossFn`; sums over the batch are global sums on every mesh.
      optimizer: from `optimizer.build_optimizer`.
      mesh: from `sharding.make_mesh`.
      state: the state (real or abstract) whose shardings the step keeps.
      seed: the step's key is `fold_in(key(seed), step)`, so a resumed run samples the
        same as an uninterrupted one.
      schedule: only logged.
      num_microbatches: number of sequential parts of the batch (gradient accumulation),
        to save activation memory; the gradient is that of the whole batch.
      skip_nonfinite: a step whose loss or gradient is not finite changes neither
        parameters nor optimizer state, on any host; its metrics have weight 0.
      assigned: parameters, by name or name prefix, that the optimizer does not update:
        the step subtracts their "gradient", by which the loss sets them to new values
        (running means).
    """
    differentiate = _accumulated_gradient(loss_fn, num_microbatches)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, metrics, gradients = differentiate(state.params, batch, key, state.step)
        params, opt_state, gradients = _update(optimizer, state, gradients, assigned)
        metrics["objective"] = (loss, jnp.ones(()))
        gradient_norm = optax.tree.norm(gradients)
        metrics["gradient_norm"] = (gradient_norm, jnp.ones(()))
        if skip_nonfinite:
            is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

            def keep(new: Array, old: Array) -> Array:
                return jnp.where(is_finite, new, old)

            params = jax.tree.map(keep, params, state.params)
            opt_state = jax.tree.map(keep, opt_state, state.opt_state)
            metrics = jax.tree.map(lambda x: jnp.where(is_finite, x, 0), metrics)
            metrics["skipped_steps"] = (1.0 - is_finite, jnp.ones(()))
        if schedule is not None:
            metrics["learning_rate"] = (schedule(state.step), jnp.ones(()))
        new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return new_state, metrics

    shardings = state_shardings(state)
    compiled = jax.jit(
        train_step,
        in_shardings=(shardings, None),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        # A saved executable takes all leaves, even those that the step does not read.
        keep_unused=True,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )
    return TrainStep(compiled, mesh)


def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    moves: Any,
    assigned: tuple[str, ...],
) -> tuple[Any, Any, Any]:
    """(parameters, optimizer state, the gradients that the optimizer was given).

    The last are 0 for `assigned` parameters, which move by what `moves` says of them.
    """

    def is_assigned(path: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return any(name == own or name.startswith(f"{own}/") for own in assigned)

    gradients = moves
    if assigned:
        gradients = jax.tree_util.tree_map_with_path(
            lambda path, g: jnp.zeros_like(g) if is_assigned(path) else g, moves
        )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if assigned:
        params = jax.tree_util.tree_map_with_path(
            lambda path, new, old, move: old - move if is_assigned(path) else new,
            params,
            state.params,
            moves,
        )
    return params, opt_state, gradients


def _accumulated_gradient(
    loss_fn: LossFn, num_microbatches: int
) -> Callable[[Any, Any, Array, Array], tuple[Array, Metrics, Any]]:
    """(params, batch, key, step) -> (loss, metrics, gradients) of the whole batch.

    The means of microbatches have different weights: each is weighted by the weight of
    its metric `loss`, so that the sum is the mean over the whole batch.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def visit(params: Any, batch: Any, key: Array, step: Array) -> tuple[Any, Any]:
        (loss, metrics), gradients = value_and_grad(params, batch, key, step)
        metrics = {name: _as_pair(name, value) for name, value in metrics.items()}
        return (loss, gradients), metrics

    def whole(params: Any, batch: Any, key: Array, step: Array) -> Any:
        (loss, gradients), metrics = visit(params, batch, key, step)
        return loss, metrics, gradients

    def in_parts(params: Any, batch: Any, key: Array, step: Array) -> Any:
        def split(x: Array) -> Array:
            rows, *rest = x.shape
            if rows % num_microbatches:
                raise ValueError(
                    f"a batch of {rows} rows does not split into {num_microbatches} "
                    "microbatches: choose a divisor"
                )
            # Every n-th row, so that rows stay on their device.
            return x.reshape(-1, num_microbatches, *rest).swapaxes(0, 1)

        def add(carry: Any, part: tuple[Any, Array]) -> tuple[Any, Metrics]:
            rows, number = part
            sums, metrics = visit(params, rows, jax.random.fold_in(key, number), step)
            weight = metrics["loss"][1]
            weighted = jax.tree.map(lambda x: x * weight, (sums, jnp.ones(())))
            return jax.tree.map(jnp.add, carry, weighted), metrics

        zeros = jax.tree.map(jnp.zeros_like, ((jnp.zeros(()), params), jnp.zeros(())))
        parts = (jax.tree.map(split, batch), jnp.arange(num_microbatches))
        (sums, weight), metrics = jax.lax.scan(add, zeros, parts)
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        loss, gradients = jax.tree.map(lambda x: x * scale, sums)
        return loss, jax.tree.map(lambda x: x.sum(0), metrics), gradients

    return whole if num_microbatches == 1 else in_parts


def make_eval_step(
    loss_fn: LossFn, mesh: Mesh, *, seed: int = 0
) -> Callable[[Any, Any], Metrics]:
    """`metrics = eval_step(params, batch)`: the loss's metrics without a gradient.

    The loss gets the same key and step 0 in every call, so evaluations of equal
    parameters on equal batches are equal.
    """

    @jax.jit
    def eval_step(params: Any, batch: Any) -> Metrics:
        _, metrics = loss_fn(params, batch, jax.random.key(seed), jnp.int32(0))
        return {name: _as_pair(name, value) for name, value in metrics.items()}

    def put_and_evaluate(params: Any, batch: Any) -> Metrics:
        with jax.set_mesh(mesh):
            return eval_step(params, sharding.shard_batch(batch, mesh))

    return put_and_evaluate


def _as_pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"metric {name!r} is {type(value).__name__}; a loss reports each metric as "
            "a tuple (sum, weight)"
        )
    return value
