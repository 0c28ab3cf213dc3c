"""Gradient accumulation is the whole batch's gradient; a bad step changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.training.loop import FitSettings, Profile, fit
from racm3_jax.training.loss import GeneratorLossConfig
from racm3_jax.training.progress import TrainingDiverged
from racm3_jax.training.step import TrainState, make_train_step


def make_step(toy, **options):
    state, _, optimizer, mesh = toy.make_trainer()
    loss_fn = toy.loss_fn_with(GeneratorLossConfig(chunk_length=5, z_loss=1e-3))
    return state, make_train_step(loss_fn, optimizer, mesh, state, **options)


def test_microbatches_add_up_to_the_whole_batch(toy):
    """Microbatches have different sums of loss weights, sampled from 0, 0.1 and 1."""
    whole_state, whole, _, _ = toy.make_trainer()
    state, parts = make_step(toy, num_microbatches=4)
    batch = next(toy.make_batches())
    whole_state, expected = whole(whole_state, batch)
    state, metrics = parts(state, batch)
    assert set(metrics) == set(expected)
    for name in ("objective", "gradient_norm", "loss", "image_loss"):
        got, want = (m[name][0] / m[name][1] for m in (metrics, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(whole_state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_must_split_evenly(toy):
    state, step = make_step(toy, num_microbatches=3)
    with pytest.raises(ValueError, match="8 rows does not split into 3 microbatches"):
        step(state, next(toy.make_batches()))


def poison(batch):
    return batch._replace(loss_weights=np.full_like(batch.loss_weights, np.nan))


def test_a_step_that_is_not_finite_changes_no_bit(toy, equal_trees):
    state, step = make_step(toy, skip_nonfinite=True)
    batches = toy.make_batches()
    state, metrics = step(state, next(batches))
    assert float(metrics["skipped_steps"][0]) == 0.0
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, poison(next(batches)))
    assert int(state.step) == 2
    assert equal_trees(state.params, before.params)
    assert equal_trees(state.opt_state, before.opt_state)
    assert float(metrics["skipped_steps"][0]) == 1.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_without_the_guard_the_parameters_are_lost(toy):
    state, step, _, _ = toy.make_trainer()
    state, _ = step(state, poison(next(toy.make_batches())))
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@jax.jit
def skip_odd_runs(state, is_bad):
    metrics = {"objective": (1.0 - is_bad, 1.0), "skipped_steps": (is_bad, 1.0)}
    return state.replace(step=state.step + 1), metrics


def fit_with(pattern, limit):
    state = TrainState(step=jnp.int32(0), params=jnp.float32(1), opt_state=())
    batches = (np.float32(x == "x") for x in pattern)
    return fit(
        state,
        skip_odd_runs,
        batches,
        FitSettings(len(pattern), max_skipped_steps=limit, progress=False),
    )


def test_training_ends_after_too_many_skipped_steps_in_a_row():
    assert int(fit_with(".xx.xx.", 2).step) == 7
    with pytest.raises(TrainingDiverged, match="3 steps in a row, up to step 5"):
        fit_with("..xxx..", 2)


def test_a_trace_of_the_requested_steps_is_written(toy, tmp_path):
    state, step_fn, _, _ = toy.make_trainer()
    fit(
        state,
        step_fn,
        toy.make_batches(),
        FitSettings(3, progress=False, profile=Profile(2, 2, tmp_path)),
    )
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="profile_steps=a:b needs"):
        Profile(3, 2, tmp_path)


def test_mfu_is_the_fraction_of_the_peak(toy):
    lines = []

    class Writer:
        def write(self, step, values):
            lines.append(values)

    state, step_fn, _, _ = toy.make_trainer()
    fit(
        state,
        step_fn,
        toy.make_batches(),
        FitSettings(
            num_steps=3,
            writer=Writer(),
            progress=False,
            peak_flops=1e6,
            flops_per_token=50.0,
        ),
    )
    assert lines[-1]["mfu"] == pytest.approx(
        lines[-1]["tokens_per_second"] * 50.0 / 1e6
    )
