"""sweep: every point of a config's `get_hyper`, here or as commands for a cluster."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands.configs import (
    UsageError,
    add_config_option,
    call_config,
    load_config_module,
    read_config,
)
from racm3_jax.sweeps import (
    Hyper,
    Point,
    as_flags,
    format_sweep,
    name_point,
    plot_sweep,
    run_sweep,
)

_SHOWN = ("loss", "text_loss", "image_loss", "psnr", "image_query_accuracy")


def register(commands: Any) -> None:
    """Adds `sweep` to the parser's subcommands."""
    text = "Train every point of a config's get_hyper; the same command resumes."
    sub = commands.add_parser("sweep", help=text, description=text)
    sub.set_defaults(command=_sweep)
    add_config_option(sub)
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="folder of the results"
    )
    sub.add_argument(
        "--print_commands",
        action="store_true",
        help="print one `racm3 train` command per point instead (for a cluster)",
    )


def _sweep(arguments: argparse.Namespace) -> None:
    flags = arguments.config_flags
    files = [f.removeprefix("--config=") for f in flags if f.startswith("--config=")]
    if not files:
        raise UsageError("give --config=sweeps/NAME or FILE.py")
    module, _ = load_config_module(files[-1])
    if not hasattr(module, "get_hyper"):
        raise UsageError(
            f"{files[-1]} has no get_hyper(hyper): a sweep's config says what varies"
        )
    points: list[Point] = call_config(files[-1], module, "get_hyper", Hyper())
    if not isinstance(points, list | tuple) or not all(
        isinstance(point, dict) for point in points
    ):
        raise UsageError(
            f"get_hyper of {files[-1]} must return what hyper.product, sweep, … give"
        )
    if not points:
        raise UsageError(f"get_hyper of {files[-1]} returned no points")
    for point in points:
        read_config([*flags, *as_flags(point)])  # invalid names fail now
    workdir = Path(arguments.workdir)
    if arguments.print_commands:
        for point in points:
            words = ["racm3", "train", f"--workdir={workdir / name_point(point)}"]
            print(shlex.join([*words, *flags, *as_flags(point)]))
        return

    def train_point(point: Point, folder: Path) -> None:
        from racm3_jax import run

        run.train(read_config([*flags, *as_flags(point)]), folder)

    finished = run_sweep(points, workdir, train_point)
    names = [n for n in _SHOWN if any(n in metrics for _, metrics in finished)]
    plot_sweep([point for point, _ in finished], workdir, names)
    print(format_sweep(finished, names))
    print(f"curves: {workdir / 'sweep.png'}")
