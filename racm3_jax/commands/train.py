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
_ENDS = "; a training ends earlier when its held-out loss no longer falls"
# Fields of `fit_plan.Plan`, which is imported when it is needed.
_PLAN_FLAGS = {
    "image_size": "side of the images in pixels: 64, 128 or 256; a code covers 8x8",
    "num_codes": "different codes of the image tokenizer",
    "d_model": "width of the generator, a multiple of 64",
    "num_layers": "layers of the generator",
    "batch_size": "images of a tokenizer step, captioned images of a CLIP step",
    "num_variants": "augmented versions of each image for the generator, besides the "
    "original; 0 is none",
    "tokenizer_steps": f"most steps of the image tokenizer's training{_ENDS}",
    "clip_steps": "most steps of CLIP's training",
    "generator_steps": "most steps of the generator's training",
}


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
    sub.add_argument(
        "--short",
        action="store_true",
        help="a smaller memory and fewer steps: under 90 seconds on two idle cores",
    )
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
        choices=options.Names(list_suites),
        metavar="SUITE",
        help="one of %(choices)s (default: that of --config, else flagworld)",
    )
    sub.add_argument(
        "--workdir", type=options.path, required=True, help="folder of the results"
    )


def _register_fit(commands: Any) -> None:
    text = "Train all models on your own images; the same command resumes."
    sub = commands.add_parser("fit", help=text, description=text)
    sub.set_defaults(command=_fit)
    sub.add_argument(
        "--source",
        type=options.non_empty,
        required=True,
        help="images with captions: kind:path, e.g. folder:photos with cat.jpg, cat.txt",
    )
    sub.add_argument(
        "--workdir",
        type=options.path,
        required=True,
        help="folder of all stages, not inside the source; its folder generator is the "
        "--workdir of other commands",
    )
    sub.add_argument(
        "--group_key",
        default="",
        help="metadata key that is equal for images of the same thing, which are held "
        "out together; default: each image is its own group",
    )
    sub.add_argument(
        "--holdout",
        default="",
        help="groups that no training sees: a fraction, their names (a,b), or key=value "
        "of the metadata; default: a tenth, at most about 500 images",
    )
    for name, text in _PLAN_FLAGS.items():
        sub.add_argument(
            f"--{name}",
            type=options.integer(0 if name == "num_variants" else 1),
            help=f"{text}; default: chosen for the images and the machine, and printed",
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

    default, suite = "", arguments.suite
    if not arguments.config:
        suite = suite or "flagworld"
        if suite not in SUITES:
            raise UsageError(
                f"the suite {suite} is of another package: give its config, "
                "--config=FILE.py"
            )
        default = find_config(f"eval/{suite}.py")
    config = read_config(arguments.config_flags, default)
    if suite and config.get("suite") not in (None, suite):
        raise UsageError(
            f"--suite={suite}, but the config is of the suite {config.suite}: remove "
            "--suite, or give another --config"
        )
    run.evaluate(config, arguments.workdir)


def _quickstart(arguments: Arguments) -> None:
    from racm3_jax import quickstart

    if arguments.short and arguments.config:
        raise UsageError(
            f"--short is a form of the quickstart's own config, so --config="
            f"{arguments.config} has none: remove one of the two"
        )
    name, argument = "flagworld_quickstart", ":short" if arguments.short else ""
    config = read_config(arguments.config_flags, find_config(f"{name}.py") + argument)
    used = [arguments.config or name + argument]
    used += [flag for flag in arguments.config_flags if flag.startswith("--config.")]
    quickstart.main(config, Path(arguments.workdir), " ".join(used))
