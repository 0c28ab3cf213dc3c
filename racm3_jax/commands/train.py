"""quickstart, train, evaluate: what runs from a config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from racm3_jax.commands.configs import find_config, read_config

Arguments = argparse.Namespace
_CONFIG_HELP = "; takes --config=FILE.py[:arg] and --config.key=value"


def register(commands: Any) -> None:
    """Adds the three to the parser's subcommands."""
    text = "The main job on flagworld, in minutes."
    sub = commands.add_parser("quickstart", help=text, description=text)
    sub.set_defaults(command=_quickstart, takes_config=True)
    sub.add_argument("--workdir", default="racm3_out")
    sub.add_argument("--short", action="store_true", help="under 90 seconds, for CI")
    text = f"Train or resume{_CONFIG_HELP}."
    sub = commands.add_parser("train", help=text, description=text)
    sub.set_defaults(command=_train, takes_config=True)
    sub.add_argument("--workdir", required=True)
    text = f"Run a suite{_CONFIG_HELP}."
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.set_defaults(command=_evaluate, takes_config=True)
    sub.add_argument("--suite", default="flagworld", choices=["flagworld"])
    sub.add_argument("--workdir", default="racm3_evaluation")


def _train(arguments: Arguments) -> None:
    from racm3_jax import run

    run.train(read_config(arguments.config_flags), arguments.workdir)


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
