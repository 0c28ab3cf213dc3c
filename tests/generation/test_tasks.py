"""`Generator` with a tiny Transformer: text to image and captioning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from generation_standins import (
    SIZE,
    VOCAB,
    AsciiTokenizer,
    MeanEmbedder,
    grey,
    make_generator,
    pair,
)

from racm3_jax.generation.tasks import Generator
from racm3_jax.model.config import tiny
from racm3_jax.sequences.layout import caption_prompt, text_to_image_prompt


def test_text_to_image_gives_images_best_first_and_names_documents(generator, quick):
    out = generator.text_to_image("a flag", num_samples=2, seed=3, rank_by="clip")
    assert len(out.images) == 2 and out.images[0].shape == (SIZE, SIZE, 3)
    assert (np.diff(out.scores) <= 0).all()
    assert out.retrieved.ids.tolist() == [0, 1]
    assert out.documents[0].metadata["retrieved"] == ["m0", "m1"]
    assert (out.prompt, out.seed, out.texts[0]) == ("a flag", 3, "a flag")
    for document, score in zip(out.documents, out.scores, strict=True):
        image = MeanEmbedder().embed_images(document.images[0][None])[0]
        text = MeanEmbedder().embed_texts(["a flag"])[0]
        np.testing.assert_allclose(score, image @ text, rtol=1e-5)


def test_a_batch_equals_each_item_alone_with_its_seed():
    generator = make_generator(max_rows=4)
    prompts = ["one", "two words", "a third and longer prompt", "4", "five", "six"]
    batch = generator.text_to_image_batch(prompts, num_samples=2, seed=7)
    assert generator.retriever.num_calls == 1
    assert len({d.images[0].tobytes() for o in batch for d in o.documents}) > 6
    for i, (prompt, out) in enumerate(zip(prompts, batch, strict=True)):
        alone = generator.text_to_image(prompt, num_samples=2, seed=out.seed)
        assert alone.seed == 7 + i
        np.testing.assert_array_equal(np.stack(alone.images), np.stack(out.images))

    images = [grey(16 * i) for i in range(6)]
    settings = {"num_samples": 2, "max_caption_length": 10}
    batch = generator.caption_batch(images, seed=2, **settings)
    for i, out in enumerate(batch):
        alone = generator.caption(images[i], seed=2 + i, **settings)
        assert alone.texts == out.texts
    assert len({out.texts[0] for out in batch}) > 3


def test_captions_are_text_and_scored_by_likelihood(generator, quick):
    out = generator.caption(
        grey(48), num_samples=2, seed=1, max_caption_length=12, prefix="Photo of"
    )
    assert len(out.texts) == 2
    assert all(len("Photo of") < len(t) <= len("Photo of") + 12 for t in out.texts)
    assert all(t.startswith("Photo of") for t in out.texts)
    assert (out.scores < 0).all() and (np.diff(out.scores) <= 0).all()
    np.testing.assert_array_equal(out.documents[0].images[0], grey(48))


def test_an_image_of_another_size_is_resized(generator, quick):
    out = generator.caption(
        np.zeros((30, 20, 3), np.uint8), num_samples=2, max_caption_length=3
    )
    assert out.documents[0].images[0].shape == (30, 20, 3)


def test_prompts_are_those_of_the_layout(generator, quick):
    documents = list(AsciiTokenizer().tokenize([pair("x", "cd", 3)]))
    text = AsciiTokenizer().encode_text("ab")
    image = VOCAB.image_tokens(np.full(4, 2, np.int32))
    generator.text_to_image("ab", 2, documents=documents)
    generator.caption(grey(32), 2, documents=documents, max_caption_length=3)
    turned = {"documents": documents, "max_caption_length": 3, "image_first": True}
    generator.caption(grey(32), 2, **turned)
    generator.text_to_image("ab", 2, num_retrieved=0)
    generator.text_to_image("ab", 2, documents=[])
    (document,) = documents
    shown = [dataclasses.replace(document, segments=document.segments[::-1])]
    assert quick == [
        text_to_image_prompt(documents, text, VOCAB).tolist(),
        caption_prompt(documents, image, VOCAB).tolist(),
        caption_prompt(shown, image, VOCAB).tolist(),
        [VOCAB.eod, *text, VOCAB.break_],
        [VOCAB.eod, *text, VOCAB.break_],
    ]


def test_hand_picked_documents_need_no_memory(quick):
    generator = make_generator(retriever=None, embedder=None)
    picked = [pair("mine", "a", 1), *AsciiTokenizer().tokenize([pair("other", "b", 2)])]
    out = generator.text_to_image("flag", documents=picked, num_samples=2)
    assert [d.id for d in out.retrieved.documents] == ["mine", "other"]
    assert out.retrieved.ids.tolist() == [-1, -1]
    assert out.documents[0].metadata["retrieved"] == ["mine", "other"]
    assert (out.scores < 0).all()  # mean log-likelihood, there is no CLIP
    alone = generator.caption(grey(0), 2, num_retrieved=0, max_caption_length=3)
    assert alone.retrieved.documents == ()


def test_without_prompts_there_is_no_output(generator):
    assert generator.text_to_image_batch([]) == []
    assert generator.caption_batch([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "  "}, r"the prompt is empty \('  '\)"),
        ({"num_retrieved": 4}, "num_retrieved is 4 but the memory holds only 3"),
        ({"num_retrieved": -1}, "num_retrieved must be >= 0 .* got -1"),
        ({"temperature": -1.0}, "temperature must be .* got -1.0"),
        ({"num_samples": 0}, "num_samples must be >= 1; got 0"),
        ({"prompt": "x" * 200}, "the prompt is too long: .* max_length 128"),
        ({"seed": -1}, "a seed is .* got -1"),
    ],
)
def test_wrong_inputs_are_refused(generator, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        generator.text_to_image(**({"prompt": "a flag"} | arguments))
    assert "\n" not in str(error.value)


def test_other_wrong_inputs():
    generator = make_generator(retriever=None)
    with pytest.raises(ValueError, match="this generator has no memory"):
        generator.text_to_image("a flag")
    with pytest.raises(ValueError, match=r"uint8\[height, width, 3\]; got float64"):
        generator.caption(np.zeros((4, 4, 3)), num_retrieved=0)
    with pytest.raises(ValueError, match="needs the embedder"):
        make_generator(embedder=None)
    with pytest.raises(ValueError, match="3 prompts need as many seeds; got 1"):
        generator.text_to_image_batch(["a", "b", "c"], seed=[1], num_retrieved=0)
    with pytest.raises(
        ValueError, match="the model has 9 tokens but the tokenizer 150"
    ):
        Generator(tiny(vocab_size=9), {}, AsciiTokenizer())


def test_captions_are_guided_only_by_their_documents(generator):
    """Without documents both streams are one, and the guidance changes nothing."""
    guided = {"guidance": 3.0, "guide_documents": True}
    common = {"max_caption_length": 6, "temperature": 0.0, "num_samples": 2}
    shown = {"documents": [pair("x", "cd", 3)]}
    plain, led = (
        generator.caption(grey(32), **shown, **common, **how) for how in ({}, guided)
    )
    assert plain.texts != led.texts
    alone, same = (
        generator.caption(grey(32), documents=[], **common, **how)
        for how in ({}, guided)
    )
    assert alone.texts == same.texts
    with pytest.raises(ValueError, match="guide_documents=True to compare"):
        generator.caption(grey(32), guidance=2.0)
