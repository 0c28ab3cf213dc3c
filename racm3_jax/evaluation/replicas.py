"""The models of an evaluation on every device of a process, each driven by a thread.

Test items are independent, so that devices need not talk to one another: every device
holds a whole copy and takes the next chunk (see `Parts.make`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax

from racm3_jax.generation.tasks import Generator


class Replicas:
    """A generator on several devices.

    Args:
      generator: as it was loaded.
      devices: of this process; (None,) leaves the generator where it is.
    """

    def __init__(self, generator: Generator, devices: Sequence[Any] = (None,)) -> None:
        self._generators = {d: place_generator(generator, d) for d in devices}

    def on(self, device: Any) -> Generator:
        """The copy on a device."""
        return self._generators[device]


def place_generator(generator: Generator, device: Any) -> Generator:
    """The same generator with all parameters on a device; None changes nothing."""
    if device is None:
        return generator
    placed = copy.copy(generator)
    placed.params = jax.device_put(generator.params, device)
    if generator.embedder is not None:
        placed.embedder = copy.copy(generator.embedder)
        placed.embedder.params = jax.device_put(generator.embedder.params, device)
    placed.tokenizer = copy.copy(generator.tokenizer)
    placed.tokenizer.image = copy.copy(generator.tokenizer.image)
    placed.tokenizer.image.params = jax.device_put(
        generator.tokenizer.image.params, device
    )
    return placed
