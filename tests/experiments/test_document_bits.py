"""Bits of held-out documents after right and wrong ones."""

from __future__ import annotations

import dataclasses

import document_bits
import pytest

from racm3_jax import wiring
from racm3_jax.documents.sources import Corpus
from racm3_jax.flagworld import FlagworldConfig, read_flagworld

WORLD = FlagworldConfig(num_nations=0, num_heldout=5, documents_per_heldout=4)


def make_corpus(key="nation"):
    read = lambda: read_flagworld(WORLD, "heldout_memory")
    return Corpus(key, read, read, read)


def test_right_documents_share_the_group_and_not_the_excluded_keys():
    keys = ("nation", "scene")
    for question in document_bits.make_questions(
        make_corpus(), 12, num_documents=1, exclude_keys=keys
    ):
        facts = question.asked.metadata
        (right,), (wrong,) = question.right, question.wrong
        assert right.metadata["nation"] == facts["nation"]
        assert right.metadata["scene"] != facts["scene"]
        assert wrong.metadata["nation"] != facts["nation"]
    asked = [q.asked.id for q in document_bits.make_questions(make_corpus(), 6)]
    assert len(set(asked)) == 6  # of 20


def test_a_source_without_groups_is_refused():
    with pytest.raises(ValueError, match="has 2 others of its group"):
        document_bits.make_questions(make_corpus("id"), 4)


def test_bits_tell_that_the_shipped_model_reads_both_documents():
    generator = wiring.load_generator(wiring.resolve("shipped:flagworld"), None)
    # Documents as training shows them: the asked one is not among them.
    questions = document_bits.make_questions(make_corpus(), 6, num_documents=2)
    found = document_bits.measure_bits(generator, questions)
    image, caption = found["image"], found["caption"]
    assert found["questions"] == 6
    assert image["itself"] < image["right"] < image["wrong"]
    assert caption["right"] < caption["wrong"]
    # A wrong one in front costs little: a model that copies the first loses all.
    for bits in image, caption:
        gained = bits["wrong"] - bits["right"]
        assert bits["wrong"] - bits["right_last"] > 0.5 * gained
        assert bits["wrong"] - bits["right_first"] > 0.5 * gained
    assert image["right_wins"] > 0.5
    alone = document_bits.measure_bits(
        generator,
        [dataclasses.replace(q, right=q.wrong, wrong=q.wrong) for q in questions],
    )
    assert alone["image"]["right"] == alone["image"]["wrong"] == image["wrong"]
