from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.checkpoints import Checkpoints
from racm3_jax.metrics import MetricsWriter, read_jsonl
from racm3_jax.training.loop import FitSettings, fit
from racm3_jax.training.progress import MAX_STEPS_AHEAD, TrainingDiverged
from racm3_jax.training.step import TrainState


class Recorder:
    """A writer and a saver that record their calls."""

    def __init__(self, save_interval=10**9):
        self.lines, self.saved, self.waited = [], [], 0
        self.save_interval = save_interval

    def write(self, step, values):
        self.lines.append((step, dict(values)))

    def should_save(self, step):
        return step % self.save_interval == 0

    def save(self, step, state, extra=None):
        assert int(state.step) == step
        self.saved.append((step, extra))

    def wait(self):
        self.waited += 1


@jax.jit
def count(state, batch):
    new = state.replace(step=state.step + 1, params=state.params + batch)
    return new, {
        "objective": (jnp.log(new.params), 1.0),
        "tokens": (10.0, 1.0),
        "mean": (batch, 2.0),
    }


def counting_state(step=0):
    return TrainState(step=jnp.int32(step), params=jnp.float32(1), opt_state=())


def quiet(state, step_fn, batches, **settings):
    return fit(state, step_fn, batches, FitSettings(progress=False, **settings))


def test_log_lines_have_means_since_the_last_line():
    log = Recorder()
    batches = iter(np.float32([1, 2, 3, 4, 5]))
    state = quiet(
        counting_state(), count, batches, num_steps=5, writer=log, log_every=2
    )
    assert int(state.step) == 5
    assert float(state.params) == 16
    assert [step for step, _ in log.lines] == [2, 4, 5]
    assert [values["mean"] for _, values in log.lines] == [0.75, 1.75, 2.5]
    first, *others = (values for _, values in log.lines)
    for values in (first, *others):
        tokens_a_step = values["tokens_per_second"] / values["steps_per_second"]
        assert tokens_a_step == pytest.approx(10)
        assert 0 <= values["data_wait_fraction"] <= 1


def test_stats_of_the_pipeline_are_logged():
    log = Recorder()
    batches = iter([(np.float32(1), {"dropped": n, "note": "x"}) for n in (1, 2, 6)])
    quiet(
        counting_state(),
        count,
        batches,
        num_steps=3,
        writer=log,
        log_every=3,
        with_stats=True,
    )
    assert log.lines[0][1]["dropped"] == 3


def test_starts_at_the_step_of_the_state():
    log = Recorder()
    quiet(
        counting_state(3),
        count,
        iter(np.float32([1, 1])),
        num_steps=5,
        writer=log,
        log_every=1,
    )
    assert [step for step, _ in log.lines] == [4, 5]


def test_takes_exactly_one_batch_per_step():
    batches = iter(np.ones(9, np.float32))
    quiet(counting_state(), count, batches, num_steps=4)
    assert len(list(batches)) == 5


def test_evaluates_and_saves_at_intervals_and_at_the_end():
    log = Recorder(save_interval=2)
    quiet(
        counting_state(),
        count,
        iter(np.ones(5, np.float32)),
        num_steps=5,
        writer=log,
        checkpoints=log,
        checkpoint_extra={"config": "abc"},
        log_every=0,
        eval_fn=lambda state: {"value": float(state.params)},
        eval_every=3,
    )
    assert [line for line in log.lines if "eval/value" in line[1]] == [
        (3, {"eval/value": 4.0}),
        (5, {"eval/value": 6.0}),
    ]
    assert log.saved == [(n, {"config": "abc", "step": n}) for n in (2, 4, 5)]
    assert log.waited


def test_divergence_names_the_step_and_is_not_saved():
    log = Recorder(save_interval=4)
    batches = iter(np.float32([1, 1, -9, 1, 1]))
    with pytest.raises(TrainingDiverged, match="the loss of step 3 is nan"):
        quiet(counting_state(), count, batches, num_steps=5, checkpoints=log)
    assert not log.saved


def test_a_line_of_only_skipped_steps_does_not_stop():
    def step_fn(state, batch):
        state = state.replace(step=state.step + 1)
        weight = float(batch)
        metrics = {"objective": (weight, weight), "skipped_steps": (1 - weight, 1.0)}
        return state, metrics

    log = Recorder()
    state = quiet(
        counting_state(),
        step_fn,
        iter([1, 0, 1]),
        num_steps=3,
        writer=log,
        log_every=1,
        max_skipped_steps=1,
    )
    assert int(state.step) == 3
    assert ["objective" in values for _, values in log.lines] == [True, False, True]


def test_batches_that_end_early_are_an_error():
    with pytest.raises(RuntimeError, match="ended after step 2"):
        quiet(counting_state(), count, iter(np.ones(2, np.float32)), num_steps=5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(signum):
    def batches():
        yield np.float32(1)
        os.kill(os.getpid(), signum)
        while True:
            yield np.float32(1)

    log = Recorder()
    before = signal.getsignal(signum)
    state = quiet(counting_state(), count, batches(), num_steps=99, checkpoints=log)
    assert int(state.step) == 2
    assert [step for step, _ in log.saved] == [2]
    assert signal.getsignal(signum) is before


def test_does_not_wait_for_the_running_step(monkeypatch):
    """Batch t+1 is fetched before step t is waited for."""
    events = []

    class Metric:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            events.append(f"wait {self.step}")

    def batches():
        for step in range(1, 6):
            events.append(f"fetch {step}")
            yield step

    def step_fn(state, batch):
        events.append(f"run {batch}")
        return state.replace(step=np.int32(batch)), {"objective": Metric(batch)}

    monkeypatch.setattr(
        jax,
        "device_get",
        lambda pending: [(n, {"objective": (0, 1)}) for n, _ in pending],
    )
    quiet(counting_state(), step_fn, batches(), num_steps=5)
    # The first step is compiled and waited for; later ones run ahead.
    assert events.index("wait 1") < events.index("fetch 2")
    for step in (2, 3):
        ahead = events.index(f"run {step + MAX_STEPS_AHEAD}")
        assert ahead < events.index(f"wait {step}")


def test_four_steps_equal_two_and_restore_and_two(toy, tmp_path, equal_trees):
    mesh = (2, 2, 2)
    state, step_fn, _, _ = toy.make_trainer(*mesh)
    whole = quiet(state, step_fn, toy.make_batches(), num_steps=4)

    state, step_fn, _, _ = toy.make_trainer(*mesh)
    with Checkpoints(tmp_path, save_interval=2) as checkpoints:
        quiet(state, step_fn, toy.make_batches(), num_steps=2, checkpoints=checkpoints)
    like, step_fn, _, _ = toy.make_trainer(*mesh)
    with Checkpoints(tmp_path) as checkpoints:
        state, extra = checkpoints.restore(checkpoints.latest_good(), like)
    assert extra["step"] == int(state.step) == 2
    parts = quiet(state, step_fn, toy.make_batches(2), num_steps=4)
    assert equal_trees(parts, whole)


def test_real_training_lowers_the_loss_and_logs_it(toy, tmp_path):
    state, step_fn, _, _ = toy.make_trainer()
    batch = toy.make_batch(np.random.default_rng(0))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        fit(
            state,
            step_fn,
            iter([batch] * 8),
            FitSettings(num_steps=8, writer=writer, log_every=4),
        )
    first, last = read_jsonl(tmp_path)
    assert last["loss"] < first["loss"]
    assert {"gradient_norm", "text_loss"} <= set(last)
