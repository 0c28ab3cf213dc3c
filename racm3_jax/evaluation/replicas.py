"""Copies of the models of an evaluation on every device of a process, one thread each.

Test items are independent, so devices do not communicate: every device has a complete copy
and takes the next chunk (see `Parts.make`).
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
      generator: as loaded.
      devices: of this process; (None,) does not move the generator.
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
    placed = _on_device(generator, device)
    if generator.embedder is not None:
        placed.embedder = _on_device(generator.embedder, device)
    placed.tokenizer = copy.copy(generator.tokenizer)
    placed.tokenizer.image = _on_device(generator.tokenizer.image, device)
    return placed


def _on_device(model: Any, device: Any) -> Any:
    """The same model with its parameters on one device, reusing a copy there."""

    def put(x: Any) -> Any:
        if isinstance(x, jax.Array) and x.is_fully_replicated:
            for shard in x.addressable_shards:
                if shard.device == device:
                    return shard.data
        return jax.device_put(x, device)

    placed = copy.copy(model)
    placed.params, placed.mesh = jax.tree.map(put, model.params), None
    return placed
