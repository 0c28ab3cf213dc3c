"""The output of `racm3 estimate --compile`, as lines and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from racm3_jax.compilation.figures import Figures, Largest, PartFigures
from racm3_jax.compilation.machines import Machine
from racm3_jax.compilation.programs import Program
from racm3_jax.training.hardware import TrainingEstimate, format_bytes


def format_compiled(
    machine: Machine,
    program: Program,
    figures: Figures,
    estimate: TrainingEstimate | None,
) -> str:
    """The compiler's figures, with the formula's next to them if available."""
    details = {
        "compiled for": f"{machine}, {machine.num_devices} devices",
        program.unit: f"{figures.size:,}",
        **program.facts,
    }
    lines = _align(details)
    for part in figures.parts:
        lines += ["", f"{part.name}, one device", *_format_part(part, estimate)]
    if figures.refused:
        lines += ["", f"it does not fit: {figures.refused}"]
    return "\n".join(lines)


def _format_part(part: PartFigures, estimate: TrainingEstimate | None) -> list[str]:
    formula: dict[str, float] = {}
    if estimate is not None:
        formula = {
            "arguments": estimate.weights + estimate.optimizer,
            "temporaries": estimate.total - estimate.weights - estimate.optimizer,
            "together": estimate.total,
        }
    numbers = {
        "arguments": part.arguments,
        "temporaries": part.temporaries,
        "outputs": part.outputs,
        "code": part.code,
        "together": part.peak,
    }
    rows = {
        name: format_bytes(number)
        + (f"   (formula {format_bytes(formula[name])})" if name in formula else "")
        for name, number in numbers.items()
    }
    rows["compiled in"] = f"{part.seconds:,.0f} s"
    rows["on the wire"] = f"{format_bytes(part.bytes_on_wire)} sent in a run"
    for kind, traffic in part.traffic.items():
        times = f"{traffic.count:,}" + ("" if traffic.trips_known else " or more")
        overlapping = traffic.asynchronous_count
        rows[f"  {kind}"] = (
            f"{format_bytes(traffic.bytes_on_wire)} in {times}, "
            f"{overlapping:,} of them asynchronous"
        )
    return ["  " + line for line in _align(rows)]


def format_largest(program: Program, largest: Largest) -> str:
    """One line on the largest size that fits."""
    count = f"{len(largest.tried)} compilations"
    if not largest.fits:
        return (
            f"no size that was compiled fits ({count}, down to {largest.too_large:,})"
        )
    text = f"largest that fits: {largest.fits:,} {program.unit}"
    if largest.is_exact:
        return f"{text} ({count})"
    if largest.too_large is None:
        return f"{text}, and perhaps more (--max_compiles ended it after {count})"
    return f"{text}; {largest.too_large:,} do not ({count}; --max_compiles for more)"


def as_json(
    machine: Machine, program: Program, figures: Figures, largest: Largest | None
) -> dict[str, Any]:
    """The same figures with stable names, in bytes and seconds."""
    found: dict[str, Any] = {
        "what": program.name,
        "device": machine.name,
        "num_devices": machine.num_devices,
        "topology": machine.topology,
        "num_slices": machine.num_slices,
        "unit": program.unit,
        "size": figures.size,
        "facts": program.facts,
        "fits": figures.fits,
        "peak_bytes": figures.peak,
        "capacity_bytes": figures.capacity,
        "refused": figures.refused,
        "parts": [_part_as_json(part) for part in figures.parts],
    }
    if largest is not None:
        found["largest"] = {
            "fits": largest.fits,
            "too_large": largest.too_large,
            "is_exact": largest.is_exact,
            "tried": [
                {"size": f.size, "peak_bytes": f.peak, "fits": f.fits}
                for f in largest.tried
            ],
        }
    return found


def _part_as_json(part: PartFigures) -> dict[str, Any]:
    return {
        "name": part.name,
        "seconds": round(part.seconds, 2),
        "argument_bytes": part.arguments,
        "temporary_bytes": part.temporaries,
        "output_bytes": part.outputs,
        "code_bytes": part.code,
        "peak_bytes": part.peak,
        "wire_bytes": part.bytes_on_wire,
        "collectives": {
            kind: dataclasses.asdict(traffic) for kind, traffic in part.traffic.items()
        },
    }


def suggest_smaller(program: Program, largest: Largest | None) -> Sequence[str]:
    """What to change if a program other than training does not fit."""
    fits = largest.fits if largest is not None else 0
    found = f"{fits:,} {program.unit} fit" if fits else f"fewer {program.unit}"
    return {
        "decode": [
            f"{found} at a time: max_rows of Generator (default: what fits)",
            "config.mesh.tensor over more devices (--tensor of the commands)",
            "8-bit weights (--int8 of the commands)",
        ],
        "embed": [f"{found} at a time: batch_size of DocumentEmbedder"],
        "search": [
            f"{found} on these devices; use more devices",
            'config.memory.index="scann" or "table", which need no accelerator',
        ],
    }[program.name]


def _align(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"{name.ljust(width)}  {value}" for name, value in lines.items()]
