"""`identify_flag` on clean and on damaged images of nations in all scenes."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.flagworld import (
    FlagIdentifier,
    FlagworldConfig,
    identify_flag,
    make_nations,
    read_flagworld,
)

CONFIG = FlagworldConfig(num_nations=0)


@pytest.fixture(scope="module")
def identifier():
    return FlagIdentifier(make_nations(CONFIG, "heldout"))


def damage(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Like a bad codec: half of each pixel is its 8x8 block's mean; then noise."""
    blocks = image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3), keepdims=True)
    mixed = 0.5 * image + 0.5 * np.broadcast_to(blocks, (8, 8, 8, 8, 3)).reshape(
        image.shape
    )
    return (mixed + rng.normal(0.0, 12.0, image.shape)).clip(0, 255).astype(np.uint8)


def accuracy(identifier, documents, images) -> float:
    found = identifier.identify(images)
    hits = [
        nation.name == document.metadata["nation"]
        for (nation, _), document in zip(found, documents, strict=True)
    ]
    return float(np.mean(hits))


def test_clean_renders_are_identified(identifier):
    documents = list(read_flagworld(CONFIG, "heldout_test"))[::3]
    images = [d.images[0] for d in documents]
    assert len(images) > 200
    assert accuracy(identifier, documents, images) >= 0.995


def test_damaged_renders_are_identified(identifier):
    documents = list(read_flagworld(CONFIG, "heldout_test"))[1::5]
    rng = np.random.default_rng(0)
    images = [damage(d.images[0], rng) for d in documents]
    assert len(images) > 120
    assert accuracy(identifier, documents, images) >= 0.98


def test_flags_anywhere_are_identified(identifier):
    config = FlagworldConfig(
        num_nations=0, placement_grid=1, wave_amplitudes=(0.0, 1.5), pole=False
    )
    documents = list(read_flagworld(config, "heldout_test"))[::6]
    images = [d.images[0] for d in documents]
    assert accuracy(identifier, documents, images) >= 0.98


def test_margin_is_positive_and_one_nation_has_no_second(identifier):
    document = next(read_flagworld(CONFIG, "heldout_test"))
    nation, margin = identify_flag(document.images[0], identifier.nations[:5])
    assert nation.name == document.metadata["nation"] and 0.0 < margin < 1.0
    _, margin = identify_flag(document.images[0], identifier.nations[:1])
    assert margin == np.inf


def test_wrong_arguments_of_identify_are_refused():
    with pytest.raises(ValueError, match="at least one nation"):
        FlagIdentifier([])
    with pytest.raises(ValueError, match="got \\[8, 9, 3\\]"):
        identify_flag(
            np.zeros((8, 9, 3), np.uint8), make_nations(CONFIG, "heldout")[:2]
        )
