"""quickstart, train, evaluate: what runs from a config."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands.configs import (
    UsageError,
    add_config_option,
    find_config,
    read_config,
)

Arguments = argparse.Namespace
# The exit status of a training that a signal ended, after a save (EX_TEMPFAIL).
STOPPED_EARLY = 75
SUITES = ("flagworld", "flagworld_tasks", "coco", "likelihood")


def register(commands: Any) -> None:
    """Adds the three to the parser's subcommands."""
    text = "The main job on flagworld, in minutes."
    sub = commands.add_parser("quickstart", help=text, description=text)
    sub.set_defaults(command=_quickstart)
    add_config_option(sub)
    sub.add_argument(
        "--workdir",
        type=options.path,
        default="racm3_out",
        help="folder of the results",
    )
    sub.add_argument("--short", action="store_true", help="under 90 seconds, for CI")
    text = "Train a config, or resume it: the same command."
    sub = commands.add_parser("train", help=text, description=text)
    sub.set_defaults(command=_train)
    add_config_option(sub)
    sub.add_argument(
        "--workdir",
        type=options.place,
        required=True,
        help="folder or URL of the results",
    )
    sub.add_argument(
        "--profile_steps",
        default="",
        help="FIRST:LAST step of a trace to write, as 10:12",
    )
    sub.add_argument(
        "--compiled", type=options.path, help="file of racm3 estimate --compile --save"
    )
    text = "Run a suite of measurements."
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.set_defaults(command=_evaluate)
    add_config_option(sub)
    sub.add_argument(
        "--suite", default="flagworld", choices=SUITES, help="what is measured"
    )
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="folder of the results"
    )


def _train(arguments: Arguments) -> int:
    from racm3_jax import run

    config = read_config(arguments.config_flags)
    steps = _parse_steps(arguments.profile_steps)
    state = run.train(
        config,
        arguments.workdir,
        profile_steps=steps,
        compiled=arguments.compiled,
    )
    if int(state.step) < config.train.num_steps:
        print(
            f"stopped and saved after step {int(state.step)} of "
            f"{config.train.num_steps}; the same command resumes",
            file=sys.stderr,
        )
        return STOPPED_EARLY
    return 0


def _parse_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise UsageError(f"--profile_steps={text}: give first:last, as in 10:12")
    return int(first), int(last)


def _evaluate(arguments: Arguments) -> None:
    from racm3_jax import run

    default = find_config(f"eval/{arguments.suite}.py")
    run.evaluate(read_config(arguments.config_flags, default), arguments.workdir)


def _quickstart(arguments: Arguments) -> None:
    from racm3_jax import quickstart

    default = find_config("flagworld_quickstart.py")
    if arguments.short:
        default += ":short"
    quickstart.main(
        read_config(arguments.config_flags, default), Path(arguments.workdir)
    )
