"""quickstart, fit, train, evaluate: what runs from a config."""

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
    load_config_file,
    read_config,
)
from racm3_jax.worlds import SUITES, list_suites

Arguments = argparse.Namespace
# Exit status of a training stopped by a signal, after a save (EX_TEMPFAIL).
STOPPED_EARLY = 75
# Fields of `fit.Plan`, which is imported when it is needed.
_PLAN_FLAGS = (
    *("image_size", "num_codes", "d_model", "num_layers", "batch_size"),
    *("num_variants", "tokenizer_steps", "clip_steps", "generator_steps"),
)


def register(commands: Any) -> None:
    """Adds them to the parser's subcommands."""
    text = "Train, retrieve and generate on flagworld, in minutes."
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
    _register_fit(commands)
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
        help="FIRST:LAST step of a profiler trace, e.g. 10:12",
    )
    sub.add_argument(
        "--compiled", type=options.path, help="file of racm3 estimate --compile --save"
    )
    text = "Run an evaluation suite."
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.set_defaults(command=_evaluate)
    add_config_option(sub)
    sub.add_argument(
        "--suite",
        default="flagworld",
        choices=options.Names(list_suites),
        metavar="SUITE",
        help="one of %(choices)s",
    )
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="folder of the results"
    )


def _register_fit(commands: Any) -> None:
    text = "Train all models on your own images; the same command resumes."
    sub = commands.add_parser("fit", help=text, description=text)
    sub.set_defaults(command=_fit)
    sub.add_argument(
        "--source", type=options.non_empty, required=True, help="e.g. folder:photos"
    )
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="folder of all stages"
    )
    sub.add_argument("--group_key", default="", help="the metadata key of the groups")
    sub.add_argument(
        "--holdout", default="", help="a fraction, names of groups, or key=value"
    )
    for name in _PLAN_FLAGS:
        sub.add_argument(
            f"--{name}", type=options.integer(), help="default: chosen and printed"
        )


def _fit(arguments: Arguments) -> int:
    from racm3_jax import fit

    def load(name: str, argument: str) -> Any:
        return load_config_file(find_config(name) + (argument and f":{argument}"))

    given = {name: getattr(arguments, name) for name in _PLAN_FLAGS}
    try:
        fit.main(
            arguments.source,
            Path(arguments.workdir),
            load,
            group_key=arguments.group_key,
            holdout=arguments.holdout,
            sizes={name: value for name, value in given.items() if value is not None},
        )
    except fit.StoppedEarly as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED_EARLY
    return 0


def _train(arguments: Arguments) -> int:
    from racm3_jax import run

    config = read_config(arguments.config_flags)
    steps = _parse_steps(arguments.profile_steps)
    state, has_ended = run.run_training(
        config,
        arguments.workdir,
        profile_steps=steps,
        compiled=arguments.compiled,
    )
    if not has_ended:
        print(
            f"stopped and saved after step {int(state.step)} of "
            f"{config.train.num_steps}; the same command resumes",
            file=sys.stderr,
        )
        return STOPPED_EARLY
    if int(state.step) < config.train.num_steps:
        print(
            f"ended after step {int(state.step)} of {config.train.num_steps}: the "
            f"held-out loss has not decreased in {config.train.patience} evaluations; "
            "the best weights are kept",
            file=sys.stderr,
        )
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

    default = ""
    if not arguments.config:
        if arguments.suite not in SUITES:
            raise UsageError(
                f"the suite {arguments.suite} is of another package: give its config, "
                "--config=FILE.py"
            )
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
