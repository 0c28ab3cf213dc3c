"""Early stopping when the held-out loss no longer falls."""

from __future__ import annotations

import types
from typing import Any

from racm3_jax.training.heldout import HeldOut


def run(losses, patience, history=()):
    kept = []
    values = iter(losses)
    judged: Any = HeldOut(
        lambda state: {"loss": next(values)},
        patience,
        lambda state: kept.append(state.step),
        history,
    )
    step = len(history)
    while step < len(history) + len(losses) and not judged.is_over:
        step += 1
        judged(types.SimpleNamespace(step=step))
    return judged, step, kept


def test_it_ends_when_the_patience_is_used_up():
    judged, step, kept = run([3.0, 2.0, 2.0, 2.5, 1.0], patience=2)
    assert (step, judged.best_step, kept) == (4, 2, [1, 2])
    assert run([3.0, 2.0, 2.0, 1.9, 2.5], patience=2)[1] == 5
    assert not run([1.0, float("nan"), 2.0], patience=0)[0].is_over


def test_a_resumed_training_ends_where_an_uninterrupted_one_does():
    judged, step, _ = run(
        [2.5, 1.0], patience=2, history=[[1, 3.0], [2, 2.0], [3, 2.0]]
    )
    assert step == 4 and judged.is_over
    again, _, kept = run([1.0], patience=2, history=[[1, 3.0], [2, float("inf")]])
    assert again.history == [[1, 3.0], [2, float("inf")], [3, 1.0]] and kept == [3]
