"""Held-out loss during training: the best step so far, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from racm3_jax.training.step import TrainState

Evaluate = Callable[[TrainState], Mapping[str, float]]


class HeldOut:
    """Evaluates states and implements early stopping.

    Its history is part of every checkpoint, so that a resumed run stops where an
    uninterrupted one does.

    Args:
      evaluate: state -> metrics by name, including "loss".
      patience: consecutive evaluations without a lower loss that end it; 0: off.
      keep: called with each state that is the best so far; only with a patience.
      history: [step, loss] of earlier evaluations.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        patience: int,
        keep: Callable[[TrainState], None],
        history: Sequence[Sequence[float]] = (),
    ) -> None:
        self._evaluate = evaluate
        self._patience = patience
        self._keep = keep
        self.history: list[list[float]] = [list(entry) for entry in history]

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        """The metrics of this state; records its loss."""
        values = self._evaluate(state)
        step, loss = int(state.step), float(values["loss"])
        # A resumed training repeats the steps since its checkpoint.
        self.history[:] = [entry for entry in self.history if entry[0] < step]
        self.history.append([step, loss if math.isfinite(loss) else math.inf])
        if self._patience and self.best_step == step:
            self._keep(state)
        return values

    @property
    def best_step(self) -> int:
        """The (first) step of the lowest loss; 0 before any evaluation."""
        best = min(self.history, key=lambda entry: entry[1], default=[0])
        return int(best[0])

    @property
    def is_over(self) -> bool:
        """Whether the loss has not decreased for `patience` evaluations."""
        since = sum(entry[0] > self.best_step for entry in self.history)
        return bool(self._patience) and since >= self._patience
