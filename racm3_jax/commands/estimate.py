"""estimate: memory, communication, speed and hours of a training, before it starts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands.configs import UsageError, add_config_option, read_config

if TYPE_CHECKING:
    from racm3_jax.compilation.figures import Figures, Largest
    from racm3_jax.compilation.machines import Machine
    from racm3_jax.compilation.programs import Program
    from racm3_jax.training.hardware import TrainingEstimate

WHAT = ("train", "decode", "embed", "search")
# Options that need --compile.
_NEED_COMPILE = ("what", "topology", "slices", "size", "max_compiles", "save")


def register(commands: Any) -> None:
    """Adds `estimate` to the parser's subcommands."""
    text = (
        "Estimate memory, speed and hours of a generator's training by a formula; with "
        "--compile by the accelerator's compiler, which does not need the accelerator."
    )
    sub = commands.add_parser("estimate", help=text, description=text)
    sub.set_defaults(command=_estimate)
    add_config_option(sub)
    sub.add_argument(
        "--device", required=True, help="name:number, for example h200:8 or v5p:64"
    )
    sub.add_argument(
        "--compile", action="store_true", help="compile for that device (may be absent)"
    )
    sub.add_argument("--what", choices=WHAT, help="what to compile; default: train")
    sub.add_argument(
        "--topology", help="of a TPU slice, e.g. 4x4x4; of GPUs, 1xNODESxGPUS"
    )
    sub.add_argument("--slices", type=int, help="TPU slices of that topology")
    sub.add_argument(
        "--size",
        type=int,
        help="rows, prompts, images or documents; default: the config's rows",
    )
    sub.add_argument(
        "--max_compiles",
        type=int,
        help="compilations to find the largest size that fits; 1: no search; "
        "default: 4",
    )
    sub.add_argument(
        "--save",
        type=options.path,
        help="save the compiled step for train --compiled=FILE",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")


def parse_device(text: str, *, compiled: bool = False) -> tuple[str, int]:
    """ "h200:8" -> ("h200", 8); without a number, one device.

    Args:
      text: of `--device`.
      compiled: whether "cpu" is allowed, too.

    Raises:
      UsageError: a device that is not in the table, or an invalid number.
    """
    from racm3_jax.training.hardware import DEVICES

    name, _, number = text.partition(":")
    known = [*DEVICES, *(["cpu"] if compiled else [])]
    if name not in known:
        raise UsageError(
            f"--device={text}: {name!r} is not in the table; known: {', '.join(known)}"
        )
    if number and not (number.isdigit() and int(number)):
        raise UsageError(f"--device={text}: give a number of devices, as in {name}:8")
    return name, int(number or 1)


def _estimate(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config_flags)
    if config.kind != "generator":
        raise UsageError(
            f"estimate is for generators; this config's kind is {config.kind!r}"
        )
    from racm3_jax.compilation import machines

    if arguments.compile:
        return _estimate_compiled(arguments, config)
    machines.use_host_only()
    given = [name for name in _NEED_COMPILE if getattr(arguments, name) is not None]
    if given:
        raise UsageError(f"--{given[0]} needs --compile")
    name, num_devices = parse_device(arguments.device)
    estimate = _make_estimate(config, name, num_devices)
    if arguments.json:
        return print(json.dumps({"formula": _as_json(estimate)}, indent=1))
    _print_estimate(config, name, num_devices, estimate)
    if not estimate.fits:
        _print_changes(_changes(config, estimate))
    return None


def _make_estimate(config: Any, name: str, num_devices: int) -> TrainingEstimate:
    from racm3_jax import wiring
    from racm3_jax.training import hardware

    model_config, num_params = wiring.build_model_shape(config)
    platform = hardware.DEVICES[name].platform
    shards, _ = wiring.count_shards(config, num_devices, platform)
    half = config.optimizer.get("first_moment_dtype", "float32") == "bfloat16"
    return hardware.estimate_training(
        model_config,
        num_params,
        hardware.DEVICES[name],
        num_devices,
        rows=config.pipeline.rows,
        row_length=config.pipeline.row_length,
        num_steps=config.train.num_steps,
        shards=shards,
        tensor=config.mesh.tensor,
        num_microbatches=config.train.get("num_microbatches", 1),
        first_moment_bytes=2 if half else 4,
    )


def _print_estimate(
    config: Any, name: str, num_devices: int, estimate: TrainingEstimate
) -> None:
    from racm3_jax import wiring
    from racm3_jax.training import hardware

    platform = hardware.DEVICES[name].platform
    shards, copies = wiring.count_shards(config, num_devices, platform)
    details = {
        "devices": f"{num_devices} {name}; weights split over {shards}, {copies} copies",
        "batch": f"{config.pipeline.rows} rows of {config.pipeline.row_length}",
        "assumed": f"{hardware.DEVICES[name].utilisation:.0%} of the peak (PaLM's count)",
    }
    print(hardware.format_estimate(estimate, details))


def _changes(config: Any, estimate: TrainingEstimate) -> list[str]:
    from racm3_jax import wiring
    from racm3_jax.training import hardware

    model_config, _ = wiring.build_model_shape(config)
    return hardware.suggest_changes(model_config, estimate, config.pipeline.rows)


def _print_changes(changes: Any) -> None:
    print("this does not fit; suggested fixes, least intrusive first:")
    for change in changes:
        print(f"  {change}")


def _as_json(estimate: TrainingEstimate) -> dict[str, Any]:
    return {
        **dataclasses.asdict(estimate),
        "total": estimate.total,
        "capacity": estimate.capacity,
        "fits": estimate.fits,
    }


def _estimate_compiled(arguments: argparse.Namespace, config: Any) -> None:
    name, number = parse_device(arguments.device, compiled=True)
    what = arguments.what or "train"
    if arguments.save and what != "train":
        raise UsageError(f"--save is for a training step; --what is {what!r}")
    if arguments.max_compiles is not None and arguments.max_compiles < 1:
        raise UsageError(f"--max_compiles={arguments.max_compiles}: give 1 or more")
    from racm3_jax.compilation import machines

    slices = 1 if arguments.slices is None else arguments.slices
    machine = machines.find_machine(name, number, arguments.topology or "", slices)
    machines.use_host_only(machine.num_devices if name == "cpu" else 1)
    # These import JAX.
    from racm3_jax.compilation import figures, programs, report, saved
    from racm3_jax.training import hardware

    devices = machines.find_devices(machine)
    if machine.num_slices > 1:
        config = config.copy_and_resolve_references().unlock()
        config.mesh.dcn = machine.num_slices
    device = hardware.DEVICES.get(name)
    capacity = device.capacity if device else None
    program = programs.build_program(what, config, devices, arguments.size, capacity)
    estimate = None
    if what == "train" and device is not None:
        sized = config.copy_and_resolve_references()
        sized.pipeline.rows = program.size
        estimate = _make_estimate(sized, name, machine.num_devices)
    cache = saved.without_cache() if arguments.save else contextlib.nullcontext()
    with cache:
        first, parts = figures.compile_program(
            program, machine, program.size, capacity, _watch
        )
    if arguments.save:
        _save(arguments.save, program, first, parts, devices, config)
    del parts  # frees hundreds of MB for later compilations
    largest = None
    most = 4 if arguments.max_compiles is None else arguments.max_compiles
    if most > 1 and capacity is not None:
        largest = figures.find_largest(
            lambda size: figures.compile_program(
                program, machine, size, capacity, _watch
            )[0],
            first,
            program.step,
            most,
            estimate.weights + estimate.optimizer if estimate else 0.0,
        )
    if arguments.json:
        found = {"compiled": report.as_json(machine, program, first, largest)}
        if estimate is not None:
            found["formula"] = _as_json(estimate)
        return print(json.dumps(found, indent=1))
    if estimate is not None:
        _print_estimate(config, name, machine.num_devices, estimate)
        print()
    print(report.format_compiled(machine, program, first, estimate))
    _print_verdict(config, machine, program, first, largest, estimate)
    return None


def _print_verdict(
    config: Any,
    machine: Machine,
    program: Program,
    first: Figures,
    largest: Largest | None,
    estimate: TrainingEstimate | None,
) -> None:
    """Prints what fits, and what to change if this does not."""
    from racm3_jax.compilation import report
    from racm3_jax.training.hardware import format_bytes

    if first.capacity is None:
        return
    print()
    room = f"{format_bytes(first.peak)} of {format_bytes(first.capacity)}"
    print(f"{'fits' if first.fits else 'does not fit'}: {room} per device")
    if largest is not None:
        print(report.format_largest(program, largest))
    if first.fits:
        return
    if estimate is None:
        return _print_changes(report.suggest_smaller(program, largest))
    fitting = largest.fits if largest is not None else 0
    microbatches = config.train.get("num_microbatches", 1)
    rows = fitting * config.mesh.tensor // (machine.num_devices * microbatches)
    compiled = dataclasses.replace(estimate, largest_rows=rows) if largest else estimate
    return _print_changes(_changes(config, compiled))


def _save(
    file: str,
    program: Program,
    figures: Figures,
    parts: dict[str, Any],
    devices: Any,
    config: Any,
) -> None:
    from racm3_jax import wiring
    from racm3_jax.compilation import saved

    path = Path(file)
    if not parts:
        raise UsageError(
            f"nothing is written to {path}, as this does not fit: {figures.refused}"
        )
    sized = config.copy_and_resolve_references()
    sized.pipeline.rows = program.size
    training = wiring.build_abstract_training(sized, devices)
    traced = program.trace(program.size)["training step"]
    size = saved.save_step(
        path, parts["training step"], traced, training.mesh, sized.to_dict()
    )
    print(f"wrote {path}, {size / 1e6:,.1f} MB", file=sys.stderr)


@contextlib.contextmanager
def _watch(text: str) -> Iterator[None]:
    """Shows elapsed seconds on standard error; without a terminal, one line."""
    if not sys.stderr.isatty():
        started = time.monotonic()
        yield
        print(f"{text}: {time.monotonic() - started:,.0f} s", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield
