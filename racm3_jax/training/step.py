"""The training step: one `jax.jit` over a named mesh, also when there is one device."""

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

Metrics = dict[str, tuple[Any, Any]]
"""`{name: (sum, weight)}`; see `racm3_jax.metrics`."""

LossFn = Callable[[Any, Any, jax.Array, jax.Array], tuple[Float[Array, ""], Metrics]]
"""`loss_fn(params, batch, key, step) -> (loss, metrics)`.

`batch` is any pytree of arrays, `key` is fresh for each step, `step` is an int32 scalar
(0 in the first step).
"""


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes. The step's randomness follows from `step` and the seed.

    Attributes:
      step: updates done so far.
      params: unboxed parameters, float32 master weights.
      opt_state: the optimizer's.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


class TrainStep:
    """`state, metrics = train_step(state, batch)`; `state` is donated.

    The call returns as soon as the work is enqueued. Metrics are device scalars; reading
    one waits for the step.
    """

    def __init__(self, compiled: Callable[[TrainState, Any], Any], mesh: Mesh) -> None:
        self.compiled = compiled
        self.mesh = mesh

    def put_batch(self, batch: Any) -> Any:
        """Host arrays -> device arrays, rows split over the mesh."""
        return sharding.shard_batch(batch, self.mesh)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # The current mesh is what `sharding.constrain_rows` refers to.
        with jax.set_mesh(self.mesh):
            return self.compiled(state, self.put_batch(batch))


def abstract_state(
    init_fn: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating anything.

    What `Checkpoints.restore` wants, and what an 8-GPU config is checked with on a
    laptop. See `init_state` for the arguments.
    """
    boxed = jax.eval_shape(init_fn, jax.random.key(0))
    param_shardings = sharding.shardings_for(boxed, mesh)
    params = meta.unbox(boxed)
    opt_state = jax.eval_shape(optimizer.init, params)
    # Moments lie as their parameters do; counters and the like are copied.
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
    """Creates the first state directly in its places on the mesh.

    Args:
      init_fn: `init_fn(key) -> params`, boxed with logical axis names or not, for
        example `lambda key: module.init(key, dummy)["params"]`.
      optimizer: from `optimizer.build_optimizer`.
      mesh: from `sharding.make_mesh`.
      key: randomness of the initial parameters; equal keys give equal parameters on
        every mesh.
      params: start from these instead (unboxed, for example from `load_weights`).

    Raises:
      ValueError: `params` with other names or shapes than `init_fn` makes.
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
      ValueError: names the first parameters that are missing, unknown or misshapen.
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
) -> TrainStep:
    """Compiles forward, backward and update into one function.

    To the loss's own metrics it adds `objective` (the scalar that is minimised),
    `gradient_norm` before clipping, and `learning_rate` when a schedule is given.

    Args:
      loss_fn: see `LossFn`; sums over the batch are global sums on every mesh.
      optimizer: from `optimizer.build_optimizer`.
      mesh: from `sharding.make_mesh`.
      state: the state (real or abstract) whose shardings the step keeps.
      seed: the step's key is `fold_in(key(seed), step)`, so a resumed run draws what
        the uninterrupted one would have drawn.
      schedule: only logged.
    """

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, key, state.step
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: _as_pair(name, value) for name, value in metrics.items()}
        metrics["objective"] = (loss, jnp.ones(()))
        metrics["gradient_norm"] = (optax.tree.norm(gradients), jnp.ones(()))
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
    )
    return TrainStep(compiled, mesh)


def make_eval_step(
    loss_fn: LossFn, mesh: Mesh, *, seed: int = 0
) -> Callable[[Any, Any], Metrics]:
    """`metrics = eval_step(params, batch)`: the loss's metrics without a gradient.

    The loss sees the same key and step 0 at every call, so evaluations of equal
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
