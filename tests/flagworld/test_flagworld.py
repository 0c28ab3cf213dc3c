"""Flagworld: designs, nations, captions, documents."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from racm3_jax import flagworld
from racm3_jax.flagworld.world import designs
from racm3_jax.flagworld.world.layouts import LAYOUTS

SMALL = flagworld.FlagworldConfig(num_nations=40, num_heldout=20)

# Of the first version; if this changes, the shipped weights are outdated.
GOLDEN = "086e1ec2b15a06f95984d6aaf661869bda58226718c9fce2e5576b943ef74f65"


def digest(documents) -> str:
    state = hashlib.sha256()
    for document in documents:
        state.update(f"{document.id}|{document.text}|{document.metadata}".encode())
        state.update(document.images[0].tobytes())
    return state.hexdigest()


def test_world_has_the_same_bytes_on_every_run():
    documents = [
        d for s in flagworld.SPLITS for d in flagworld.read_flagworld(SMALL, s)
    ]
    assert digest(documents) == GOLDEN


def test_another_seed_is_another_world():
    other = dataclasses.replace(SMALL, seed=1)
    names = {n.name for n in flagworld.make_nations(SMALL, "train")}
    assert not names & {n.name for n in flagworld.make_nations(other, "train")}


def test_there_are_enough_layouts_scenes_templates_and_emblems():
    assert len(LAYOUTS) >= 40
    assert len(flagworld.SCENES) >= 8
    assert len(flagworld.TEMPLATES) >= 12
    assert len(designs.EMBLEMS) >= 8
    assert set(flagworld.PLACES) == set(flagworld.SCENES)


def test_more_than_100_000_designs_and_few_are_similar():
    assert flagworld.num_designs() > 1_000_000
    rng = np.random.default_rng(0)
    sample = list({flagworld.sample_design(rng) for _ in range(2000)})
    assert len(sample) > 1700
    kept = designs.select_different(designs.thumbnails(sample), np.empty((0, 288)))
    assert len(kept) > 0.95 * len(sample)


def test_nations_differ_in_name_and_flag_within_and_across_splits():
    config = flagworld.FlagworldConfig(num_nations=1000, num_heldout=100)
    train = flagworld.make_nations(config, "train")
    heldout = flagworld.make_nations(config, "heldout")
    nations = heldout + train
    assert (len(train), len(heldout)) == (1000, 100)
    assert [n.id for n in nations] == list(range(1100))
    names = [n.name.lower() for n in nations]
    assert not [(a, b) for a, b in itertools.permutations(names, 2) if a in b]
    small = designs.thumbnails([n.design for n in nations]).astype(np.float64)
    squares = (small**2).sum(axis=1)
    distances = squares[:, None] + squares[None] - 2.0 * small @ small.T
    distances[np.diag_indices(len(small))] = np.inf
    # Rounding to 1/127 inside the selection may cost 0.01.
    assert np.sqrt(distances.min() / 288) > designs.MIN_DIFFERENCE - 0.01


def test_names_are_at_least_two_edits_apart():
    names = [n.name.lower() for n in flagworld.make_nations(SMALL, "train")]

    def edits(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                previous, row[j] = (
                    row[j],
                    min(row[j] + 1, row[j - 1] + 1, previous + (x != y)),
                )
        return row[-1]

    assert min(edits(a, b) for a, b in itertools.combinations(names, 2)) >= 2
    assert all(n.isascii() and n.isalpha() and 4 <= len(n) <= 16 for n in names)


def test_a_world_may_share_no_design_and_no_name_with_another():
    """Experiments need flags that were not in any training."""

    def designs(**changes):
        config = flagworld.FlagworldConfig(
            num_nations=1500, num_heldout=50, num_colours=5, **changes
        )
        return [
            nation
            for split in ("train", "heldout")
            for nation in flagworld.make_nations(config, split)
        ]

    known, plain = designs(), designs(seed=1)
    apart = designs(seed=1, avoided_seed=0, avoided_nations=1550)
    assert {n.design for n in plain} & {n.design for n in known}
    assert not {n.design for n in apart} & {n.design for n in known}
    assert not {n.name for n in apart} & {n.name for n in known}
    assert len(apart) == 1550
    # Avoided designs do not change the others.
    kept = {n.design for n in plain} - {n.design for n in known}
    assert len(kept & {n.design for n in apart}) > 0.7 * len(kept)


def test_the_name_is_independent_of_the_flag():
    nation = flagworld.make_nation(7)
    assert nation == flagworld.make_nation(7)
    again = flagworld.make_nation(7, num_colours=10)
    assert again.name == nation.name


def test_swapped_flags_are_a_derangement_and_names_are_kept():
    swapped_config = dataclasses.replace(SMALL, swap_flags=True)
    plain = flagworld.make_nations(SMALL, "heldout")
    swapped = flagworld.make_nations(swapped_config, "heldout")
    assert [(n.id, n.name) for n in plain] == [(n.id, n.name) for n in swapped]
    assert {n.design for n in plain} == {n.design for n in swapped}
    assert all(a.design != b.design for a, b in zip(plain, swapped, strict=True))
    train = flagworld.make_nations(swapped_config, "train")
    assert train == flagworld.make_nations(SMALL, "train")


def test_captions_name_nation_and_scene_in_5_to_12_words():
    rng = np.random.default_rng(0)
    first_words = set()
    for scene in flagworld.SCENES:
        for _ in range(100):
            caption = flagworld.write_caption("Velmoria", scene, rng)
            assert scene in caption and caption.count("Velmoria") == 1
            assert 5 <= len(caption.split()) <= 12
            assert caption.isascii()
            assert caption.replace("Velmoria", "velmoria").islower()
            first_words.add(caption.split()[0])
    assert len(first_words) > 3
    assert "the flag of {nation} {place}" in flagworld.TEMPLATES


def test_a_fraction_of_the_captions_describes_the_flag():
    plain = list(flagworld.read_flagworld(SMALL, "train"))
    some = dataclasses.replace(SMALL, description_share=0.5)
    nations = {n.name: n for n in flagworld.make_nations(SMALL, "train")}
    described = 0
    for document, other in zip(
        plain, flagworld.read_flagworld(some, "train"), strict=True
    ):
        np.testing.assert_array_equal(document.images[0], other.images[0])
        assert other.text.startswith(document.text)
        words = other.text.removeprefix(document.text)
        if words:
            described += 1
            design = nations[document.metadata["nation"]].design
            size = "large" if document.metadata["box"][3] > 32 else "small"
            assert words.startswith(f", a {size} flag, ")
            assert design.layout.replace("_", " ") in words
            assert all(colour in words for colour in design.colours)
            emblem = f"with a {design.emblem_colour} {design.emblem}"
            assert (design.emblem is not None) == (emblem in words)
    assert 0.4 < described / len(plain) < 0.6


def test_a_fraction_of_the_captions_is_only_the_name():
    plain = list(flagworld.read_flagworld(SMALL, "train"))
    some = dataclasses.replace(SMALL, name_share=0.5)
    alone = 0
    for document, other in zip(
        plain, flagworld.read_flagworld(some, "train"), strict=True
    ):
        np.testing.assert_array_equal(document.images[0], other.images[0])
        alone += other.text == document.metadata["nation"]
        assert other.text in (document.text, document.metadata["nation"])
    assert 0.4 < alone / len(plain) < 0.6


def test_redrawn_documents_differ_only_in_the_nation():
    one, two = flagworld.make_nations(SMALL, "heldout")[:2]
    for document in itertools.islice(
        flagworld.read_flagworld(SMALL, "heldout_test"), 2
    ):
        same = flagworld.redraw(SMALL, document, one)
        assert digest([same]) == digest([document])
        other = flagworld.redraw(SMALL, document, two)
        assert other.text == document.text.replace(one.name, two.name)
        top, left, height, width = document.metadata["box"]
        changed = (other.images[0] != document.images[0]).any(-1)
        assert changed.any()
        changed[top - 2 : top + height + 2, left : left + width] = False
        assert not changed.any()


def test_documents_are_a_caption_and_an_image_with_metadata():
    documents = list(flagworld.read_flagworld(SMALL, "train"))
    assert len(documents) == 40 * 5
    assert len({d.id for d in documents}) == len(documents)
    document = documents[2]
    assert document.id == "train-000020-2"
    assert [s.modality for s in document.segments] == ["text", "image"]
    assert document.images[0].shape == (64, 64, 3)
    assert document.metadata["nation"] in document.text
    assert document.metadata["scene"] in document.text
    assert document.metadata["licence"] == "CC0-1.0"
    assert document.source == ""
    top, left, height, width = document.metadata["box"]
    assert top % 8 == left % 8 == 0 and (width, height) in flagworld.FLAG_SIZES


def test_memory_never_shows_a_heldout_nation_in_its_reserved_scenes():
    memory = list(flagworld.read_flagworld(SMALL, "heldout_memory"))
    test = list(flagworld.read_flagworld(SMALL, "heldout_test"))
    assert (len(memory), len(test)) == (20 * 8, 20 * 2)
    shown = {(d.metadata["nation"], d.metadata["scene"]) for d in memory}
    asked = {(d.metadata["nation"], d.metadata["scene"]) for d in test}
    assert len(asked) == len(test) and not shown & asked
    assert {n for n, _ in shown} == {n for n, _ in asked}


def test_heldout_nations_never_occur_in_training():
    train = {d.metadata["nation"] for d in flagworld.read_flagworld(SMALL, "train")}
    heldout = {n.name for n in flagworld.make_nations(SMALL, "heldout")}
    assert not train & heldout


def test_swapped_memory_changes_images_and_nothing_else():
    swapped = dataclasses.replace(SMALL, swap_flags=True)
    pairs = zip(
        flagworld.read_flagworld(SMALL, "heldout_memory"),
        flagworld.read_flagworld(swapped, "heldout_memory"),
        strict=True,
    )
    for a, b in itertools.islice(pairs, 20):
        assert (a.id, a.text, a.metadata) == (b.id, b.text, b.metadata)
        assert (a.images[0] != b.images[0]).any()


def test_duplicates_share_their_source():
    config = dataclasses.replace(SMALL, duplicate_share=0.5)
    documents = list(flagworld.read_flagworld(config, "train"))
    copies = {d.id: d for d in documents if d.id.endswith("-copy")}
    assert 60 < len(copies) < 140
    for document in documents:
        copy = copies.get(f"{document.id}-copy")
        assert (copy is not None) == (
            document.source != "" and document.id not in copies
        )
        if copy is not None:
            assert copy.source == document.source and copy.text == document.text


@pytest.mark.parametrize("image_size", [32, 96])
def test_other_image_sizes(image_size):
    config = dataclasses.replace(SMALL, image_size=image_size, placement_grid=4)
    document = next(flagworld.read_flagworld(config, "train"))
    assert document.images[0].shape == (image_size, image_size, 3)


def test_flags_are_drawn_at_their_placement():
    design = flagworld.FlagDesign("vertical_2", ("red", "white"))
    place = flagworld.Placement(top=8, left=16, width=32, height=24)
    image = flagworld.render(design, "sea", place)
    flag = flagworld.render_flag(design, (32, 24))
    np.testing.assert_array_equal(image[8:32, 16:48], flag)
    np.testing.assert_array_equal(flag[0, 0], designs.COLOURS["red"])
    np.testing.assert_array_equal(flag[0, -1], designs.COLOURS["white"])
    waving = dataclasses.replace(place, amplitude=1.5)
    moved = flagworld.render(design, "sea", waving).astype(int) - image
    rows = np.nonzero(np.abs(moved).sum(axis=(1, 2)))[0]
    assert 5 <= rows.min() < 8 and 32 <= rows.max() <= 34


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 60}, "multiple of 8"),
        ({"num_nations": -1}, "num_nations must be >= 0"),
        ({"duplicate_share": 2.0}, "duplicate_share must be in 0..1"),
        ({"flag_sizes": ()}, "at least one entry"),
    ],
)
def test_wrong_configs_are_refused_in_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        flagworld.FlagworldConfig(**changes)


def test_wrong_arguments_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="split must be one of train, heldout_memory"):
        next(flagworld.read_flagworld(SMALL, "test"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scene must be one of moon"):
        flagworld.write_caption("Velmoria", "kitchen", np.random.default_rng(0))
    with pytest.raises(ValueError, match="leaves the image"):
        place = flagworld.Placement(top=50, left=0, width=32, height=24)
        flagworld.render(flagworld.make_nation(0).design, "moon", place)
    with pytest.raises(ValueError, match="takes 2 colours; got 1"):
        flagworld.render_flag(flagworld.FlagDesign("vertical_2", ("red",)), (32, 24))
    with pytest.raises(ValueError, match="does not fit"):
        config = dataclasses.replace(SMALL, flag_sizes=((64, 48),))
        next(flagworld.read_flagworld(config, "train"))
