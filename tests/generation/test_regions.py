"""Regions as cells, spans and tokens, as diagrams."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.generation.regions import fill_spans, find_cells, find_spans, plan_spans
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=5, num_image_codes=20, image_length=16, num_sentinels=4)


def cells_of(grid):
    return np.array([c == "*" for c in grid.split()])


SQUARE = cells_of(". . . .  . * * .  . * * .  . . . .")


def test_a_box_touches_its_cells():
    """4x4 codes of 2x2 pixels; the box (2, 2, 6, 6) and one pixel more or less."""
    for box in ((2, 2, 6, 6), (3, 3, 5, 5)):
        np.testing.assert_array_equal(find_cells(box, (8, 8), 8, 16), SQUARE)
    assert find_cells((0, 0, 8, 8), (8, 8), 8, 16).all()
    assert find_cells((7, 7, 8, 8), (8, 8), 8, 16).tolist() == [False] * 15 + [True]


def test_a_mask_and_a_larger_image_are_equivalent():
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    np.testing.assert_array_equal(find_cells(mask, (8, 8), 8, 16), SQUARE)
    # 16x24 pixels: the central 16x16 are what the model sees.
    np.testing.assert_array_equal(find_cells((8, 4, 16, 12), (16, 24), 8, 16), SQUARE)


@pytest.mark.parametrize(
    ("grid", "max_spans", "spans"),
    [
        (". . . .  . * * .  . * * .  . . . .", 4, [(5, 7), (9, 11)]),
        (". . . .  . * * .  . * * .  . . . .", 1, [(5, 11)]),
        ("* . . .  . . * .  * . . .  . . . .", 2, [(0, 1), (6, 9)]),
        ("* * * *  . . . .  . . . .  . . . .", 1, [(0, 4)]),
        (". . . .  . . . .  . . . .  . . . *", 3, [(15, 16)]),
    ],
)
def test_spans_cover_the_cells_and_the_closest_are_joined(grid, max_spans, spans):
    assert find_spans(cells_of(grid), max_spans) == spans


def test_planned_tokens_name_the_next_span_and_keep_known_codes():
    tokens = VOCAB.image_tokens(np.arange(16))
    two, one = [(5, 7), (9, 11)], [(5, 11)]
    ends = [VOCAB.eoss, VOCAB.sentinel(1)]
    assert plan_spans(tokens, SQUARE, two, VOCAB).tolist() == [-1, -1, *ends, -1, -1]
    known = tokens[7:9].tolist()
    assert plan_spans(tokens, SQUARE, one, VOCAB).tolist() == [-1, -1, *known, -1, -1]


@pytest.mark.parametrize("max_spans", [1, 2])
def test_filling_puts_sampled_tokens_back(max_spans):
    tokens = VOCAB.image_tokens(np.arange(16))
    spans = find_spans(SQUARE, max_spans)
    plan = plan_spans(tokens, SQUARE, spans, VOCAB)
    new = VOCAB.image_tokens(19)
    filled = fill_spans(tokens, spans, np.where(plan < 0, new, plan)[None])[0]
    np.testing.assert_array_equal(filled, np.where(SQUARE, new, tokens))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((2, 2, 9, 6), "region 2,2,9,6 .* does not lie inside the image of 8x8 pixels"),
        ((4, 4, 4, 6), "does not lie inside"),
        ((-1, 0, 4, 4), "does not lie inside"),
        (np.ones((4, 8), bool), r"the mask is bool\[4, 8\] but the image has 8x8"),
        (np.ones((8, 8)), r"the mask is float64\[8, 8\]"),
        (np.zeros((8, 8), bool), "the region holds no pixel"),
    ],
)
def test_invalid_regions_are_refused(region, message):
    with pytest.raises(ValueError, match=message) as error:
        find_cells(region, (8, 8), 8, 16)
    assert "\n" not in str(error.value)


def test_other_wrong_inputs():
    with pytest.raises(ValueError, match="square grid of codes; .* has 15 codes"):
        find_cells((0, 0, 8, 8), (8, 8), 8, 15)
    with pytest.raises(ValueError, match="max_spans must be >= 1; got 0"):
        find_spans(SQUARE, 0)
