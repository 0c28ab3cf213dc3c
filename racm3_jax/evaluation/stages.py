"""The stages of a suite: each is timed, and says so when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


class Stages:
    """Runs named stages one after the other.

    Args:
      log: receives one line a stage.

    Attributes:
      seconds: what each stage took, by its name.
    """

    def __init__(self, log: Callable[[str], None] = print) -> None:
        self.seconds: dict[str, float] = {}
        self._log = log

    def run(self, name: str, stage: Callable[[], _Result]) -> _Result:
        """What the stage returns."""
        started = time.monotonic()
        value = stage()
        self.seconds[name] = round(time.monotonic() - started, 1)
        self._log(f"{name}: {self.seconds[name]} s")
        return value
