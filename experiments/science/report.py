"""The report of an experiment: JSON with all results, a table, a plot."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.intervals import adjust_holm
from science.cells import (
    Cell,
    read_cells,
    read_figures,
    two_core_hours,
    write_json,
)
from science.combining import Combined, combine, compare
from science.experiment import Experiment, Figures, Panel, Place

Results = dict[str, dict[str, Combined]]
_SIGNIFICANT = 0.05


def combine_cells(
    experiment: Experiment, cells: Mapping[tuple[str, int], Cell]
) -> tuple[Results, dict[str, Results]]:
    """(results over the seeds, differences from each reference), by condition and name.

    Differences use the seeds that both have.
    """
    figures = {key: read_figures(cell) for key, cell in cells.items()}
    means: Results = {}
    for condition in experiment.conditions:
        own = list(_of(condition, figures).values())
        if own:
            names = dict.fromkeys(name for f in own for name in f)
            means[condition] = {
                name: combine([f[name] for f in own if name in f]) for name in names
            }
    differences: dict[str, Results] = {}
    for reference, conditions in experiment.comparisons.items():
        other = _of(reference, figures)
        found = {c: _compare(_of(c, figures), other) for c in conditions}
        found = {c: row for c, row in found.items() if row}
        if found:
            differences[reference] = found
    return means, differences


def _compare(
    own: Mapping[int, Figures], other: Mapping[int, Figures]
) -> dict[str, Combined]:
    """Differences over the shared seeds; none for fewer than two seeds."""
    shared = [seed for seed in own if seed in other]
    if len(shared) < 2:
        return {}
    return {
        name: compare([own[s][name] for s in shared], [other[s][name] for s in shared])
        for name in own[shared[0]]
        if all(name in own[s] and name in other[s] for s in shared)
    }


def _of(
    condition: str, figures: Mapping[tuple[str, int], Figures]
) -> dict[int, Figures]:
    return {seed: f for (name, seed), f in figures.items() if name == condition}


def format_table(experiment: Experiment, means: Results) -> str:
    """One row per condition; results with 95% intervals."""
    names = {
        name: title
        for name, title in experiment.columns.items()
        if any(name in row for row in means.values())
    }
    lines = [
        "| | " + " | ".join(names.values()) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for condition, row in means.items():
        cells = [str(row[name]) if name in row else "-" for name in names]
        title = experiment.conditions[condition]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def adjust_differences(
    differences: Mapping[str, Results],
) -> dict[tuple[str, str, str], float]:
    """Holm's p-values of all comparisons of an experiment.

    By (reference, condition, figure). A table of many comparisons finds some differences
    by chance alone: these may each be compared with 0.05.
    """
    return adjust_holm(
        {
            (reference, condition, name): found.p_value
            for reference, rows in differences.items()
            for condition, row in rows.items()
            for name, found in row.items()
            if found.p_value is not None
        }
    )


def format_differences(
    experiment: Experiment,
    differences: Results,
    adjusted: Mapping[tuple[str, str], float],
) -> str:
    """The differences that are significant after Holm's correction.

    Args:
      experiment: names conditions and figures.
      differences: from one reference.
      adjusted: their p-values, by (condition, figure).
    """
    lines = []
    for condition, row in differences.items():
        shown = []
        for name, title in experiment.columns.items():
            found = row.get(name)
            if found is None or found.interval is None:
                continue
            low, high = found.interval
            if adjusted.get((condition, name), 1.0) < _SIGNIFICANT:
                shown.append(f"{title} {found.value:+.3g} [{low:+.3g}, {high:+.3g}]")
        if shown:
            lines.append(f"- {experiment.conditions[condition]}: " + "; ".join(shown))
    return "\n".join(lines) or "- none"


def write_report(experiment: Experiment, place: Place, folder: Path) -> Path | None:
    """Writes `NAME.json`, `NAME.md` and `NAME.png`; None where nothing is measured."""
    cells = read_cells(experiment, place)
    if not cells:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    means, differences = combine_cells(experiment, cells)
    total = len(experiment.conditions) * len(experiment.seeds)
    record = {
        "experiment": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "scale": dataclasses.asdict(place.scale),
        "settings": dict(experiment.settings),
        "seeds": list(experiment.seeds),
        "cells_done": len(cells),
        "cells": total,
        "commits": sorted({cell["commit"] for cell in cells.values()}),
        "wall_seconds": round(sum(c["wall_seconds"] for c in cells.values()), 1),
        "cpu_seconds": round(sum(c["cpu_seconds"] for c in cells.values()), 1),
        "two_core_hours": round(two_core_hours(cells.values()), 3),
        "figures": _to_json(means),
        "differences": {r: _to_json(rows) for r, rows in differences.items()},
        "measured": [cells[key] | {"settings": None} for key in sorted(cells)],
    }
    write_json(folder / f"{experiment.name}.json", record)
    text = _describe(experiment, place, record, means, differences)
    (folder / f"{experiment.name}.md").write_text(text)
    plot(experiment, means, folder / f"{experiment.name}.png")
    if experiment.plot_curves is not None:
        experiment.plot_curves(
            experiment, cells, folder / f"{experiment.name}_curves.png"
        )
    return folder / f"{experiment.name}.json"


def _describe(
    experiment: Experiment,
    place: Place,
    record: Mapping[str, Any],
    means: Results,
    differences: Mapping[str, Results],
) -> str:
    state = (
        f"{record['cells_done']} of {record['cells']} cells, "
        f"{len(experiment.seeds)} seeds, {place.scale.num_heldout} held-out nations a "
        f"seed; {record['two_core_hours']:.2f} hours on two cores "
        f"({record['cpu_seconds'] / 3600:.2f} CPU hours); commit {', '.join(record['commits'])}."
    )
    parts = [
        f"# {experiment.number}. {experiment.title}",
        state,
        format_table(experiment, means),
    ]
    adjusted = adjust_differences(differences)
    for reference, rows in differences.items():
        parts.append(
            f'Differences from "{experiment.conditions[reference]}", seed by seed, that '
            f"are significant at 5% after Holm's correction for {len(adjusted)} "
            "comparisons; brackets are 95% intervals of each alone, over questions and "
            "seeds:"
        )
        own = {(c, n): p for (r, c, n), p in adjusted.items() if r == reference}
        parts.append(format_differences(experiment, rows, own))
    if experiment.notes:
        parts.append(experiment.notes)
    return "\n\n".join(parts) + "\n"


def _to_json(results: Results) -> dict[str, Any]:
    return {
        condition: {
            name: {
                "value": found.value,
                "interval95": found.interval,
                "seeds": found.seeds,
                "is_share": found.is_share,
            }
            | ({} if found.p_value is None else {"p_value": found.p_value})
            for name, found in row.items()
        }
        for condition, row in results.items()
    }


def plot(experiment: Experiment, means: Results, path: Path) -> None:
    """Panels side by side; bars are 95% intervals, small circles the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(experiment.panels)
    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, 4.4), squeeze=False)
    for axis, panel in zip(axes[0], experiment.panels, strict=True):
        _plot_panel(axis, experiment, panel, means)
    figure.suptitle(textwrap.fill(experiment.title, 50 * count), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_panel(
    axis: Any, experiment: Experiment, panel: Panel, means: Results
) -> None:
    conditions = list(experiment.conditions)
    numeric = bool(experiment.x_values)
    places = experiment.x_values if numeric else range(len(conditions))
    for i, (name, label) in enumerate(panel.figures.items()):
        found = [
            (x, means[c][name])
            for x, c in zip(places, conditions, strict=True)
            if name in means.get(c, {})
        ]
        if not found:
            continue
        shift = 0.0 if numeric else 0.12 * (i - (len(panel.figures) - 1) / 2)
        scale = 100 if panel.percent else 1
        values = scale * np.array([f.value for _, f in found])
        ends = scale * np.array([f.interval or (f.value, f.value) for _, f in found])
        errors = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
        bars = axis.errorbar(
            [x + shift for x, _ in found],
            values,
            yerr=errors,
            fmt="o-" if numeric else "o",
            capsize=3,
            label=label,
        )
        axis.scatter(
            [x + shift for x, f in found for _ in f.seeds],
            [scale * value for _, f in found for value in f.seeds],
            s=14,
            facecolors="white",
            edgecolors=bars.lines[0].get_color(),
            linewidths=0.9,
            zorder=3,
        )
    several = len(panel.figures) > 1
    axis.set_title(
        panel.title + (" (%)" if panel.percent else ""),
        fontsize=9,
        pad=20 if several else None,
    )
    if panel.percent:
        axis.set_ylim(-3, 103)
    if panel.log_scale:
        axis.set_yscale("log")
    if numeric:
        axis.set_xlabel(experiment.x_title)
        axis.set_xticks(list(places))
    else:
        axis.set_xticks(range(len(conditions)))
        axis.set_xticklabels(conditions, rotation=55, ha="right", fontsize=7)
    axis.grid(alpha=0.3)
    if several:  # above the panel, where no interval is hidden
        axis.legend(
            fontsize=7,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(panel.figures),
            frameon=False,
            columnspacing=1.0,
            handletextpad=0.3,
        )
