"""The documents of a flagworld, one caption and one image each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from racm3_jax.flagworld.world.captions import describe_flag, write_caption
from racm3_jax.flagworld.world.config import FlagworldConfig
from racm3_jax.flagworld.world.nations import (
    Nation,
    make_nations,
    reserved_scenes,
)
from racm3_jax.flagworld.world.render import render, sample_placement
from racm3_jax.flagworld.world.scenes import SCENES
from racm3_jax.types import Document, Segment
from racm3_jax.worlds import SPLITS, Split, World

_LICENCE = "CC0-1.0"


def _choose_scenes(
    config: FlagworldConfig, nation: Nation, split: Split
) -> list[tuple[int, str]]:
    """Number and scene of each document; scenes repeat only after all were used."""
    if split == "heldout_test":
        return list(enumerate(reserved_scenes(config, nation)))
    scenes: list[str] = list(SCENES)
    count = config.documents_per_nation
    if split == "heldout_memory":
        hidden = reserved_scenes(config, nation)
        scenes = [scene for scene in SCENES if scene not in hidden]
        count = config.documents_per_heldout
    order = np.random.default_rng([config.seed, 4, nation.id]).permutation(len(scenes))
    return [(k, scenes[order[k % len(order)]]) for k in range(count)]


def _make_document(
    config: FlagworldConfig, nation: Nation, split: Split, number: int, scene: str
) -> Document:
    stream = 5 + SPLITS.index(split)
    rng = np.random.default_rng([config.seed, stream, nation.id, number])
    caption = write_caption(nation.name, scene, rng)
    placement = sample_placement(rng, config)
    # A separate stream, so that worlds without descriptions do not change.
    style = np.random.default_rng([config.seed, 8, stream, nation.id, number])
    described, named = style.random(2)
    if named < config.name_share:
        caption = nation.name
    if described < config.description_share:
        large = 2 * placement.width > config.image_size
        caption += f", {describe_flag(nation.design, large=large)}"
    image = render(nation.design, scene, placement, config.image_size)
    name = f"{split}-{nation.id:06d}-{number}"
    doubled = rng.random() < config.duplicate_share
    return Document(
        id=name,
        segments=(Segment(text=caption), Segment(image=image)),
        source=f"flagworld/{name}" if doubled else "",
        metadata={
            "nation": nation.name,
            "nation_id": nation.id,
            "scene": scene,
            "split": split,
            "licence": _LICENCE,
            "box": placement.box,
        },
    )


def redraw(config: FlagworldConfig, document: Document, nation: Nation) -> Document:
    """The same scene, caption and placement with the name and flag of another nation.

    Args:
      config: the world that `document` comes from.
      document: from `read_flagworld`.
      nation: whose name and flag are shown; the document keeps its id.
    """
    facts = document.metadata
    number = int(document.id.removesuffix("-copy").rsplit("-", 1)[1])
    shown = dataclasses.replace(nation, id=facts["nation_id"])
    return _make_document(config, shown, facts["split"], number, facts["scene"])


def read_flagworld(config: FlagworldConfig, split: Split) -> Iterator[Document]:
    """Yields the documents of a split, nation by nation.

    Args:
      config: the world.
      split: "train" (training nations), "heldout_memory" (held-out nations, outside
        their reserved scenes) or "heldout_test" (in their reserved scenes; the caption
        names the scene).

    Yields:
      Documents of a caption and an image, with metadata nation, nation_id, scene, split,
      licence and box (top, left, height, width of the flag in pixels). With
      `duplicate_share` some are followed by a copy of the same `source`, whose id ends
      in "-copy".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    for nation in make_nations(config, "train" if split == "train" else "heldout"):
        for number, scene in _choose_scenes(config, nation, split):
            document = _make_document(config, nation, split, number, scene)
            yield document
            if document.source:
                yield Document(
                    id=f"{document.id}-copy",
                    segments=document.segments,
                    source=document.source,
                    metadata=document.metadata,
                )


def _describe_all(config: FlagworldConfig) -> FlagworldConfig:
    """If some captions describe their image, the evaluation captions do."""
    if not config.description_share:
        return config
    return dataclasses.replace(config, description_share=1.0)


def _count(config: FlagworldConfig) -> int:
    held_out = config.num_heldout * config.documents_per_heldout
    return held_out + config.num_nations * config.documents_per_nation


WORLD = World(
    settings=FlagworldConfig,
    read=read_flagworld,
    group_key="nation_id",
    source={"seed": 0, "num_nations": 40, "num_heldout": 16, "image_size": 64},
    measured=_describe_all,
    count=_count,
    class_key="nation",
)
