"""Nations: a name and an independent flag."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from racm3_jax.documents.invented_names import NameRegister, make_name
from racm3_jax.flagworld.world.config import FlagworldConfig
from racm3_jax.flagworld.world.designs import (
    FlagDesign,
    sample_design,
    select_different,
    thumbnails,
)
from racm3_jax.flagworld.world.scenes import SCENES

NationSplit = Literal["train", "heldout"]
_CANDIDATES_AT_ONCE = 512
_MAX_REFUSED_BATCHES = 40


@dataclasses.dataclass(frozen=True)
class Nation:
    """A nation of flagworld.

    Attributes:
      id: unique within a config; held-out nations come first.
      name: unique, invented, with a capital letter.
      design: what its flag looks like.
    """

    id: int
    name: str
    design: FlagDesign


def make_nation(seed: int | Sequence[int], num_colours: int = 8) -> Nation:
    """Makes one nation from a seed; name and flag use independent random streams.

    Args:
      seed: one number or several; the last one becomes the nation's id.
      num_colours: how many of `COLOURS` the flag may use.
    """
    words = [seed] if isinstance(seed, int) else list(seed)
    return Nation(
        id=words[-1],
        name=make_name(np.random.default_rng([*words, 0])),
        design=sample_design(np.random.default_rng([*words, 1]), num_colours),
    )


@functools.lru_cache(maxsize=8)
def _all_nations(
    seed: int,
    count: int,
    num_colours: int,
    avoided_seed: int = 0,
    avoided_nations: int = 0,
) -> tuple[Nation, ...]:
    """The first `count` nations whose names and flags are all clearly different."""
    avoided: tuple[Nation, ...] = ()
    if avoided_nations:
        avoided = _all_nations(avoided_seed, avoided_nations, num_colours)
    avoided_designs = {nation.design for nation in avoided}
    avoided_names = {nation.name for nation in avoided}
    register = NameRegister()
    nations: list[Nation] = []
    taken = np.empty((count, len(thumbnails([make_nation(0).design])[0])), np.float32)
    candidate = refused_batches = 0
    while len(nations) < count:
        stop = candidate + _CANDIDATES_AT_ONCE
        batch = [make_nation((seed, i), num_colours) for i in range(candidate, stop)]
        batch = [
            nation
            for nation in batch
            if nation.design not in avoided_designs and nation.name not in avoided_names
        ]
        small = thumbnails([nation.design for nation in batch])
        before = len(nations)
        for i in select_different(small, taken[:before]):
            if len(nations) < count and register.accept(batch[i].name):
                taken[len(nations)] = small[i]
                nations.append(dataclasses.replace(batch[i], id=len(nations)))
        refused_batches = refused_batches + 1 if len(nations) == before else 0
        if refused_batches > _MAX_REFUSED_BATCHES:
            raise ValueError(
                f"only {len(nations)} of {count} nations have clearly different names "
                "and flags; lower flagworld.num_nations or raise num_colours"
            )
        candidate = stop
    return tuple(nations)


def make_nations(config: FlagworldConfig, split: NationSplit) -> list[Nation]:
    """Makes the nations of a split; names and flags are disjoint across splits.

    With `config.swap_flags` the held-out nations keep their names and permute their
    flags, so that none keeps its own.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout'; got {split!r}")
    count = config.num_heldout + config.num_nations
    nations = _all_nations(
        config.seed,
        count,
        config.num_colours,
        config.avoided_seed,
        config.avoided_nations,
    )
    if split == "train":
        return list(nations[config.num_heldout :])
    heldout = nations[: config.num_heldout]
    if not config.swap_flags:
        return list(heldout)
    # A random cyclic permutation leaves no nation with its own flag.
    circle = np.random.default_rng([config.seed, 2]).permutation(len(heldout))
    swapped = list(heldout)
    for giver, receiver in zip(circle, np.roll(circle, 1), strict=True):
        swapped[receiver] = dataclasses.replace(
            heldout[receiver], design=heldout[giver].design
        )
    return swapped


def reserved_scenes(config: FlagworldConfig, nation: Nation) -> tuple[str, ...]:
    """The scenes in which the memory never shows this held-out nation."""
    if config.num_reserved_scenes >= len(SCENES):
        raise ValueError(
            f"flagworld.num_reserved_scenes must be < {len(SCENES)}; got "
            f"{config.num_reserved_scenes}"
        )
    order = np.random.default_rng([config.seed, 3, nation.id]).permutation(len(SCENES))
    return tuple(SCENES[k] for k in order[: config.num_reserved_scenes])
