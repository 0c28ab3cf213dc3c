"""The components of a training of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from racm3_jax.training.heldout import Evaluate
from racm3_jax.training.optimizer import TrainedColumns
from racm3_jax.training.step import LossFn, TrainState, TrainStep, init_state
from racm3_jax.wiring.sections import TrainConfig, construct
from racm3_jax.wiring.steps import build_train_step


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that `run.train` needs, for any kind of model.

    Attributes:
      state: initial state, sharded over the mesh.
      step_fn: (state, batch) -> (state, metrics), compiled.
      make_batches: start step -> iterator of batches.
      num_steps: last step of the training.
      export: writes the trained model to the work directory.
      with_stats: whether batches are pairs `(batch, statistics)`.
      flops_per_token: of a step, PaLM's count; 0 if not needed.
      inputs: fingerprints, by name, of inputs that a resumed run must find unchanged.
      num_main_documents: number of training documents; 0 if they are not from a memory.
      evaluate: evaluates a state on held-out documents; None: no evaluation.
    """

    state: TrainState
    step_fn: TrainStep
    make_batches: Callable[[int], Iterator[Any]]
    num_steps: int
    export: Callable[[TrainState], None]
    with_stats: bool = False
    flops_per_token: float = 0.0
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_main_documents: int = 0
    evaluate: Evaluate | None = None


def take_rows(
    batches: Iterator[Any], rows: Int64[np.ndarray, " rows"]
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of batches that every process makes completely."""
    for batch in batches:
        yield {name: values[rows] for name, values in batch.items()}


def make_job(
    config: Any,
    mesh: Mesh,
    init_fn: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    make: Callable[[int], Iterator[Any]],
    export: Callable[[TrainState], None],
    params: Any = None,
    with_stats: bool = False,
    flops_per_token: float = 0.0,
    trained: TrainedColumns | None = None,
    evaluate: Evaluate | None = None,
    assigned: tuple[str, ...] = (),
) -> Job:
    """A `Job` for `loss_fn`; for the arguments see `Job` and `build_train_step`."""
    state, step_fn = build_train_step(
        config,
        mesh,
        loss_fn,
        init_fn,
        lambda optimizer: init_state(
            init_fn, optimizer, mesh, jax.random.key(config.seed), params=params
        ),
        trained,
        assigned,
    )
    return Job(
        state,
        step_fn,
        make,
        construct(TrainConfig, config.train, "train").num_steps,
        export,
        with_stats,
        flops_per_token,
        evaluate=evaluate,
    )
