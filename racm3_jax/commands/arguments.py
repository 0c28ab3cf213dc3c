"""What an option may be: paths, numbers in their range, texts that say something.

Types of argparse. What is wrong in itself is refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from racm3_jax.buckets import is_url, refuse_url

# Above this, a number of things is a slip of the finger.
MANY = 10**9
MAX_SEED = 2**32 - 1


class UrlError(argparse.ArgumentTypeError, ValueError):
    """A URL where a path is wanted: wrong input, of an option or inside of one."""


def path(text: str) -> str:
    """A path here; `~` is the home folder also after `=`, where shells leave it alone."""
    try:
        refuse_url(text, "this")
    except ValueError as error:
        raise UrlError(str(error)) from None
    return os.path.expanduser(filled(text))


def place(text: str) -> str:
    """A path, or the URL of a place in a bucket."""
    return text if is_url(text) else path(text)


def add_memory(sub: Any, required: bool = False) -> None:
    """`--memory` of a command that only reads it, and where one at a URL is copied to."""
    sub.add_argument(
        "--memory",
        type=place,
        default=None,
        required=required,
        help="its directory, or a URL" if required else "another one, or a URL of one",
    )
    sub.add_argument(
        "--memory_cache",
        type=path,
        default=None,
        metavar="FOLDER",
        help="where a memory at a URL is copied to; default ~/.cache/racm3/memories",
    )


def local_memory(arguments: argparse.Namespace) -> Any:
    """The folder of `--memory`, if any; of a URL, that of an up-to-date copy here."""
    if arguments.memory is None or not is_url(arguments.memory):
        return arguments.memory
    from racm3_jax.memory.staging import stage

    return str(stage(arguments.memory, arguments.memory_cache))


def filled(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value, or leave it out")
    return text


def whole(low: int = 0, high: int = MANY) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a whole number from {low} to {high}"
            )
        return value

    return read


def number(low: float = 0.0, high: float = math.inf) -> Callable[[str], float]:
    """A finite number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            allowed = f"from {low:g}" + ("" if high == math.inf else f" to {high:g}")
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a number {allowed}"
            )
        return value

    return read


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
