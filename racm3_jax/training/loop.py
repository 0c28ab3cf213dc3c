"""The one training loop: generator, CLIP and VQGAN all run through `fit`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from absl import logging
from tqdm import tqdm

from racm3_jax.metrics import MetricSums
from racm3_jax.training.step import Metrics, TrainState

# Steps that may be enqueued beyond the one that runs: enough to hide the host's work,
# few enough that batches do not pile up in device memory.
MAX_STEPS_AHEAD = 2
# A spike is this many median deviations above the median of this many steps.
_SPIKE_WINDOW = 64
_SPIKE_SPREADS = 12.0


class Writer(Protocol):
    """Where scalars go; `racm3_jax.metrics.MetricsWriter` is one."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


class Saver(Protocol):
    """Where states go; `racm3_jax.checkpoints.Checkpoints` is one."""

    def should_save(self, step: int) -> bool: ...

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None
    ) -> None: ...

    def wait(self) -> None: ...


class TrainingDiverged(FloatingPointError):
    """The loss is no longer a finite number."""


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


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    *,
    num_steps: int,
    writer: Writer | None = None,
    checkpoints: Saver | None = None,
    checkpoint_extra: Mapping[str, Any] | None = None,
    log_every: int = 50,
    eval_fn: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    progress: bool = True,
    description: str = "train",
    batch_to_device: Callable[[Any], Any] | None = None,
    with_stats: bool = False,
    max_skipped_steps: int = 0,
    peak_flops: float = 0.0,
    flops_per_token: float = 0.0,
    profile: Profile | None = None,
) -> TrainState:
    """Trains from `state.step` up to `num_steps`.

    The host never waits for a step except at log, evaluation and save points: while
    the device computes step t, the host already fetches and transfers batch t+1.

    To resume, restore the state and start the iterator at `state.step`: the loop takes
    exactly one batch a step and none in advance of a save, so a state at step t means
    that batches 0..t-1 were used. SIGTERM and Ctrl-C save (when `checkpoints` is
    given) and return early; compare `state.step` with `num_steps`.

    Args:
      state: is donated; use the returned one.
      step_fn: from `make_train_step`.
      batches: one pytree of arrays a step; with `with_stats`, pairs
        `(batch, {name: number})` whose numbers are averaged into the log. Its `close`
        is left to the caller.
      num_steps: the last step's number, counted from the run's very start.
      writer: receives every log line.
      checkpoints: asked `should_save(step)` after each step, and saved at the end.
      checkpoint_extra: JSON-serialisable facts that are stored with every save.
      log_every: steps between two log lines.
      eval_fn: `eval_fn(state) -> {name: number}`, logged as `eval/<name>`.
      eval_every: steps between two evaluations, which also runs at the end; 0: never.
      progress: a progress bar on stderr.
      description: its label.
      batch_to_device: applied to each batch before the step; `step_fn` does the
        transfer itself when None.
      with_stats: see `batches`.
      max_skipped_steps: how many steps in a row may be skipped as not finite (see
        `make_train_step`) before training ends.
      peak_flops: of all devices together, a second; with `flops_per_token` it gives the
        logged `mfu`.
      flops_per_token: of a training step, a token of input.
      profile: steps to trace.

    Returns:
      The state after the last step.

    Raises:
      TrainingDiverged: the objective of some step, which it names, is not finite, or
        too many steps in a row were skipped for that.
      RuntimeError: `batches` ended early.
    """
    log = _Log(int(state.step), num_steps, writer, progress, description)
    log.max_skipped_steps = max_skipped_steps
    log.peak_tokens = peak_flops / flops_per_token if flops_per_token else 0.0
    step = saved_step = log.step

    def save() -> None:
        nonlocal saved_step
        log.flush()  # never save a state that has diverged
        with log.paused():
            assert checkpoints is not None
            checkpoints.save(step, state, {**(checkpoint_extra or {}), "step": step})
        saved_step = step

    with log, _stop_requested() as stop, _tracing(profile) as trace:
        while step < num_steps and not stop.is_set():
            trace(step, state)
            with log.waiting():
                batch, stats = _next_batch(batches, step, with_stats)
                if batch_to_device is not None:
                    batch = batch_to_device(batch)
            state, metrics = step_fn(state, batch)
            step += 1
            log.enqueue(step, metrics, stats)
            if step == num_steps or (log_every and step % log_every == 0):
                log.write()
            if eval_fn and eval_every and (step % eval_every == 0 or step == num_steps):
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
    if step < num_steps:
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


class _Log:
    """Collects metrics without waiting for them, and writes a line when told to."""

    def __init__(
        self,
        step: int,
        num_steps: int,
        writer: Writer | None,
        progress: bool,
        description: str,
    ) -> None:
        self.step = step
        self._writer = writer
        self._sums = MetricSums()
        self._stats = MetricSums()
        self._pending: list[tuple[int, Metrics]] = []
        self._first_step = step
        self.max_skipped_steps = 0
        self.peak_tokens = 0.0
        self._skipped_in_a_row = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=_SPIKE_WINDOW)
        # A terminal is redrawn often; a log file gets a line every 30 s.
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            desc=description,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        self._restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._clock_step = self.step
        self._waited_seconds = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of steps per second."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def enqueue(self, step: int, metrics: Metrics, stats: Mapping[str, Any]) -> None:
        self.step = step
        self._pending.append((step, metrics))
        self._stats.add_values(stats)
        self._bar.update(1)
        if step == self._first_step + 1:
            # Compilation is not part of steps per second.
            jax.block_until_ready(metrics)
            logging.info(
                "first step, with its compilation: %.1f s",
                time.perf_counter() - self._clock,
            )
            self._restart_clock()
        elif len(self._pending) > MAX_STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - MAX_STEPS_AHEAD][1])

    def flush(self) -> None:
        """Waits for all steps so far and adds their metrics up."""
        for step, metrics in jax.device_get(self._pending):
            objective = float(metrics["objective"][0])
            if not math.isfinite(objective):
                raise TrainingDiverged(
                    f"the loss of step {step} is {objective}: lower the learning "
                    "rate, or restart from the last checkpoint before that step"
                )
            self._count_skipped(step, metrics)
            self._warn_of_spike(step, objective)
            self._sums.add(metrics)
        self._pending.clear()

    def _count_skipped(self, step: int, metrics: Metrics) -> None:
        if not float(metrics.get("skipped_steps", (0.0, 1.0))[0]):
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        logging.warning("step %d was skipped: its gradient is not finite", step)
        if self._skipped_in_a_row > self.max_skipped_steps:
            raise TrainingDiverged(
                f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a "
                "gradient that is not finite: lower the learning rate, or restart from "
                "the last checkpoint before them"
            )

    def _warn_of_spike(self, step: int, objective: float) -> None:
        """A loss far above its recent values is worth a line in the log."""
        if len(self._recent) == _SPIKE_WINDOW:
            median = statistics.median(self._recent)
            spread = statistics.median(abs(x - median) for x in self._recent)
            if objective > median + _SPIKE_SPREADS * spread:
                logging.warning(
                    "the loss of step %d is %.3f; the median of the %d steps before is "
                    "%.3f",
                    step,
                    objective,
                    _SPIKE_WINDOW,
                    median,
                )
        self._recent.append(objective)

    def write(self) -> None:
        """Writes means since the last line, and rates.

        `data_wait_fraction` is the share of the time that the host spent on getting
        batches; as long as it is well below 1 the device does not wait for them.
        """
        self.flush()
        seconds = time.perf_counter() - self._clock
        steps = self.step - self._clock_step
        values = {**self._stats.compute(), **self._sums.compute()}
        if steps > 0:
            values["steps_per_second"] = steps / seconds
            values["data_wait_fraction"] = self._waited_seconds / seconds
            if "tokens" in values:
                values["tokens_per_second"] = values["tokens"] * steps / seconds
                if self.peak_tokens:
                    values["mfu"] = values["tokens_per_second"] / self.peak_tokens
        self._emit(values)
        shown = {"loss": values.get("loss", values["objective"])}
        if "tokens_per_second" in values:
            shown["tokens/s"] = round(values["tokens_per_second"])
        self._bar.set_postfix(shown)
        self._sums.clear()
        self._stats.clear()
        self._restart_clock()

    def write_evaluation(self, values: Mapping[str, float]) -> None:
        self._emit({f"eval/{name}": value for name, value in values.items()})

    def _emit(self, values: Mapping[str, float]) -> None:
        if self._writer is not None and jax.process_index() == 0:
            self._writer.write(self.step, values)


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


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous: dict[int, Any] = {}

    def request(signum: int, frame: Any) -> None:
        event.set()
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
