"""Checks whether the results agree with another run with other seeds.

A result agrees if the other run's mean is in the first run's 95% interval, or the first
one's in the other's: both are means of few seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from science.cells import write_json
from science.experiment import Experiment


def write_agreement(experiment: Experiment, rerun: Path, published: Path) -> Path:
    """Compares two folders of results; writes `rerun_NAME.json` and `.md` to `published`.

    Raises:
      FileNotFoundError: one of them has no results of this experiment.
    """
    first, second = (
        json.loads((folder / f"{experiment.name}.json").read_text())
        for folder in (published, rerun)
    )
    rows = compare_results(experiment, first["figures"], second["figures"])
    agreeing = sum(row["agrees"] for row in rows)
    record = {
        "experiment": experiment.name,
        "seeds": first["seeds"],
        "rerun_seeds": second["seeds"],
        "commits": first["commits"],
        "rerun_commits": second["commits"],
        "rerun_wall_seconds": second["wall_seconds"],
        "agreeing": agreeing,
        "compared": len(rows),
        "rows": rows,
    }
    write_json(published / f"rerun_{experiment.name}.json", record)
    summary = (
        f"{agreeing} of {len(rows)} figures of `{experiment.name}` agree between seeds "
        f"{first['seeds']} and seeds {second['seeds']} (other worlds, other samples)."
    )
    lines = [
        summary,
        "",
        "| | figure | published | rerun | agrees |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [_show(row[key], row["is_share"]) for key in ("published", "rerun")]
        agrees = "yes" if row["agrees"] else "**no**"
        lines.append(
            f"| {row['condition']} | {row['figure']} | {shown[0]} | {shown[1]} | "
            f"{agrees} |"
        )
    path = published / f"rerun_{experiment.name}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def compare_results(
    experiment: Experiment, first: dict[str, Any], second: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for every result of the table that both runs have."""
    rows = []
    for condition, title in experiment.conditions.items():
        for name, words in experiment.columns.items():
            a = first.get(condition, {}).get(name)
            b = second.get(condition, {}).get(name)
            if a is None or b is None:
                continue
            rows.append(
                {
                    "condition": title,
                    "figure": words,
                    "published": a,
                    "rerun": b,
                    "is_share": a["is_share"],
                    "agrees": _inside(b["value"], a["interval95"])
                    or _inside(a["value"], b["interval95"]),
                }
            )
    return rows


def _inside(value: float, interval: list[float] | None) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]


def _show(figure: dict[str, Any], is_share: bool) -> str:
    form = "{:.1%}" if is_share else "{:.3g}"
    text = form.format(figure["value"])
    if figure["interval95"] is None:
        return text
    low, high = (form.format(x) for x in figure["interval95"])
    return f"{text} [{low}, {high}]"
