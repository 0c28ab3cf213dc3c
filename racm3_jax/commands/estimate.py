"""estimate: parameters, memory, speed and hours of a training, before it is begun."""

from __future__ import annotations

import argparse
from typing import Any

from racm3_jax.commands.configs import UsageError, read_config


def register(commands: Any) -> None:
    """Adds `estimate` to the parser's subcommands."""
    text = "What a generator's training needs: memory, speed, hours."
    sub = commands.add_parser("estimate", help=text, description=text)
    sub.set_defaults(command=_estimate, takes_config=True)
    sub.add_argument(
        "--device", required=True, help="name:number, for example h200:8 or v5p:64"
    )


def parse_device(text: str) -> tuple[str, int]:
    """ "h200:8" -> ("h200", 8); one device without a number.

    Raises:
      UsageError: a device that is not in the table, or no number above 0.
    """
    from racm3_jax.training.hardware import DEVICES

    name, _, number = text.partition(":")
    if name not in DEVICES:
        raise UsageError(
            f"--device={text}: {name!r} is not in the table; known are "
            f"{', '.join(DEVICES)}"
        )
    if number and not (number.isdigit() and int(number)):
        raise UsageError(f"--device={text}: give a number of devices, as in {name}:8")
    return name, int(number or 1)


def _estimate(arguments: argparse.Namespace) -> None:
    from racm3_jax import wiring
    from racm3_jax.training import hardware

    config = read_config(arguments.config_flags)
    if config.kind != "generator":
        raise UsageError(
            f"estimate plans generators; this config's kind is {config.kind!r}"
        )
    name, num_devices = parse_device(arguments.device)
    model_config, num_params = wiring.build_model_shape(config)
    shards, copies = wiring.count_shards(config, num_devices)
    rows = config.pipeline.rows
    half = config.optimizer.get("first_moment_dtype", "float32") == "bfloat16"
    plan = hardware.plan_training(
        model_config,
        num_params,
        hardware.DEVICES[name],
        num_devices,
        rows=rows,
        row_length=config.pipeline.row_length,
        num_steps=config.train.num_steps,
        shards=shards,
        num_microbatches=config.train.get("num_microbatches", 1),
        first_moment_bytes=2 if half else 4,
    )
    details = {
        "devices": f"{num_devices} {name}; weights split over {shards}, {copies} copies",
        "batch": f"{rows} rows of {config.pipeline.row_length}",
        "assumed": f"{hardware.DEVICES[name].utilisation:.0%} of the peak (PaLM's count)",
    }
    print(hardware.format_plan(plan, details))
    if plan.total > 0.92 * plan.memory:
        print("this does not fit; what would mend it, the mildest first:")
        for change in hardware.suggest_changes(model_config, plan, rows):
            print(f"  {change}")
