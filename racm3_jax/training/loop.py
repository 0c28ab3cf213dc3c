"""The one training loop: generator, CLIP and VQGAN all run through `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from absl import logging

from racm3_jax.training.processes import ProcessHeartbeats, StopRequest, Watchdog
from racm3_jax.training.progress import StepLog, Writer, report_parameters
from racm3_jax.training.step import Metrics, TrainState


class Saver(Protocol):
    """Saves states; `racm3_jax.checkpoints.Checkpoints` is one."""

    def should_save(self, step: int) -> bool: ...

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None
    ) -> None: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps to trace with the profiler (view in TensorBoard or Perfetto).

    Attributes:
      first_step: first step of the trace.
      last_step: last step of the trace.
      directory: where it is written.
    """

    first_step: int
    last_step: int
    directory: Path

    def __post_init__(self) -> None:
        if not 1 <= self.first_step <= self.last_step:
            raise ValueError(
                "profile_steps=a:b needs 1 <= a <= b; got "
                f"{self.first_step}:{self.last_step}"
            )


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How long `fit` trains, and what it does between steps.

    Attributes:
      num_steps: total number of steps, including those before a resume.
      writer: receives every log line.
      checkpoints: `should_save(step)` is called after each step; saved at the end, too.
      checkpoint_extra: JSON-serialisable metadata stored with every checkpoint.
      log_every: steps between two log lines.
      eval_fn: `eval_fn(state) -> {name: number}`, logged as `eval/<name>`.
      eval_every: steps between two evaluations, one also at the end; 0: never.
      should_end: called before every step; True saves and ends the training.
      progress: show a progress bar on stderr.
      description: its label.
      with_stats: whether batches are pairs `(batch, {name: number})`, whose numbers are
        averaged into the log.
      max_skipped_steps: how many steps in a row may be skipped as not finite (see
        `make_train_step`) before training ends.
      peak_flops: FLOP/s of all devices together; with `flops_per_token` it gives the
        logged `mfu`.
      flops_per_token: FLOPs of a training step per input token.
      profile: steps to trace.
      watchdog_seconds: timeout of a step, which ends the process; see `Watchdog`.
      heartbeats: of several processes, so that the watchdog names the stuck one.
    """

    num_steps: int
    writer: Writer | None = None
    checkpoints: Saver | None = None
    checkpoint_extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_every: int = 50
    eval_fn: Callable[[TrainState], Mapping[str, float]] | None = None
    eval_every: int = 0
    should_end: Callable[[], bool] = lambda: False
    progress: bool = True
    description: str = "train"
    with_stats: bool = False
    max_skipped_steps: int = 0
    peak_flops: float = 0.0
    flops_per_token: float = 0.0
    profile: Profile | None = None
    watchdog_seconds: float = 0.0
    heartbeats: ProcessHeartbeats | None = None

    def open_log(self, step: int) -> StepLog:
        """The log of a run that starts after `step`."""
        log = StepLog(
            step, self.num_steps, self.writer, self.progress, self.description
        )
        log.max_skipped_steps = self.max_skipped_steps
        if self.flops_per_token:
            log.peak_tokens = self.peak_flops / self.flops_per_token
        return log


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    settings: FitSettings,
) -> TrainState:
    """Trains from `state.step` up to `settings.num_steps`.

    The host waits for the device only at log, evaluation and save points: while the
    device computes step t, the host fetches and transfers batch t+1.

    To resume, restore the state and start the iterator at `state.step`: the loop takes
    exactly one batch per step and none ahead of a save, so a state at step t means that
    batches 0..t-1 were used. SIGTERM and Ctrl-C save (if there are `checkpoints`) and
    return early; compare `state.step` with `num_steps`.

    Args:
      state: donated; use the returned one.
      step_fn: from `make_train_step`; it transfers the batch itself.
      batches: one pytree of arrays per step. The caller closes it.
      settings: see `FitSettings`.

    Returns:
      The state after the last step.

    Raises:
      TrainingDiverged: the objective of a step (named in the error) is not finite, or
        too many such steps in a row were skipped.
      RuntimeError: `batches` is exhausted early.
    """
    num_steps, checkpoints = settings.num_steps, settings.checkpoints
    eval_fn, eval_every = settings.eval_fn, settings.eval_every
    report_parameters(state.params, settings.progress)
    log = settings.open_log(int(state.step))
    step = saved_step = log.step

    def save() -> None:
        nonlocal saved_step
        log.flush()  # never save a state that has diverged
        watchdog.activity = f"saves step {step}"
        with log.paused():
            assert checkpoints is not None
            checkpoints.save(step, state, {**settings.checkpoint_extra, "step": step})
        saved_step = step

    with (
        log,
        StopRequest() as stop,
        _tracing(settings.profile) as trace,
        Watchdog(settings.watchdog_seconds, heartbeats=settings.heartbeats) as watchdog,
    ):
        while step < num_steps and not settings.should_end() and not stop.reached(step):
            trace(step, state)
            watchdog.activity = f"reads the batch of step {step + 1}"
            with log.waiting():
                batch, stats = _next_batch(batches, step, settings.with_stats)
            step += 1
            watchdog.activity = f"computes step {step}"
            state, metrics = step_fn(state, batch)
            log.enqueue(step, metrics, stats)
            watchdog.heartbeat()
            is_last = step == num_steps
            if is_last or (settings.log_every and step % settings.log_every == 0):
                log.write()
            if eval_fn and eval_every and (step % eval_every == 0 or is_last):
                log.flush()
                with log.paused():
                    log.write_evaluation(eval_fn(state))
            if checkpoints is not None and checkpoints.should_save(step):
                save()
        log.flush()
        if checkpoints is not None:
            if step > saved_step:
                save()
            checkpoints.wait()
    if step < num_steps and not settings.should_end():
        logging.warning("stopped by a signal after step %d of %d", step, num_steps)
    return jax.block_until_ready(state)


def _next_batch(
    batches: Iterator[Any], step: int, with_stats: bool
) -> tuple[Any, Mapping[str, Any]]:
    try:
        item = next(batches)
    except StopIteration:
        raise RuntimeError(
            f"the batches ended after step {step}: the iterator must be as long as "
            "the training"
        ) from None
    return item if with_stats else (item, {})


@contextlib.contextmanager
def _tracing(profile: Profile | None) -> Iterator[Callable[[int, TrainState], None]]:
    """Yields a function to call before each step: it starts and stops the trace."""
    running = False

    def trace(step: int, state: TrainState) -> None:
        nonlocal running
        if profile is None:
            return
        if not running and step + 1 == profile.first_step:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(str(profile.directory))
            running = True
        elif running and step == profile.last_step:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            running = False

    try:
        yield trace
    finally:
        if running:
            jax.profiler.stop_trace()
