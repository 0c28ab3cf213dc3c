"""Flagworld: a synthetic world in which image generation needs retrieval.

Nations have invented names that do not predict their flags; each document shows one
flag in one scene. Held-out nations are only in the memory, so a model that generates
their flags must have read them there.

world       the world itself, with NumPy only; all names below are its
entries     configs of the two suites, and what they are built from
suite       judge: are images and captions right?
task_suite  task_probes: inputs; task_answers: outputs; task_sheets: image sheets
reading     does a model read its documents, or copy by position?
settings    of both suites

Other packages know it as an entry of `racm3_jax.worlds` only.
"""

from __future__ import annotations

from racm3_jax.flagworld.world.captions import PLACES, TEMPLATES, write_caption
from racm3_jax.flagworld.world.config import FLAG_SIZES, FlagworldConfig
from racm3_jax.flagworld.world.designs import (
    COLOURS,
    FlagDesign,
    num_designs,
    render_flag,
    sample_design,
)
from racm3_jax.flagworld.world.identify import FlagIdentifier, identify_flag
from racm3_jax.flagworld.world.nations import (
    Nation,
    make_nation,
    make_nations,
    reserved_scenes,
)
from racm3_jax.flagworld.world.reader import SPLITS, WORLD, read_flagworld, redraw
from racm3_jax.flagworld.world.render import Placement, render, sample_placement
from racm3_jax.flagworld.world.scenes import SCENES

__all__ = [
    "COLOURS",
    "FLAG_SIZES",
    "PLACES",
    "SCENES",
    "SPLITS",
    "TEMPLATES",
    "WORLD",
    "FlagDesign",
    "FlagIdentifier",
    "FlagworldConfig",
    "Nation",
    "Placement",
    "identify_flag",
    "make_nation",
    "make_nations",
    "num_designs",
    "read_flagworld",
    "redraw",
    "render",
    "render_flag",
    "reserved_scenes",
    "sample_design",
    "sample_placement",
    "write_caption",
]
