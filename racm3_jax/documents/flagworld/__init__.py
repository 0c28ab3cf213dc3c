"""Flagworld: a synthetic world in which image generation needs retrieval.

Nations have invented names that do not predict their flags; each document shows one
flag in one scene. Held-out nations are only in the memory, so a model that generates
their flags must have read them there.
"""

from __future__ import annotations

from racm3_jax.documents.flagworld.captions import PLACES, TEMPLATES, write_caption
from racm3_jax.documents.flagworld.config import FLAG_SIZES, FlagworldConfig
from racm3_jax.documents.flagworld.designs import (
    COLOURS,
    FlagDesign,
    num_designs,
    render_flag,
    sample_design,
)
from racm3_jax.documents.flagworld.identify import FlagIdentifier, identify_flag
from racm3_jax.documents.flagworld.nations import (
    Nation,
    make_nation,
    make_nations,
    reserved_scenes,
)
from racm3_jax.documents.flagworld.reader import SPLITS, read_flagworld, redraw
from racm3_jax.documents.flagworld.render import Placement, render, sample_placement
from racm3_jax.documents.flagworld.scenes import SCENES

__all__ = [
    "COLOURS",
    "FLAG_SIZES",
    "PLACES",
    "SCENES",
    "SPLITS",
    "TEMPLATES",
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
