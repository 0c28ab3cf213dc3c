"""Limits of settings: numbers in a range, names of a list."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def check_range(
    settings: Any, section: str, *names: str, low: float, high: float = math.inf
) -> None:
    """Checks numbers of a config section; NaN is out of every range.

    Args:
      settings: the section.
      section: its name, for errors.
      *names: of the settings.
      low: the smallest that is allowed.
      high: the largest.

    Raises:
      ValueError: names the setting, its limits and its value.
    """
    allowed = f">= {low}" if high == math.inf else f"in {low}..{high}"
    for name in names:
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(f"{section}.{name} must be {allowed}; got {value}")


def check_choices(settings: Any, section: str, **allowed: Collection[str]) -> None:
    """Checks names of a config section.

    Args:
      settings: the section.
      section: its name, for errors.
      **allowed: what each setting may be.

    Raises:
      ValueError: names the setting, its value and what is allowed.
    """
    for name, choices in allowed.items():
        value = getattr(settings, name)
        if value not in choices:
            raise ValueError(
                f"{section}.{name} is {value!r}; allowed: {', '.join(choices)}"
            )
