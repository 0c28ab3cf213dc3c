"""In some examples the retrieved documents show their images in front of their texts."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.layout import document_tokens, put_images_first
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.types import Retrieved

PLAIN = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)
CONFIG = PipelineConfig(
    rows=4, row_length=24, examples_per_batch=4, min_documents=2, seed=5
)
NUM = 6


def collect(vocab, make_document, probability, start_step=0, num_steps=12):
    """Examples as tokens; document i has the text ti and codes i."""
    documents = [make_document(f"t{i}", f"i{i} i{i}", id=str(i)) for i in range(NUM)]
    memory = types.SimpleNamespace(
        documents=lambda ids: [documents[i] for i in ids],
        queries=lambda ids, modality, variant: np.asarray(ids, np.float32)[:, None],
    )

    def retrieve(queries, nums, mains):
        rows = [(int(query[0]) + np.array([1, 2])) % NUM for query in queries]
        found = [tuple(documents[i] for i in pair) for pair in rows]
        ones = np.ones(2, np.float32)
        return [Retrieved(r, ones, d) for r, d in zip(rows, found, strict=True)]

    with make_batches(
        memory,
        types.SimpleNamespace(retrieve=retrieve),
        np.arange(NUM),
        vocab,
        PLAIN,
        dataclasses.replace(CONFIG, image_first_probability=probability),
        start_step=start_step,
        num_steps=num_steps,
    ) as batches:
        return [
            row[segments == number]
            for batch, _ in batches
            for row, segments in zip(batch.inputs, batch.segment_ids, strict=True)
            for number in range(1, segments.max() + 1)
        ]


def first_modalities(vocab, tokens):
    """Whether each document of an example begins with its image."""
    ends = np.flatnonzero(tokens == vocab.eod)
    return [
        bool(vocab.is_image(tokens[end + 1])) for end in ends if end + 1 < len(tokens)
    ]


def test_images_come_first_and_texts_keep_their_order(vocab, make_document):
    document = make_document("t1 t2", "i3 i4", "t5", id="a")
    turned = put_images_first(document)
    assert [s.modality for s in turned.segments] == ["image", "text", "text"]
    expected = np.concatenate([document.segments[i].tokens for i in (1, 0, 2)])
    tokens = document_tokens(turned, vocab)
    assert tokens[tokens != vocab.break_].tolist() == expected.tolist()
    assert turned.id == document.id


def test_all_documents_of_an_example_are_turned_or_none(vocab, make_document):
    found = [
        first_modalities(vocab, example)
        for example in collect(vocab, make_document, 0.5)
    ]
    assert all(len(order) == 3 and not order[-1] for order in found)
    assert all(order[0] == order[1] for order in found)
    assert 0.25 < np.mean([order[0] for order in found]) < 0.75
    always = collect(vocab, make_document, 1.0, num_steps=3)
    assert all(
        first_modalities(vocab, example)[:2] == [True, True] for example in always
    )


def test_it_changes_nothing_else_and_resumes(vocab, make_document):
    plain, turned = (collect(vocab, make_document, p) for p in (0.0, 0.5))
    for before, after in zip(plain, turned, strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())
        assert before[-5:].tolist() == after[-5:].tolist()
    again = collect(vocab, make_document, 0.5, start_step=8, num_steps=4)
    for before, after in zip(turned[-len(again) :], again, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_a_probability_lies_between_0_and_1(probability):
    with pytest.raises(ValueError, match="image_first_probability must be in 0..1"):
        dataclasses.replace(CONFIG, image_first_probability=probability)
