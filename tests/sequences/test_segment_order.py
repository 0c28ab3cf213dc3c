"""Retrieved documents show their images first where the main caption is asked for."""

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

    def examples(segment_order, start=0, num=12, **masking):
        batches = ring_batches(
            documents, start, num, segment_order=segment_order, masking=masking
        )
        return [
            row[segments == number]
            for batch in batches
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


def caption_moved(vocab, tokens):
    """Whether the example ends with a text after `<mask:0>`."""
    sentinels = np.flatnonzero(vocab.is_sentinel(tokens))
    return len(sentinels) > 0 and bool(vocab.is_text(tokens[sentinels[-1] + 1]))


def test_images_come_first_and_texts_keep_their_order(vocab, make_document):
    document = make_document("t1 t2", "i3 i4", "t5", id="a")
    turned = put_images_first(document)
    assert [s.modality for s in turned.segments] == ["image", "text", "text"]
    expected = np.concatenate([document.segments[i].tokens for i in (1, 0, 2)])
    tokens = document_tokens(turned, vocab)
    assert tokens[tokens != vocab.break_].tolist() == expected.tolist()
    assert turned.id == document.id


def test_documents_follow_the_main_document(vocab, collect):
    rotated = {"num_masks": "none", "rotation_probability": 0.6}
    found = collect("as_main", rotation_text_share=0.5, **rotated)
    moved = [caption_moved(vocab, example) for example in found]
    assert 0 < sum(moved) < len(found)
    for example, is_moved in zip(found, moved, strict=True):
        assert first_modalities(vocab, example)[:2] == [is_moved, is_moved]
    stored = collect("stored", rotation_text_share=0.5, **rotated)
    assert [caption_moved(vocab, example) for example in stored] == moved
    for example in stored:
        assert first_modalities(vocab, example)[:2] == [False, False]


def test_a_moved_part_of_a_caption_turns_nothing(vocab, collect):
    part = {"num_masks": "single", "rotation_probability": 0.0}
    stored, turned = collect("stored", **part), collect("as_main", **part)
    changed = 0
    for before, after in zip(stored, turned, strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())
        changed += before.tolist() != after.tolist()
    # Captions of one token are moved whole by chance.
    assert changed == sum(caption_moved(vocab, example) for example in stored)


def test_it_resumes(collect):
    turned = collect("as_main", rotation_probability=0.5)
    again = collect("as_main", start=8, num=4, rotation_probability=0.5)
    for before, after in zip(turned[-len(again) :], again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_unknown_order():
    with pytest.raises(ValueError, match="segment_order is 'turned'; allowed: stored"):
        PipelineConfig(1, 1, 1, segment_order="turned")
