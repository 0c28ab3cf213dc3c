"""Runs the experiments on the paper's claims on flagworld, or shows their state.

    python experiments/run_all.py                              # state and time of each
    python experiments/run_all.py --run                        # what is missing, in order
    python experiments/run_all.py --run --only=num_documents,kshot
    python experiments/run_all.py --run --tiny --out=out/tiny  # proves the code: minutes
    python experiments/run_all.py --run --only=kshot --first_seed=11 \\
        --against=experiments/results/science                  # do other seeds agree?

    taskset -c 0 python experiments/run_all.py --run --seeds=1   # and 2 on the other core

Each experiment has conditions x seeds cells; existing cells are not measured again, and
interrupted trainings resume. `--out` has cells, memories and models; `--results` gets
`NAME.json`, `NAME.md` and `NAME.png`. experiments/README.md is the summary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

from science import catalogue
from science.agreement import write_agreement
from science.cells import (
    hold,
    measure_cell,
    read_cell,
    read_cells,
    restore_cells,
    two_core_hours,
)
from science.experiment import FULL, TINY, Experiment, Place
from science.page import format_page
from science.report import write_report

RESULTS = ROOT / "experiments" / "results" / "science"
PAGE = ROOT / "experiments" / "README.md"
# Pause between two cells, so that others waiting for the lock get it.
PAUSE_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line; shows or runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="measure what is missing")
    parser.add_argument("--page", action="store_true", help="rewrite README.md")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--conditions", default="", help="only these conditions")
    parser.add_argument("--seeds", default="", help="only these seeds: 1,3")
    parser.add_argument("--tiny", action="store_true", help="a minimal world")
    parser.add_argument("--out", type=Path, default=Path("out/science"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}")
    parser.add_argument(
        "--first_seed", type=int, default=1, help="first of three seeds"
    )
    parser.add_argument("--against", type=Path, help="results to compare with")
    parser.add_argument("--lock", type=Path, help="lock file while a cell is measured")
    options = parser.parse_args(arguments)
    place = Place(options.out.resolve(), TINY if options.tiny else FULL)
    chosen = choose(options.only, options.first_seed, options.tiny)
    own = options.tiny or options.first_seed != 1
    results = options.results or (place.work / "results" if own else RESULTS)
    if options.run:
        wanted = set(filter(None, options.conditions.split(",")))
        seeds = choose_seeds(options.seeds, chosen[0].seeds)
        for experiment in chosen:
            run(experiment, place, results, wanted, options.lock, seeds)
            if options.against:
                write_agreement(experiment, results, options.against)
    if options.page:
        PAGE.write_text(format_page(catalogue.EXPERIMENTS, RESULTS))
    print(format_state(chosen, place, results))


def choose(only: str, first_seed: int, tiny: bool) -> list[Experiment]:
    """The experiments with these names and seeds; for a tiny run, their proof.

    Raises:
      SystemExit: a name that does not exist.
    """
    names = [name for name in only.split(",") if name]
    known = {e.name: e for e in catalogue.EXPERIMENTS}
    for name in names:
        if name not in known:
            raise SystemExit(f"--only={name}: choose from {', '.join(known)}")
    seeds = tuple(range(first_seed, first_seed + (1 if tiny else 3)))
    chosen = [e for e in known.values() if not names or e.name in names]
    if tiny:
        chosen = [prove(e) for e in chosen]
    return [dataclasses.replace(e, seeds=seeds) for e in chosen]


def choose_seeds(only: str, seeds: Collection[int]) -> set[int]:
    """The given seeds; empty means all.

    Raises:
      SystemExit: an unknown seed.
    """
    names = [name for name in only.split(",") if name]
    for name in names:
        if name not in map(str, seeds):
            raise SystemExit(
                f"--seeds={name}: choose from {', '.join(map(str, seeds))}"
            )
    return {int(name) for name in names}


def prove(experiment: Experiment) -> Experiment:
    """Only the conditions that test the code."""
    kept = [c for c in experiment.conditions if c in experiment.proof]
    values = dict(zip(experiment.conditions, experiment.x_values, strict=False))
    return dataclasses.replace(
        experiment,
        conditions={c: experiment.conditions[c] for c in kept},
        x_values=tuple(values[c] for c in kept if c in values),
    )


def run(
    experiment: Experiment,
    place: Place,
    results: Path,
    wanted: set[str],
    lock: Path | None,
    seeds: Collection[int] = (),
) -> None:
    """Measures the missing cells, seed by seed, and writes the report after each seed.

    Processes for different seeds may run in parallel.
    """
    restore_cells(experiment, place, results)
    chosen = [seed for seed in experiment.seeds if not seeds or seed in seeds]
    for seed in chosen:
        measured = False
        for condition in experiment.conditions:
            if wanted and condition not in wanted:
                continue
            if read_cell(experiment, condition, seed, place) is not None:
                continue
            if lock is not None:
                time.sleep(PAUSE_SECONDS)
            with hold(lock):
                cell = measure_cell(experiment, condition, seed, place)
            measured = True
            print(
                f"{experiment.name} {condition} seed {seed}: "
                f"{cell['wall_seconds']:.0f} s",
                flush=True,
            )
        if measured or seed == chosen[-1]:
            write_report(experiment, place, results)


def format_state(chosen: list[Experiment], place: Place, results: Path) -> str:
    """A table: experiment, state, hours, command."""
    rows = [("", "experiment", "state", "hours", "command")]
    for experiment in chosen:
        total = len(experiment.conditions) * len(experiment.seeds)
        cells = read_cells(experiment, place)
        taken = two_core_hours(cells.values())
        published = results / f"{experiment.name}.json"
        state, hours = "not started", f"{experiment.hours:.1f} estimated"
        if len(cells) == total:
            state, hours = "done", f"{taken:.2f} taken"
        elif cells:
            state = f"{len(cells)} of {total} cells"
            hours = f"{taken:.2f} of {hours}"
        elif published.exists():
            record = json.loads(published.read_text())
            full = record["cells_done"] == record["cells"]
            state = "published" + (
                "" if full else f", {record['cells_done']} of {record['cells']} cells"
            )
            hours = f"{record['two_core_hours']:.2f} taken"
        command = f"python experiments/run_all.py --run --only={experiment.name}"
        rows.append((str(experiment.number), experiment.name, state, hours, command))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    main()
