"""Which documents are trained on, which are held out, and how often they are seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from racm3_jax.documents.augmentation import (
    AugmentationConfig,
    Change,
    augment_each,
    change_images,
    sample_change,
)
from racm3_jax.documents.sources import parse_sources, repeat_rows, source_corpus


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    lines = ["file_name,caption,thing"]
    for i in range(12):
        pixels = np.full((8, 8, 3), 20 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,picture {i},thing {i % 4}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def names(documents):
    return [int(document.text.split()[-1]) for document in documents]


def test_a_group_is_in_one_split(photos):
    corpus = source_corpus(f"folder:{photos}", "thing", "thing 1, thing 3")
    assert {i % 4 for i in names(corpus.train())} == {0, 2}
    assert {i % 4 for i in names(corpus.heldout())} == {1, 3}
    assert {d.metadata["split"] for d in corpus.heldout()} == {"heldout"}
    file = photos.parent / "names.txt"
    file.write_text("thing 1\nthing 3\n")
    again = source_corpus(f"folder:{photos}", "thing", str(file))
    assert names(again.heldout()) == names(corpus.heldout())
    by_key = source_corpus(f"folder:{photos}", "", "thing=thing 1")
    assert {i % 4 for i in names(by_key.heldout())} == {1}


def test_a_fraction_is_chosen_only_by_names(photos):
    corpus = source_corpus(f"folder:{photos}", "", "0.4")
    found, rest = names(corpus.heldout()), names(corpus.train())
    assert sorted(found + rest) == list(range(12)) and found and rest
    assert names(source_corpus(f"folder:{photos}", "", "0.4").heldout()) == found
    assert not names(source_corpus(f"folder:{photos}").heldout())


def test_weights_set_how_often_a_document_is_seen(photos):
    corpus = source_corpus(f"2*folder:{photos} + folder:{photos};text=caption")
    assert corpus.times == (1.0, 2.0)
    assert [d.metadata.get("times") for d in corpus.train()] == ["2.0"] * 12 + [
        None
    ] * 12
    assert repeat_rows(np.array([1.0, 2.0, 1.0]), 0).tolist() == [0, 1, 1, 2]
    assert 400 < len(repeat_rows(np.full(1000, 0.5), 0)) < 600


@pytest.mark.parametrize("wrong", ["0*folder:x", "fodler:x", "folder:"])
def test_a_wrong_source_is_named(wrong):
    with pytest.raises(ValueError, match="weight 0|did you mean|no path"):
        parse_sources(wrong)


def test_a_wrong_fraction_is_named():
    with pytest.raises(ValueError, match=r"holdout is 1.5; a fraction"):
        source_corpus("folder:x", "", "1.5")


def test_a_change_is_applied_as_in_its_diagram():
    row = np.arange(4, dtype=np.uint8)
    images = np.broadcast_to(row[None, None, :, None], (2, 4, 4, 3))
    still = Change(False, 0.0, 0.0, 0.0)
    moved = change_images(images, still._replace(right=0.25))
    assert moved[1, 2, :, 0].tolist() == [1, 0, 1, 2]
    assert change_images(images, still._replace(mirrored=True))[
        0, 0, :, 1
    ].tolist() == [*(3, 2, 1, 0)]
    grey = np.full((1, 2, 2, 3), 77, np.uint8)
    red = np.array([[[[200, 0, 0]]]], np.uint8)
    turned = still._replace(turn=1 / 3)
    assert (change_images(grey, turned) == 77).all()
    assert sorted(change_images(red, turned).ravel().tolist()) == [0, 0, 200]


def test_changes_depend_only_on_the_seed():
    config = AugmentationConfig(mirror=True, shift=0.2, hue=0.1)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    first, again = (
        augment_each(images, config, np.random.default_rng(1)) for _ in range(2)
    )
    assert (first == again).all() and (first != images).any()
    sampled = {sample_change(config, rng) for _ in range(9)}
    assert len(sampled) == 9 and {c.mirrored for c in sampled} == {True, False}
    with pytest.raises(ValueError, match=r"augmentation.shift must be in 0..0.5"):
        AugmentationConfig(shift=0.6)
