"""The strategy: diagrams and properties."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.retrieval import strategy
from racm3_jax.retrieval.strategy import StrategyConfig


def _none(k):
    return np.zeros(k, bool)


def test_the_diagram_of_select():
    # Candidates 1 and 2 are nearly the same direction; 3 is excluded.
    embeddings = np.eye(5, dtype=np.float32)
    embeddings[2] = [0, 0.99, np.sqrt(1 - 0.99**2), 0, 0]
    scores = np.asarray([0.97, 0.80, 0.79, 0.60, 0.55], np.float32)
    excluded = np.asarray([False, False, False, True, False])
    taken = strategy.select(scores, embeddings, num=2, excluded=excluded)
    assert taken.tolist() == [1, 4]


def test_select_takes_at_most_num_in_order():
    scores = np.linspace(0.8, 0.1, 8, dtype=np.float32)
    embeddings = np.eye(8, dtype=np.float32)
    for num in range(10):
        taken = strategy.select(scores, embeddings, num=num, excluded=_none(8))
        assert taken.tolist() == list(range(min(num, 8)))


def test_select_of_nothing():
    taken = strategy.select(
        np.zeros(0, np.float32), np.zeros((0, 4), np.float32), num=2, excluded=_none(0)
    )
    assert taken.shape == (0,)
    assert taken.dtype == np.int64


def test_select_keeps_all_with_a_similarity_of_one_or_more():
    embeddings = np.tile(np.eye(1, 4, dtype=np.float32), (3, 1))
    scores = np.ones(3, np.float32)
    taken = strategy.select(
        scores, embeddings, num=3, excluded=_none(3), max_similarity=1.1
    )
    assert taken.tolist() == [0, 1, 2]


def test_selected_documents_are_never_similar():
    rng = np.random.default_rng(0)
    for _ in range(200):
        embeddings = rng.normal(size=(20, 3))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        query = embeddings[0]
        order = np.argsort(-(embeddings @ query))
        embeddings, scores = embeddings[order], (embeddings @ query)[order]
        excluded = rng.random(20) < 0.2
        taken = strategy.select(scores, embeddings, num=4, excluded=excluded)
        assert not excluded[taken].any()
        assert (scores[taken] <= 0.9).all()
        among = embeddings[taken] @ embeddings[taken].T - 2 * np.eye(len(taken))
        assert (among <= 0.9).all()
        # Every candidate skipped before the last selected one has a reason.
        end = taken[-1] if len(taken) == 4 else 20
        for position in set(range(end)) - set(taken.tolist()):
            before = embeddings[taken[taken < position]]
            assert (
                excluded[position]
                or scores[position] > 0.9
                or (before @ embeddings[position] > 0.9).any()
            )


def test_find_own():
    ids = np.asarray([1, 2, 3, 4], np.uint64)
    sources = np.asarray([0, 9, 9, 0], np.uint64)
    assert strategy.find_self_and_same_source(ids, sources, 1, 9).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert strategy.find_self_and_same_source(ids, sources, 4, 0).tolist() == [
        False
    ] * 3 + [True]
    own = strategy.find_self_and_same_source(ids, sources, 2, 9, drop_same_source=False)
    assert own.tolist() == [False, True, False, False]


def test_sample_num_documents_is_uniform():
    rng = np.random.default_rng(0)
    nums = [strategy.sample_num_documents(rng, 2) for _ in range(3000)]
    counts = np.bincount(nums, minlength=3)
    assert len(counts) == 3
    assert (np.abs(counts - 1000) < 100).all()
    assert strategy.sample_num_documents(rng, 0) == 0
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        strategy.sample_num_documents(rng, -1)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"num_candidates must be >= 1; got 0"):
        StrategyConfig(num_candidates=0)
    with pytest.raises(ValueError, match=r"max_candidates must be >= .*32.*; got 4"):
        StrategyConfig(max_candidates=4)
