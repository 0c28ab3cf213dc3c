"""The diagrams of `sequences.layout`, and prompts as beginnings of training rows."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.model.config import chameleon_7b
from racm3_jax.sequences import layout
from racm3_jax.sequences.causal_masking import (
    CausalMaskingConfig,
    apply_masks,
    build_example,
)
from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab


@pytest.fixture
def pair(make_document):
    return make_document("t1 t2", "i3 i4")


def test_document_is_joined_by_break(vocab, pair, make_document):
    tokens = layout.document_tokens(pair, vocab)
    assert vocab.to_text(tokens) == "t1 t2 <break> i3 i4"
    assert tokens.dtype == np.int32
    interleaved = make_document("i1 i2", "t5", "i3 i4", "t6")
    assert vocab.to_text(layout.document_tokens(interleaved, vocab)) == (
        "i1 i2 <break> t5 <break> i3 i4 <break> t6"
    )


def test_join_puts_retrieved_first(vocab, parse, pair, make_document):
    other = make_document("t9", "i0 i0")
    assert vocab.to_text(layout.join([pair, other], parse("t5"), vocab)) == (
        "<eod> t1 t2 <break> i3 i4 <eod> t9 <break> i0 i0 <eod> t5 <eod>"
    )
    assert vocab.to_text(layout.join([], parse("t5"), vocab)) == "<eod> t5 <eod>"
    assert vocab.to_text(layout.retrieved_prefix([], vocab)) == "<eod>"


def test_text_to_image_prompt_begins_the_training_row(vocab, parse, pair):
    row = layout.join([pair], parse("t7 t8 <break> i5 i6"), vocab)
    prompt = layout.text_to_image_prompt([pair], parse("t7 t8"), vocab)
    assert vocab.to_text(prompt) == ("<eod> t1 t2 <break> i3 i4 <eod> t7 t8 <break>")
    np.testing.assert_array_equal(prompt, row[: len(prompt)])


def test_beginning_prompt_begins_the_training_row(vocab, parse, pair):
    main = parse("t7 t8 <break> i1 i2 i3 i4")
    row = layout.join([pair], main, vocab)
    for known in (0, 2, 5):
        prompt = layout.beginning_prompt([pair], main[:known], vocab)
        np.testing.assert_array_equal(prompt, row[: len(prompt)])
        assert len(prompt) == len(row) - 1 - len(main) + known


def test_caption_prompt_begins_the_row_of_a_rotated_caption(vocab, parse, pair):
    prompt = layout.caption_prompt([pair], parse("i5 i6"), vocab)
    assert vocab.to_text(prompt) == (
        "<eod> t1 t2 <break> i3 i4 <eod> <mask:0> <break> i5 i6 <eod> <mask:0>"
    )
    row = layout.join([pair], parse("t7 t8 <break> i5 i6"), vocab)
    rotated = apply_masks(row, [(7, 9)], vocab)
    np.testing.assert_array_equal(prompt, rotated[: len(prompt)])
    assert vocab.to_text(rotated[len(prompt) :]) == "t7 t8 <eoss>"


def test_caption_prompt_with_prefix(vocab, parse):
    prompt = layout.caption_prompt([], parse("i5 i6"), vocab, parse("t3"))
    assert vocab.to_text(prompt) == ("<eod> t3 <mask:0> <break> i5 i6 <eod> <mask:0>")


def test_infill_prompt_begins_the_masked_row(vocab, parse):
    tokens = parse("t1 t2 t3 t4 <break> i5 i6")
    prompt = layout.infill_prompt([], tokens, [(1, 3), (5, 6)], vocab)
    assert vocab.to_text(prompt) == (
        "<eod> t1 <mask:0> t4 <break> <mask:1> i6 <eod> <mask:0>"
    )
    row = layout.join([], tokens, vocab)
    masked = apply_masks(row, [(2, 4), (6, 7)], vocab)
    np.testing.assert_array_equal(prompt, masked[: len(prompt)])


@pytest.mark.parametrize("spans", [[], [(2, 1)], [(0, 2), (1, 3)], [(0, 9)]])
def test_infill_prompt_refuses_wrong_spans(vocab, parse, spans):
    with pytest.raises(ValueError, match="span"):
        layout.infill_prompt([], parse("t1 t2 t3"), spans, vocab)


@pytest.mark.parametrize("segments", [("t1", "i1"), ("t1", "i1 i2 i3"), ("t1 <eod>",)])
def test_documents_of_another_tokenizer_are_refused(vocab, make_document, segments):
    with pytest.raises(ValueError, match="another tokenizer"):
        layout.document_tokens(make_document(*segments), vocab)


def test_document_without_segments_is_refused(vocab, make_document):
    with pytest.raises(ValueError, match="no segments"):
        layout.document_tokens(make_document(), vocab)


def test_three_images_of_the_public_models_fit_into_their_context():
    """Two retrieved documents of 1,024 codes, and a main one that is sampled or masked."""
    vocab = Vocab(num_text_ids=57_000, num_image_codes=8192, image_length=1024)
    text = TokenizedSegment("text", np.arange(300, dtype=np.int32))
    image = TokenizedSegment("image", vocab.image_tokens(np.arange(1024)).astype("i4"))
    document = TokenizedDocument("d", (text, image))
    room = chameleon_7b().max_length
    prompt = layout.text_to_image_prompt([document] * 2, text.tokens, vocab)
    assert len(prompt) + vocab.image_length <= room
    asked = layout.caption_prompt([document] * 2, image.tokens, vocab)
    assert len(asked) + len(text.tokens) + 1 <= room
    example = build_example(
        document,
        [document] * 2,
        CausalMaskingConfig(num_masks="fixed", mean=4.0, rotation_probability=0.0),
        vocab,
        alpha=0.1,
        max_length=room + 1,
        rng=np.random.default_rng(0),
    )
    assert vocab.is_image(example.tokens).sum() == 3 * 1024
    assert example.is_main.sum() > 1024 + 300
