"""Recall and preference against their definitions; when a CLIP may rank samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from racm3_jax.retrieval.alignment import Alignment, compute_ranks, measure_alignment


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_figures_equal_their_definitions():
    rng = np.random.default_rng(0)
    texts = unit(rng.normal(size=(700, 8)))
    images = unit(texts + 0.4 * rng.normal(size=(700, 8)))
    found = measure_alignment(texts, images)
    scores = texts @ images.T
    own = np.diag(scores)
    others = scores[~np.eye(700, dtype=bool)].reshape(700, 699)
    assert found.num_pairs == 700 and found.chance == 1 / 700
    assert found.text_to_image == (others.max(1) < own).mean()
    by_image = scores.T[~np.eye(700, dtype=bool)].reshape(700, 699)
    assert found.image_to_text == (by_image.max(1) < own).mean()
    assert found.preference == pytest.approx((others < own[:, None]).mean())
    assert found.own_similarity == pytest.approx(own.mean(), abs=1e-6)
    assert found.other_similarity == pytest.approx(others.mean(), abs=1e-6)
    np.testing.assert_array_equal(
        compute_ranks(texts, images), (others >= own[:, None]).sum(1)
    )


def test_only_a_clip_that_aligns_may_rank():
    rng = np.random.default_rng(1)
    texts, images = (unit(rng.normal(size=(300, 16))) for _ in range(2))
    noise = measure_alignment(texts, images)
    assert abs(noise.preference - 0.5) < 0.05 and not noise.may_rank
    assert noise.text_to_image < 0.03
    constant = np.ones((300, 16), np.float32) / 4
    nothing = measure_alignment(constant, constant)
    assert nothing.preference == 0.0 and not nothing.may_rank
    assert measure_alignment(texts, unit(texts + 0.1 * images)).may_rank


def test_measurements_are_kept_as_json():
    found = measure_alignment(*[unit(np.eye(3, 4))] * 2)
    assert Alignment.from_json(found.to_json()) == found
    assert Alignment.from_json({}) is None and Alignment.from_json(None) is None
    with pytest.raises(ValueError, match="measure the CLIP again"):
        Alignment.from_json({"recall": 1.0})
    assert dataclasses.replace(found, preference=0.89).may_rank is False


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="at least two texts"):
        measure_alignment(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32))
