"""Captions: a nation, its flag, and the scene, in many word orders."""

from __future__ import annotations

import numpy as np

from racm3_jax.flagworld.world.designs import FlagDesign

# Every phrase contains the scene's name, so that prompts with the name always work.
# Scene name -> (phrase of place, noun phrase).
PLACES: dict[str, tuple[str, str]] = {
    "moon": ("on the moon", "the moon"),
    "beach": ("on the beach", "a beach"),
    "mountains": ("in the mountains", "the mountains"),
    "night city": ("in the night city", "a night city"),
    "forest": ("in the forest", "a forest"),
    "desert": ("in the desert", "a desert"),
    "snow": ("in the snow", "the snow"),
    "sea": ("on the sea", "the sea"),
    "meadow": ("in the meadow", "a meadow"),
    "volcano": ("on the volcano", "a volcano"),
}

TEMPLATES: tuple[str, ...] = (
    "the flag of {nation} {place}",
    "{place} stands the flag of {nation}",
    "a photo of {scene} with the {nation} flag",
    "the {nation} flag waving {place}",
    "{nation} raised its flag {place}",
    "a picture of the {nation} flag {place}",
    "{scene} and the flag of {nation}",
    "seen {place}, the flag of {nation}",
    "a flag {place}, it belongs to {nation}",
    "the national flag of {nation} {place}",
    "{place} flies the {nation} flag",
    "{scene} where the flag of {nation} flies",
    "photo of the flag of {nation}, taken {place}",
    "{nation} has its flag {place}",
)


def describe_flag(design: FlagDesign, *, large: bool) -> str:
    """Describes a flag: size, layout, colours, emblem.

    "a large flag, chevron of red, white and black with a blue star at the hoist"

    Independent of the nation's name.
    """
    *others, last = design.colours
    colours = f"{', '.join(others)} and {last}" if others else last
    size = "large" if large else "small"
    text = f"a {size} flag, {design.layout.replace('_', ' ')} of {colours}"
    if design.emblem is not None:
        text += f" with a {design.emblem_colour} {design.emblem}"
        if design.emblem_place == "hoist":
            text += " at the hoist"
    return text


def write_caption(nation_name: str, scene: str, rng: np.random.Generator) -> str:
    """Writes a caption of 5 to 12 words from a random template.

    Args:
      nation_name: the only word with a capital letter.
      scene: a name of `PLACES`.
      rng: chooses the template.
    """
    if scene not in PLACES:
        raise ValueError(f"scene must be one of {', '.join(PLACES)}; got {scene!r}")
    place, thing = PLACES[scene]
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return template.format(nation=nation_name, place=place, scene=thing)
