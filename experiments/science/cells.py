"""Cells on disk: measured once, one file each, with their cost.

work/full/cells/alpha/0.1-seed2.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from racm3_jax.evaluation.intervals import Share
from science.experiment import Curve, Experiment, Figures, Place

Cell = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def cell_path(experiment: Experiment, condition: str, seed: int, place: Place) -> Path:
    """File of the results of one cell."""
    name = f"{condition}-seed{seed}.json"
    return place.work / place.scale.name / "cells" / experiment.name / name


def read_cell(
    experiment: Experiment, condition: str, seed: int, place: Place
) -> Cell | None:
    """The cell, if it was measured with the current settings."""
    path = cell_path(experiment, condition, seed, place)
    if not path.exists():
        return None
    cell = json.loads(path.read_text())
    return cell if cell["settings"] == _settings(experiment) else None


def read_cells(experiment: Experiment, place: Place) -> dict[tuple[str, int], Cell]:
    """All existing cells, by (condition, seed)."""
    found = {}
    for condition in experiment.conditions:
        for seed in experiment.seeds:
            cell = read_cell(experiment, condition, seed, place)
            if cell is not None:
                found[condition, seed] = cell
    return found


def restore_cells(experiment: Experiment, place: Place, results: Path) -> int:
    """Restores cells from published results, so that they are not measured again.

    Returns:
      Their number, without cells of other settings or scale, or existing ones.
    """
    published = results / f"{experiment.name}.json"
    if not published.exists():
        return 0
    record = json.loads(published.read_text())
    settings = _settings(experiment)
    if record["settings"] != settings or record["scale"]["name"] != place.scale.name:
        return 0
    restored = 0
    for cell in record["measured"]:
        path = cell_path(experiment, cell["condition"], cell["seed"], place)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, cell | {"settings": settings})
            restored += 1
    return restored


def read_figures(cell: Cell) -> Figures:
    """The measured results."""
    return {
        name: Share(value["successes"], value["total"], value.get("design_effect", 1.0))
        if isinstance(value, dict)
        else float(value)
        for name, value in cell["figures"].items()
    }


def read_curves(cell: Cell) -> dict[str, Curve]:
    """The curves stored with it, if any."""
    return {name: Curve(**found) for name, found in cell.get("curves", {}).items()}


def measure_cell(
    experiment: Experiment, condition: str, seed: int, place: Place
) -> Cell:
    """Measures one cell and writes it atomically."""
    started, before = time.monotonic(), cpu_seconds()
    measured = experiment.measure(condition, seed, place)
    figures: Figures = {}
    curves: dict[str, Curve] = {}
    for name, value in measured.items():
        if isinstance(value, Curve):
            curves[name] = value
        else:
            figures[name] = value
    cell = {
        "experiment": experiment.name,
        "condition": condition,
        "seed": seed,
        "figures": {
            name: {"successes": value.successes, "total": value.total}
            if isinstance(value, Share)
            else float(value)
            for name, value in figures.items()
        },
        **({"curves": {n: c._asdict() for n, c in curves.items()}} if curves else {}),
        "settings": _settings(experiment),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(cpu_seconds() - before, 1),
        "num_cores": len(os.sched_getaffinity(0)),
        "commit": find_commit(),
    }
    path = cell_path(experiment, condition, seed, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, cell)
    return cell


def _settings(experiment: Experiment) -> Any:
    return json.loads(json.dumps(dict(experiment.settings), sort_keys=True))


def write_json(path: Path, record: Any) -> None:
    """Writes atomically (temporary file, then rename)."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    used = [resource.getrusage(resource.RUSAGE_SELF)]
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def two_core_hours(cells: Iterable[Cell]) -> float:
    """Hours on two cores; a cell that used one core counts half."""
    return sum(c["wall_seconds"] * c["num_cores"] for c in cells) / 2 / 3600


def find_commit() -> str:
    """The commit of the code, with a + where files differ from it; "" outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "racm3_jax", "configs"
    )
    return commit + ("+" if commit and changed else "")


@contextlib.contextmanager
def hold(lock: Path | None) -> Iterator[None]:
    """Holds a lock file (like flock(1)) for sharing a machine."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
