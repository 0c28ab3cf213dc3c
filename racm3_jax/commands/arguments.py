"""What an option may be: paths, numbers in their range, texts that say something.

Types of argparse. What is wrong in itself is refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

# Above this, a number of things is a slip of the finger.
MANY = 10**9
MAX_SEED = 2**32 - 1


def path(text: str) -> str:
    """A path; `~` is the home folder also after `=`, where shells leave it alone."""
    return os.path.expanduser(filled(text))


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
