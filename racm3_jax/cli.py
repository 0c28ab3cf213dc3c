"""The `racm3` command: one subcommand per task, thin wrappers of `run` and `wiring`.

Configs are given as ml_collections users expect:
`racm3 train --config=flagworld:twin --config.optimizer.learning_rate=3e-4`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

import racm3_jax
from racm3_jax.commands import (
    completion,
    convert,
    demo,
    doctor,
    estimate,
    generate,
    memory,
    parser,
    support,
    sweep,
    train,
)
from racm3_jax.commands.configs import UsageError
from racm3_jax.commands.failures import explain, is_missing_setting
from racm3_jax.training.host import prepare_host

# Each module registers its own subcommands.
FAMILIES = (
    train, sweep, estimate, generate, support, demo, memory, convert, doctor,
)  # fmt: skip
# Exit statuses as in shells: 128 + the signal number.
INTERRUPTED = 130
READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Errors that a user can fix end in one sentence; bugs end in a traceback.

    Returns:
      The exit status: 0, 2 after wrong input, 75 when a signal ended a training early
      (it saved; the same command resumes), 130 after Ctrl-C, or 141 when the reader of
      the output has exited (`racm3 ... | head`).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    shows_traceback = "--traceback" in given
    _print_anything()
    try:
        try:
            status = _run([word for word in given if word != "--traceback"])
        except SystemExit:  # --help and --version have printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _leave_output()
        return READER_GONE
    except KeyboardInterrupt:
        if shows_traceback:
            raise
        print("racm3: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except (UsageError, ValueError, OSError) as error:
        if shows_traceback:
            raise
        sentence = explain(error)
    except (AttributeError, KeyError) as error:
        if shows_traceback or not is_missing_setting(error):
            raise
        name = str(error.args[0] if error.args else error).strip("'\"")
        sentence = f"the config has no setting {name!r}: is it one of this command?"
    print(f"racm3: {sentence}", file=sys.stderr)
    _leave_output()
    return 2


def _run(words: Sequence[str]) -> int:
    empty = next((w for w in words if w.startswith("--") and w.endswith("=--")), None)
    if empty:  # argparse drops the value
        raise UsageError(
            f"{empty.removesuffix('--')} has the value '--': give another one"
        )
    arguments, rest = _parser().parse_known_args(parser.join_config_values(words))
    takes_config = getattr(arguments, "takes_config", False)
    parser.check_unknown(rest, arguments.parser, takes_config)
    if not hasattr(arguments, "command"):
        arguments.parser.print_help()
        return 2
    if takes_config and arguments.config is not None:
        rest = [f"--config={arguments.config}", *rest]
    arguments.config_flags = rest
    _quiet_libraries()
    prepare_host()
    return arguments.command(arguments) or 0


def _print_anything() -> None:
    """Escapes names and captions in scripts that the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_output() -> None:
    """Drops unwritten output, as Python would raise an error at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def _quiet_libraries() -> None:
    """Leaves only progress bars and our own messages."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    top = parser.Parser(
        prog="racm3",
        description="Retrieval-augmented multimodal language modelling (RA-CM3).",
    )
    top.add_argument(
        "--traceback", action="store_true", help="show where an error came from"
    )
    top.add_argument(
        "--version", action="version", version=f"racm3_jax {racm3_jax.__version__}"
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="name")
    for family in FAMILIES:
        family.register(commands)
    completion.register(commands, _parser)
    parser.complete(top)
    return top


if __name__ == "__main__":
    sys.exit(main())
