"""Progress of a training: bar, log lines, warnings; ends it when it diverges."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging as python_logging
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import jax
from absl import logging
from clu import parameter_overview
from tqdm import tqdm

from racm3_jax.metrics import MetricSums
from racm3_jax.progress import open_progress
from racm3_jax.training.step import Metrics

# Steps enqueued ahead of the running one: enough to hide the host's work, few enough to
# keep batches from piling up in device memory.
MAX_STEPS_AHEAD = 2
# A spike is this many median absolute deviations above the median of this many steps.
_SPIKE_WINDOW = 64
_SPIKE_SPREADS = 12.0


class Writer(Protocol):
    """Writes scalars; `racm3_jax.metrics.MetricsWriter` is one."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


class TrainingDiverged(FloatingPointError):
    """The loss is no longer a finite number."""


@dataclasses.dataclass
class _Alike:
    """Parameters whose names differ only in a number: a row of the table."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    number: int = 0
    size: int = 0


def describe_parameters(params: Any) -> str:
    """A table of names, shapes and sizes, and the total of all parameters.

    Equal parameters of numbered layers share a row:

        | Name                          | Shape        | Dtype   | Number | Size    |
        | layers_*/attention/key/kernel | (256, 4, 64) | float32 | 4      | 262,144 |
    """
    tree = dict(params) if isinstance(params, Mapping) else {"params": params}
    rows: dict[tuple[str, tuple[int, ...], str], _Alike] = {}
    num_bytes = 0
    for name, values in parameter_overview.flatten_dict(tree).items():
        kind = (re.sub(r"\d+", "*", name), values.shape, str(values.dtype))
        row = rows.setdefault(kind, _Alike(name, *kind[1:]))
        if row.number:
            row.name = kind[0]
        row.number += 1
        row.size += values.size
        num_bytes += values.nbytes
    total = sum(row.size for row in rows.values())
    table = parameter_overview.make_table(list(rows.values()))
    return f"{table}\nTotal: {total:,} -- {num_bytes:,} bytes"


def report_parameters(params: Any, progress: bool) -> None:
    """Prints and logs `describe_parameters`.

    Args:
      params: of the trained model.
      progress: print on stderr, unless logging does.
    """
    if jax.process_index() > 0:
        return
    table = describe_parameters(params)
    logging.info("trained parameters:\n%s", table)
    if progress and not logging.level_info():
        tqdm.write(table, file=sys.stderr)


@contextlib.contextmanager
def _log_above_the_bar() -> Iterator[None]:
    """Log lines appear above the progress bar instead of inside it."""
    consoles: list[Any] = [logging.get_absl_handler(), python_logging.lastResort]
    consoles += [
        handler
        for handler in python_logging.getLogger().handlers
        if isinstance(handler, python_logging.StreamHandler)
        and handler.stream in (sys.stdout, sys.stderr)
    ]

    def above(emit: Callable[[Any], None]) -> Callable[[Any], None]:
        def emit_above(record: Any) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                emit(record)

        return emit_above

    for handler in consoles:
        handler.emit = above(handler.emit)
    try:
        yield
    finally:
        for handler in consoles:
            del handler.emit  # restores the method of its class


class StepLog:
    """Collects metrics without waiting for them, and writes a line on request."""

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
        self._bar = open_progress(
            total=num_steps,
            initial=step,
            desc=description,
            unit="steps",
            disable=not progress,
        )
        self._restart_clock()

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        if not self._bar.disable:
            self._open.enter_context(_log_above_the_bar())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()
        self._bar.close()

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._clock_step = self.step
        self._waited_seconds = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from steps per second."""
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
            seconds = time.perf_counter() - self._clock
            self._stats.add_values({"first_step_seconds": seconds})
            if not self._bar.disable:
                tqdm.write(
                    f"first step, including compilation: {seconds:.1f} s",
                    file=sys.stderr,
                )
            self._restart_clock()
        elif len(self._pending) > MAX_STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - MAX_STEPS_AHEAD][1])

    def flush(self) -> None:
        """Waits for all steps so far and accumulates their metrics."""
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
        """Logs a loss far above its recent values."""
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

        `data_wait_fraction` is the fraction of time that the host spent waiting for
        batches; well below 1, the device does not wait for them. `mfu` is PaLM's (arXiv
        2204.02311, appendix B): FLOPs of forward and backward pass, without
        recomputation and padding, over the peak of all devices.
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
        shown: dict[str, float] = {}
        # Both are missing when every step since the last line was skipped.
        if "objective" in values:
            shown["loss"] = values.get("loss", values["objective"])
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
