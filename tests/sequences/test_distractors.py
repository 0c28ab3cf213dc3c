"""Distractors come from other examples, and replace the least relevant documents."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from racm3_jax.sequences.distractors import mix_documents
from racm3_jax.sequences.pipeline_config import PipelineConfig
from racm3_jax.types import TokenizedDocument

CONFIG = PipelineConfig(rows=1, row_length=8, examples_per_batch=1)


def documents(*names):
    return tuple(TokenizedDocument(name, ()) for name in names)


MAINS = documents("x", "y", "b0", "z")
FOUND = [documents("a0", "a1"), documents("b0", "b1"), documents("c0"), ()]


def mix(seed, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    rngs = [np.random.default_rng([seed, i]) for i in range(len(FOUND))]
    mixed, _ = mix_documents(FOUND, MAINS, config, rngs)
    return [[document.id for document in found] for found in mixed]


def test_by_default_nothing_changes():
    assert mix(0) == [["a0", "a1"], ["b0", "b1"], ["c0"], []]


def test_the_last_of_several_is_replaced():
    seen = Counter()
    for seed in range(200):
        first, second, single, none = mix(seed, distractor_probability=1.0)
        assert first[0] == "a0" and second[0] == "b0"
        assert single == ["c0"] and none == []
        seen[first[1]] += 1
        assert second[1] in {"a0", "a1", "c0"}
    assert set(seen) == {"b0", "b1", "c0"} and min(seen.values()) > 40


def test_their_fraction_is_as_configured():
    kept = [mix(s, distractor_probability=0.25)[0] == ["a0", "a1"] for s in range(800)]
    assert 0.7 < np.mean(kept) < 0.8


def test_an_example_is_not_given_its_own_main_document():
    config = dataclasses.replace(CONFIG, distractor_probability=1.0)
    found = [documents("a", "b"), documents("main")]
    rngs = [np.random.default_rng(i) for i in range(2)]
    mixed, _ = mix_documents(found, documents("main", "other"), config, rngs)
    assert mixed == found  # there is no other document


def test_shuffling_gives_every_order():
    orders = Counter(tuple(mix(s, document_order="shuffled")[0]) for s in range(400))
    assert set(orders) == {("a0", "a1"), ("a1", "a0")}
    assert 150 < orders["a0", "a1"] < 250


def test_ranks_keep_the_order_of_relevance():
    config = dataclasses.replace(
        CONFIG, document_order="shuffled", distractor_probability=1.0
    )
    for seed in range(20):
        rngs = (np.random.default_rng([seed, i]) for i in range(4))
        mixed, ranks = mix_documents(FOUND, MAINS, config, rngs)
        assert mixed[0][ranks[0].index(0)].id == "a0"
        assert mixed[0][ranks[0].index(1)].id != "a1"  # the distractor
        assert ranks[2:] == [(0,), ()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"document_order": "random"}, "pipeline.document_order is 'random'; allowed"),
        ({"distractor_probability": 1.5}, "must be in 0..1; got 1.5"),
        ({"min_documents": -1}, "pipeline.min_documents must be >= 0; got -1"),
        ({"min_documents": 3}, "min_documents=3 is more than pipeline.max_documents=2"),
    ],
)
def test_invalid_distractor_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
