"""The one training loop: generator, CLIP and VQGAN all run through `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from absl import logging

from racm3_jax.training.processes import SignsOfLife, StopRequest, Watchdog
from racm3_jax.training.progress import StepLog, Writer, report_parameters
from racm3_jax.training.step import Metrics, TrainState


class Saver(Protocol):
    """Where states go; `racm3_jax.checkpoints.Checkpoints` is one."""

    def should_save(self, step: int) -> bool: ...

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None
    ) -> None: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps a trace is written of (open it in TensorBoard or Perfetto).

    Attributes:
      first_step: the trace begins before this step.
      last_step: and ends after this one.
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
    """How long `fit` trains, and what it does beside the steps.

    Attributes:
      num_steps: the last step's number, counted from the run's very start.
      writer: receives every log line.
      checkpoints: asked `should_save(step)` after each step, and saved at the end.
      checkpoint_extra: JSON-serialisable facts that are stored with every save.
      log_every: steps between two log lines.
      eval_fn: `eval_fn(state) -> {name: number}`, logged as `eval/<name>`.
      eval_every: steps between two evaluations, which also runs at the end; 0: never.
      should_end: asked before every step; True ends the training there, after a save.
      progress: a progress bar on stderr.
      description: its label.
      with_stats: whether batches come as pairs `(batch, {name: number})`, whose numbers
        are averaged into the log.
      max_skipped_steps: how many steps in a row may be skipped as not finite (see
        `make_train_step`) before training ends.
      peak_flops: of all devices together, a second; with `flops_per_token` it gives the
        logged `mfu`.
      flops_per_token: of a training step, a token of input.
      profile: steps to trace.
      watchdog_seconds: ends the process when no step ends for so long; see `Watchdog`.
      signs: of several processes, for the watchdog to name the one that is stuck.
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
    signs: SignsOfLife | None = None

    def open_log(self, step: int) -> StepLog:
        """The log of a training that begins after `step`."""
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

    The host never waits for a step except at log, evaluation and save points: while
    the device computes step t, the host already fetches and transfers batch t+1.

    To resume, restore the state and start the iterator at `state.step`: the loop takes
    exactly one batch a step and none in advance of a save, so a state at step t means
    that batches 0..t-1 were used. SIGTERM and Ctrl-C save (when there are `checkpoints`)
    and return early; compare `state.step` with `num_steps`.

    Args:
      state: is donated; use the returned one.
      step_fn: from `make_train_step`; it transfers the batch itself.
      batches: one pytree of arrays a step. Its `close` is left to the caller.
      settings: see `FitSettings`.

    Returns:
      The state after the last step.

    Raises:
      TrainingDiverged: the objective of some step, which it names, is not finite, or
        too many steps in a row were skipped for that.
      RuntimeError: `batches` ended early.
    """
    num_steps, checkpoints = settings.num_steps, settings.checkpoints
    eval_fn, eval_every = settings.eval_fn, settings.eval_every
    report_parameters(state.params, settings.progress)
    log = settings.open_log(int(state.step))
    step = saved_step = log.step

    def save() -> None:
        nonlocal saved_step
        log.flush()  # never save a state that has diverged
        dog.doing = f"saves step {step}"
        with log.paused():
            assert checkpoints is not None
            checkpoints.save(step, state, {**settings.checkpoint_extra, "step": step})
        saved_step = step

    with (
        log,
        StopRequest() as stop,
        _tracing(settings.profile) as trace,
        Watchdog(settings.watchdog_seconds, signs=settings.signs) as dog,
    ):
        while step < num_steps and not settings.should_end() and not stop.reached(step):
            trace(step, state)
            dog.doing = f"reads the batch of step {step + 1}"
            with log.waiting():
                batch, stats = _next_batch(batches, step, settings.with_stats)
            step += 1
            dog.doing = f"computes step {step}"
            state, metrics = step_fn(state, batch)
            log.enqueue(step, metrics, stats)
            dog.pat()
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
            f"the batches ended after step {step}: give an iterator that is as long "
            "as the training"
        ) from None
    return item if with_stats else (item, {})


@contextlib.contextmanager
def _tracing(profile: Profile | None) -> Iterator[Callable[[int, TrainState], None]]:
    """Yields what is called before each step: it starts and ends the trace."""
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
