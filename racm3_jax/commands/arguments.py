"""argparse types of options: paths, numbers in a range, non-empty strings.

Invalid values are refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from racm3_jax.buckets import is_url, refuse_url

# Larger counts are typing errors.
MANY = 10**9
MAX_SEED = 2**32 - 1


class UrlError(argparse.ArgumentTypeError, ValueError):
    """A URL instead of a path, as an option or inside one."""


class Names:
    """Choices of an option that are read when they are shown or checked.

    With a metavar and `%(choices)s` in its help, adding the option reads nothing.

    Args:
      read: lists them.
    """

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def path(text: str) -> str:
    """A local path; expands `~` also after `=`, where shells do not."""
    try:
        refuse_url(text, "this")
    except ValueError as error:
        raise UrlError(str(error)) from None
    return os.path.expanduser(non_empty(text))


def place(text: str) -> str:
    """A path, or a URL in a bucket."""
    return text if is_url(text) else path(text)


def add_memory(sub: Any, required: bool = False) -> None:
    """Adds `--memory` of a command that only reads it, and `--memory_cache`."""
    sub.add_argument(
        "--memory",
        type=place,
        default=None,
        required=required,
        help="its directory, or a URL"
        if required
        else "directory or URL of another one; default: that of --workdir",
    )
    sub.add_argument(
        "--memory_cache",
        type=path,
        default=None,
        metavar="FOLDER",
        help="where a memory at a URL is copied to; default ~/.cache/racm3/memories",
    )


def local_memory(arguments: argparse.Namespace) -> Any:
    """The folder of `--memory`, if any; for a URL, of an up-to-date local copy."""
    if arguments.memory is None or not is_url(arguments.memory):
        return arguments.memory
    from racm3_jax.memory.staging import stage

    return str(stage(arguments.memory, arguments.memory_cache))


def non_empty(text: str) -> str:
    """A non-empty string."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value")
    return text


def integer(low: int = 0, high: int = MANY) -> Callable[[str], int]:
    """An integer from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not an integer from {low} to {high}"
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
