"""Held-out loss while a model trains: what is best so far, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from racm3_jax.training.step import TrainState

Evaluate = Callable[[TrainState], Mapping[str, float]]


class HeldOut:
    """Judges states, and says whether further training is worth it.

    Its history goes into every checkpoint, so that a resumed training stops where an
    unbroken one does.

    Args:
      evaluate: state -> figures by name, "loss" among them.
      patience: evaluations in a row without a lower loss that end a training; 0: none do.
      keep: called with a state that is the best so far; with a patience alone.
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
        """The figures of this state; remembers its loss."""
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
        """The step of the lowest loss, the first where several have it; 0 before any."""
        best = min(self.history, key=lambda entry: entry[1], default=[0])
        return int(best[0])

    @property
    def is_over(self) -> bool:
        """Whether the loss has not fallen for the whole patience."""
        since = sum(entry[0] > self.best_step for entry in self.history)
        return bool(self._patience) and since >= self._patience
