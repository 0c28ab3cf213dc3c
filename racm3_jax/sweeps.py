"""Sweeps: trains each point of `get_hyper` in its own folder, then writes a table.

A sweep file is a config file with one more function, as in big_vision:

    def get_hyper(hyper):
        return hyper.product([
            hyper.sweep("config.optimizer.learning_rate", [1e-3, 3e-3]),
            hyper.sweep("config.pipeline.alpha", [0.0, 0.1, 1.0]),
        ])
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from racm3_jax import own_files

Point = dict[str, Any]
"""Overrides by dotted name, for example {"config.pipeline.alpha": 0.1}."""

RESULT_FILE = "result.json"
# A metric of a point is its mean over this last fraction of the log.
_LAST_SHARE = 0.1


class Hyper:
    """The argument of `get_hyper`, which builds lists of points."""

    @staticmethod
    def sweep(name: str, values: Sequence[Any]) -> list[Point]:
        """One point per value."""
        return [{name: value} for value in values]

    @staticmethod
    def fixed(name: str, value: Any) -> list[Point]:
        """One point, to be combined with others."""
        return [{name: value}]

    @staticmethod
    def product(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """Every combination; the last sweep varies fastest."""
        return [_merge(points) for points in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """The first points together, then the second ones, ...

        Raises:
          ValueError: sweeps of different lengths.
        """
        lengths = {len(sweep) for sweep in sweeps}
        if len(lengths) > 1:
            raise ValueError(
                f"zipit needs sweeps of one length; got {[len(s) for s in sweeps]}"
            )
        return [_merge(points) for points in zip(*sweeps, strict=True)]

    @staticmethod
    def chainit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """All points of the first sweep, then all of the second, ..."""
        return [point for sweep in sweeps for point in sweep]


def _merge(points: Sequence[Point]) -> Point:
    merged: Point = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise ValueError(f"a sweep sets {min(twice)} twice in one point")
        merged |= point
    return merged


def name_point(point: Point) -> str:
    """A folder name: readable, and unique by a hash of the whole point.

    {"config.optimizer.learning_rate": 0.001} -> "learning_rate=0.001-1f0c9a2b"
    """
    words = [f"{name.split('.')[-1]}={value}" for name, value in point.items()]
    text = ",".join(words).replace("/", "_")[:80]
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{text}-{digest[:8]}"


def as_flags(point: Point) -> list[str]:
    """The overrides as command-line flags."""
    return [f"--{name}={value}" for name, value in point.items()]


def run_sweep(
    points: Sequence[Point],
    workdir: Path,
    train_point: Callable[[Point, Path], None],
    *,
    say: Callable[[str], None] = print,
) -> list[tuple[Point, dict[str, float]]]:
    """Trains every point that has no result yet, one after the other.

    A point whose training fails is reported at the end; the others still run.

    Args:
      points: from `get_hyper`.
      workdir: gets one folder per point, and `sweep.json`.
      train_point: trains one point in its folder and writes `metrics.jsonl` there.
      say: receives one line per point.

    Returns:
      (point, its last metrics) of every finished point, in order.

    Raises:
      SweepError: names the points that failed.
      FileExistsError: `workdir` holds a `sweep.json` or `sweep.png` not written by
        racm3.
    """
    from racm3_jax.metrics import read_jsonl

    check_workdir(workdir)
    finished: list[tuple[Point, dict[str, float]]] = []
    failed: list[str] = []
    for number, point in enumerate(points, 1):
        name = name_point(point)
        folder = workdir / name
        result = folder / RESULT_FILE
        if not result.exists():
            say(f"point {number} of {len(points)}: {name}")
            try:
                train_point(point, folder)
                own_files.write_json(result, last_metrics(read_jsonl(folder)))
            except (ValueError, FloatingPointError, FileNotFoundError) as error:
                failed.append(f"{name}: {error}")
                continue
        finished.append((point, _read_result(result)))
    points_done = [{"point": point, "metrics": found} for point, found in finished]
    own_files.write_json(workdir / "sweep.json", {"points": points_done})
    if failed:
        raise SweepError(f"{len(failed)} points failed: {'; '.join(failed)}")
    return finished


class SweepError(ValueError):
    """Some points of a sweep failed; the others have their results."""


def check_workdir(workdir: Path) -> None:
    """Refuses a folder where a sweep would overwrite files of the user."""
    own_files.check(
        workdir / "sweep.json",
        workdir / "sweep.png",
        change="give another --workdir",
    )


def _read_result(path: Path) -> dict[str, float]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics.pop("made_by", None)
        return {name: float(value) for name, value in metrics.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and run the same command again"
        ) from None


def last_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the last tenth of a log, of every number in its last line."""
    tail = lines[-max(1, int(len(lines) * _LAST_SHARE)) :]
    means = {}
    for name, value in lines[-1].items():
        if isinstance(value, int | float) and name not in ("step", "time"):
            values = [x[name] for x in tail if x.get(name) is not None]
            means[name] = sum(values) / len(values)
    return means | {"step": lines[-1]["step"]}


def format_sweep(
    finished: Sequence[tuple[Point, Mapping[str, float]]], names: Sequence[str]
) -> str:
    """A table: the varied settings, then the metrics; sorted by loss."""
    rows = sorted(finished, key=lambda row: row[1].get("loss", float("inf")))
    keys = list(dict.fromkeys(key for point, _ in rows for key in point))
    shown = [n for n in names if any(n in metrics for _, metrics in rows)]
    table = [[key.removeprefix("config.") for key in keys] + shown]
    for point, metrics in rows:
        cells = [str(point.get(key, "")) for key in keys]
        cells += [f"{metrics[n]:.4f}" if n in metrics else "" for n in shown]
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def plot_sweep(points: Sequence[Point], workdir: Path, names: Sequence[str]) -> None:
    """`sweep.png`: the curves of all points."""
    from racm3_jax.metrics import plot_curves

    runs = {
        ", ".join(f"{k.split('.')[-1]}={v}" for k, v in point.items()): workdir
        / name_point(point)
        for point in points
    }
    plot_curves(runs, workdir / "sweep.png", names=names)
