"""Metrics of a run: weighted sums, written as JSON lines and TensorBoard events.

A loss reports `{name: (sum, weight)}`; means are computed only when a line is written,
so that a mean over many steps (or devices, or packed rows of different fill) is a true
mean over all items, not a mean of means.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from racm3_jax import own_files

METRICS_NAME = "metrics.jsonl"


class MetricSums:
    """Accumulates `(sum, weight)` pairs by name, in float64 on the host.

    ```
    sums = MetricSums()
    sums.add({"loss": (6.0, 2.0)})
    sums.add({"loss": (2.0, 2.0)})
    sums.compute()  # {"loss": 2.0}
    ```
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds one step's metrics (Python numbers, NumPy or JAX scalars)."""
        for name, (total, weight) in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(total)
            self._weights[name] = self._weights.get(name, 0.0) + float(weight)

    def add_values(self, values: Mapping[str, Any]) -> None:
        """Adds plain numbers, each with weight 1; other values are skipped."""
        for name, value in values.items():
            if isinstance(value, str | bytes) or value is None:
                continue
            self.add({name: (value, 1.0)})

    def compute(self) -> dict[str, float]:
        """Means by name; names whose weights sum to 0 are omitted."""
        return {
            name: self._sums[name] / weight
            for name, weight in self._weights.items()
            if weight != 0
        }

    def total(self, name: str) -> float:
        """The unweighted sum of one metric, 0 if it was never added."""
        return self._sums.get(name, 0.0)

    def clear(self) -> None:
        self._sums.clear()
        self._weights.clear()


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl` and to TensorBoard event files.

    A resumed run appends; `read_jsonl` keeps the last line of each step. Event files
    are written by tensorboardX, without TensorFlow.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, tensorboard: bool = True
    ) -> None:
        directory = Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_NAME
        _check_lines(self.path)
        _drop_cut_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line `{"step": …, "time": unix seconds, name: value, …}`.

        Values that JSON cannot hold (nan, inf) are written as null.
        """
        step = int(step)
        scalars = {name: float(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3)}
        for name, value in scalars.items():
            line[name] = value if math.isfinite(value) else None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_lines(path: Path) -> None:
    """Refuses a file that was not written by this module."""
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        line = json.loads(first)
    except (ValueError, RecursionError):
        line = None
    is_cut = first and not first.endswith(b"\n")  # crashed in its first line
    if first and not (isinstance(line, dict) and "step" in line):
        if is_cut and first.startswith(b'{"step"'):
            return
        raise ValueError(
            f"{path} is not the log of a training, so nothing is added to it: give "
            "another --workdir"
        )


def _drop_cut_line(path: Path) -> None:
    """Removes an incomplete last line, left by a crash or a full disk."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` back, in step order.

    Lines of one step are merged (evaluation and training may both write one); the later
    line wins, so the steps that a resumed run repeats count once. An incomplete last
    line is skipped.

    Args:
      path: the file, or the workdir that contains it.

    Raises:
      FileNotFoundError: there are no metrics.
      ValueError: a line in the middle is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_NAME
    if not path.exists():
        raise FileNotFoundError(f"no metrics at {path}; give a workdir that trained")
    lines = path.read_text(encoding="utf-8").splitlines()
    steps: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        steps.setdefault(int(line["step"]), {}).update(line)
    return [steps[step] for step in sorted(steps)]


def plot_curves(
    paths: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
    output_path: str | os.PathLike[str],
    *,
    names: Iterable[str] = ("loss",),
) -> None:
    """Plots metrics over steps as a PNG, one panel per metric and one line per run.

    Args:
      paths: `metrics.jsonl` files or workdirs; a mapping gives each run its label.
      output_path: path of the PNG.
      names: the metrics to plot; a panel shows only the runs that have the metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not isinstance(paths, Mapping):
        paths = {str(path): path for path in paths}
    names = list(names)
    figure = Figure(figsize=(6 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    runs = {label: read_jsonl(path) for label, path in paths.items()}
    for panel, name in zip(panels, names, strict=True):
        for label, lines in runs.items():
            points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), label=label)
        panel.set(xlabel="step", ylabel=name)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    own_files.write_figure(output_path, figure)
