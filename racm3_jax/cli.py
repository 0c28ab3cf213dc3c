"""The `racm3` command: one subcommand a task, thin over `run` and `build`.

Configs are given as ml_collections users expect:
`racm3 train --config=configs/flagworld.py:twin --config.optimizer.learning_rate=3e-4`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import racm3_jax
from racm3_jax.commands import (
    convert,
    demo,
    doctor,
    estimate,
    generate,
    memory,
    sweep,
    train,
)
from racm3_jax.commands.configs import UsageError

# Each module registers its own subcommands.
FAMILIES = (train, sweep, estimate, generate, demo, memory, convert, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
      The exit status: 0, 2 after wrong input, or 75 when a signal ended a training early
      (it saved; the same command goes on).
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 2
    takes_config = getattr(arguments, "takes_config", False)
    unknown = [a for a in rest if not (takes_config and a.startswith("--config"))]
    try:
        if unknown:
            raise UsageError(
                f"unknown argument {unknown[0]!r}; see racm3 {arguments.name} --help"
            )
        arguments.config_flags = rest
        _quiet_libraries()
        _keep_freed_memory()
        status = arguments.command(arguments)
    except (UsageError, ValueError, FileNotFoundError) as error:
        if arguments.traceback:
            raise
        print(f"racm3: {error}", file=sys.stderr)
        return 2
    return status or 0


def _quiet_libraries() -> None:
    """Progress bars and our own sentences are what a user should see."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Tells glibc not to give large blocks back after every step.

    XLA on CPU allocates and frees its buffers in each call; asking the kernel for fresh
    pages every time took a seventh of a training step.
    """
    import ctypes

    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="racm3",
        description="Retrieval-augmented multimodal language modelling (RA-CM3).",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from"
    )
    parser.add_argument(
        "--version", action="version", version=f"racm3_jax {racm3_jax.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name")
    for family in FAMILIES:
        family.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
