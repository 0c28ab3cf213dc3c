"""AdamW, its learning-rate schedule, weight decay and frozen parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from racm3_jax.limits import check_choices, check_range

SCHEDULES = ("linear", "cosine", "constant")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up. Defaults are RA-CM3's recipe as far as it is published.

    Attributes:
      learning_rate: the peak, reached after `warmup_steps`.
      warmup_steps: linear rise from 0.
      num_steps: the step at which the schedule has reached `final_fraction`.
      schedule: shape of the decay after the warm-up.
      final_fraction: learning rate at the end, as a fraction of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: decoupled; norms and biases do not decay, see `find_decayed`.
      clip_norm: maximum global gradient norm; 0 turns clipping off.
      first_moment_dtype: "bfloat16" halves the memory of the first moment. The second
        moment stays float32: a step's change of it, 2%, is near bfloat16's resolution.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1500
    num_steps: int = 100_000
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        choices = {"schedule": SCHEDULES, "first_moment_dtype": MOMENT_DTYPES}
        check_choices(self, "optimizer", **choices)
        for name in ("learning_rate", "num_steps", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"optimizer.{name} must be > 0; got {getattr(self, name)}"
                )
        rest = ("warmup_steps", "weight_decay", "clip_norm", "final_fraction")
        check_range(self, "optimizer", *rest, low=0)


def build_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the chosen decay."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    num_decay_steps = max(config.num_steps - config.warmup_steps, 1)
    if config.schedule == "linear":
        fall = optax.linear_schedule(peak, final, num_decay_steps)
    elif config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(
            peak, num_decay_steps, alpha=config.final_fraction
        )
    else:
        fall = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return fall
    # The first update uses step 0, so the warm-up starts above 0.
    rise = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([rise, fall], [config.warmup_steps])


# Axes of stacked copies and of a split width: they do not turn a vector into a matrix.
_NO_SPACE = ("layers", "head_dim")


def find_decayed(boxed_params: Any) -> dict[str, bool]:
    """Which parameters get weight decay, by name: those that map one space to another.

    ```
    embed, mlp                    decays     layers, heads, head_dim    a bias: no
    layers, embed, heads, head_dim  decays   norm                       no
    vocab, embed                  decays     layers, norm               no
    ```

    Args:
      boxed_params: arrays or shapes with their logical axis names, as `module.init`
        returns them; a parameter without names decays if it has two axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    return {
        _name(path): sum(name not in _NO_SPACE for name in leaf.names) > 1
        if isinstance(leaf, nn.Partitioned)
        else len(leaf.shape) > 1
        for path, leaf in leaves
    }


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def build_optimizer(
    config: OptimizerConfig, boxed_params: Any = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW without decay on norms and biases.

    Args:
      config: of the optimizer.
      boxed_params: the parameters' shapes with their logical axis names, see
        `find_decayed`; without them, all parameters with two axes decay.
    """
    decayed = {} if boxed_params is None else find_decayed(boxed_params)

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: decayed.get(_name(path), jnp.ndim(p) > 1), params
        )

    adamw = optax.adamw(
        build_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
        mu_dtype=config.first_moment_dtype,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


@dataclasses.dataclass(frozen=True)
class TrainedColumns:
    """Trains some columns of one matrix only; all other parameters keep their bits.

    ```
    head      . . . x x x . .    x: trained, with moments and decay
    the rest  . . . . . . . .    .: no gradient, no moments, no decay
    ```

    Attributes:
      name: of a matrix at the top of the parameter tree.
      start: first column.
      stop: one past the last column.
    """

    name: str
    start: int
    stop: int

    def take(self, params: Mapping[str, Any]) -> Float[Array, "rows columns"]:
        """The trained columns."""
        return params[self.name][:, self.start : self.stop]

    def restrict_loss(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The same loss of `(params, ...)`, with a gradient only for the columns.

        The backward pass then stops at the matrix; no other gradient is computed.
        """

        def restricted(params: Mapping[str, Any], *inputs: Any) -> Any:
            frozen = jax.tree.map(jax.lax.stop_gradient, dict(params))
            columns = self.take(params)
            whole = frozen[self.name].at[:, self.start : self.stop].set(columns)
            return loss_fn(frozen | {self.name: whole}, *inputs)

        return restricted

    def restrict(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The same optimizer for these columns only; its state has their size.

        The state is replicated: it is a small part of the model.
        """

        def init(params: Any) -> Any:
            # optax passes placeholders to get the state's structure.
            is_real = isinstance(params, Mapping)
            return optimizer.init(self.take(params) if is_real else jnp.zeros(()))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            assert params is not None  # AdamW decays them
            step, state = optimizer.update(self.take(updates), state, self.take(params))
            # Adding -0 changes no bit of any number, while +0 would turn -0 into +0.
            still = jax.tree.map(lambda p: jnp.full_like(p, -0.0), dict(params))
            moved = still[self.name].at[:, self.start : self.stop].set(step)
            return still | {self.name: moved}, state

        return optax.GradientTransformation(init, update)
