"""In some examples the images of retrieved documents come before their texts."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.sequences.layout import document_tokens, put_images_first
from racm3_jax.sequences.pipeline_config import PipelineConfig

NUM = 6


@pytest.fixture
def collect(make_document, ring_batches):
    """Examples as tokens; document i has the text ti and codes i."""
    documents = [make_document(f"t{i}", f"i{i} i{i}", id=str(i)) for i in range(NUM)]

    def examples(probability, start=0, num=12):
        how = {"image_first_probability": probability}
        return [
            row[segments == number]
            for batch in ring_batches(documents, start, num, **how)
            for row, segments in zip(batch.inputs, batch.segment_ids, strict=True)
            for number in range(1, segments.max() + 1)
        ]

    return examples


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


def test_all_or_no_documents_of_an_example_are_reordered(vocab, collect):
    found = [first_modalities(vocab, example) for example in collect(0.5)]
    assert all(len(order) == 3 and not order[-1] for order in found)
    assert all(order[0] == order[1] for order in found)
    assert 0.25 < np.mean([order[0] for order in found]) < 0.75
    always = [first_modalities(vocab, example)[:2] for example in collect(1.0, num=3)]
    assert all(order == [True, True] for order in always)


def test_it_changes_nothing_else_and_resumes(collect):
    plain, turned = collect(0.0), collect(0.5)
    for before, after in zip(plain, turned, strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())
        assert before[-5:].tolist() == after[-5:].tolist()
    again = collect(0.5, start=8, num=4)
    for before, after in zip(turned[-len(again) :], again, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_a_probability_is_between_0_and_1(probability):
    with pytest.raises(ValueError, match="image_first_probability must be in 0..1"):
        PipelineConfig(1, 1, 1, image_first_probability=probability)
