"""Bits of each document: the sample's likelihood with all documents and without it."""

from __future__ import annotations

import numpy as np
import pytest
from generation_standins import VOCAB, AsciiTokenizer, grey, pair

from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.sequences.layout import caption_prompt, text_to_image_prompt


def nats(generator, prompts, written):
    return compute_log_likelihoods(generator, [Scored(p, written) for p in prompts])


def test_an_image_is_scored_with_and_without_each_document(generator, quick):
    shown = [pair("x", "cd", 3), pair("y", "ef", 9)]
    out = generator.text_to_image("ab", documents=shown, num_samples=2)
    bits = generator.attribute(out, 1)
    x, y = AsciiTokenizer().tokenize(shown)
    text = AsciiTokenizer().encode_text("ab")
    image = VOCAB.image_tokens(AsciiTokenizer().image.encode(out.images[1][None])[0])
    prompts = [text_to_image_prompt(d, text, VOCAB) for d in ([x, y], [y], [x])]
    both, without_x, without_y = nats(generator, prompts, image)
    expected = np.array([both - without_x, both - without_y]) / np.log(2)
    np.testing.assert_allclose(bits, expected, atol=1e-4)
    assert bits.dtype == np.float32 and abs(bits[0] - bits[1]) > 1e-3


def test_a_caption_is_scored_after_its_image(generator, quick):
    shown = [pair("x", "cd", 3)]
    out = generator.caption(grey(32), documents=shown, max_caption_length=3)
    (bits,) = generator.attribute(out)
    documents = list(AsciiTokenizer().tokenize(shown))
    image = VOCAB.image_tokens(AsciiTokenizer().image.encode(grey(32)[None])[0])
    text = np.append(AsciiTokenizer().encode_text(out.texts[0]), VOCAB.eoss)
    prompts = [caption_prompt(d, image, VOCAB) for d in (documents, [])]
    with_it, alone = nats(generator, prompts, text.astype(np.int32))
    assert bits == pytest.approx((with_it - alone) / np.log(2), abs=1e-4)


@pytest.mark.parametrize("caption_prompt", ["masked", "last"])
def test_a_caption_is_scored_with_its_own_prompt(generator, quick, caption_prompt):
    how = {"caption_prompt": caption_prompt, "image_first": True, "prefix": "ab"}
    shown = [pair("x", "cd", 3)]
    out = generator.caption(grey(32), documents=shown, max_caption_length=3, **how)
    asked = np.asarray(quick[-1], np.int32)
    (bits,) = generator.attribute(out)
    end = VOCAB.eoss if caption_prompt == "masked" else VOCAB.eod
    text = AsciiTokenizer().encode_text(out.texts[0].removeprefix("ab"))
    alone = generator.caption(grey(32), num_retrieved=0, max_caption_length=3, **how)
    assert alone.settings["prefix"] == "ab"
    prompts = [asked, np.asarray(quick[-1], np.int32)]
    with_it, without = nats(generator, prompts, np.append(text, end).astype(np.int32))
    assert bits == pytest.approx((with_it - without) / np.log(2), abs=1e-4)


def test_without_documents_there_are_no_bits(generator, quick):
    out = generator.text_to_image("ab", num_retrieved=0)
    assert generator.attribute(out).shape == (0,)


def test_other_outputs_are_refused(generator, quick):
    how = {"documents": [pair("x", "cd", 3)]}
    out = generator.text_to_image("ab", **how)
    with pytest.raises(ValueError, match="samples 0..0; got sample 1"):
        generator.attribute(out, 1)
    out = generator.infill_text("<mask> flag", **how)
    with pytest.raises(ValueError, match="for images and for captions"):
        generator.attribute(out)
