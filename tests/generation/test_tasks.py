"""`Generator` with a tiny Transformer, and stand-ins for tokenizer and memory."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from racm3_jax.generation import sample as sample_module
from racm3_jax.generation.tasks import Generator
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import init_params
from racm3_jax.sequences.layout import caption_prompt, text_to_image_prompt
from racm3_jax.types import (
    Document,
    Retrieved,
    Segment,
    TokenizedDocument,
    TokenizedSegment,
)
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=128, num_image_codes=16, image_length=4, num_sentinels=2)
SIZE = 8


class AsciiTokenizer:
    """Text ids are characters; an image is four grey levels, one a quadrant."""

    vocab = VOCAB

    def __init__(self):
        self.text = types.SimpleNamespace(decode=lambda ids: bytes(list(ids)).decode())
        self.image = types.SimpleNamespace(
            image_size=SIZE, encode=self.encode, decode=self.decode
        )

    def encode_text(self, text):
        return np.array(list(text.encode("ascii")), np.int32)

    def encode(self, images):
        corners = images[:, :: SIZE // 2, :: SIZE // 2, 0]
        return (corners // 16).reshape(len(images), 4).astype(np.int32)

    def decode(self, codes):
        grey = (np.asarray(codes) * 16).astype(np.uint8).reshape(-1, 2, 2, 1)
        half = SIZE // 2
        return np.repeat(np.repeat(grey.repeat(3, 3), half, 1), half, 2)

    def tokenize(self, documents, batch=64):
        for document in documents:
            segments = tuple(
                TokenizedSegment("text", self.encode_text(s.text))
                if s.text is not None
                else TokenizedSegment(
                    "image", VOCAB.image_tokens(self.encode(s.image[None])[0])
                )
                for s in document.segments
            )
            yield TokenizedDocument(document.id, segments)


class MeanEmbedder:
    """Unit vectors from letters and grey levels."""

    def embed_texts(self, texts):
        rows = [np.bincount([ord(c) % 4 for c in t], minlength=4) for t in texts]
        return self.unit(np.array(rows))

    def embed_images(self, images):
        return self.unit(AsciiTokenizer().encode(images) + 1)

    @staticmethod
    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class FirstDocuments:
    """A memory of three documents; every query is given the first ones."""

    def __init__(self):
        self.documents = [pair(f"m{i}", f"memory {i}", i) for i in range(3)]
        self.memory = types.SimpleNamespace(num_allowed=3)
        self.num_calls = 0

    def retrieve(self, queries, nums, mains):
        assert queries.shape == (len(nums), 4) and len(mains) == len(nums)
        self.num_calls += 1
        tokenized = list(AsciiTokenizer().tokenize(self.documents))
        return [
            Retrieved(np.arange(k), 0.9 - 0.1 * np.arange(k), tuple(tokenized[:k]))
            for k in nums
        ]


def grey(level):
    return np.full((SIZE, SIZE, 3), level, np.uint8)


def pair(name, text, level):
    return Document(name, (Segment(text=text), Segment(image=grey(16 * level))))


def make_generator(**changes):
    config = tiny(vocab_size=VOCAB.size, max_length=128, num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    parts = {"retriever": FirstDocuments(), "embedder": MeanEmbedder()} | changes
    return Generator(config, widen(params), AsciiTokenizer(), **parts)


def widen(params):
    """Large enough that samples differ from prompt to prompt."""
    return jax.tree.map(lambda x: x * 3, params)


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture
def prompts_seen(monkeypatch):
    """The id rows that reach `sample`, without padding."""
    seen = []

    def spy(model, params, tokens, lengths, *args, **kwargs):
        seen.extend(row[:n].tolist() for row, n in zip(tokens, lengths, strict=True))
        return sample_module.sample(model, params, tokens, lengths, *args, **kwargs)

    monkeypatch.setattr("racm3_jax.generation.tasks.sample", spy)
    return seen


def test_text_to_image_gives_images_best_first_and_names_documents(generator):
    out = generator.text_to_image("a flag", num_samples=2, seed=3)
    assert len(out.images) == 2 and out.images[0].shape == (SIZE, SIZE, 3)
    assert (np.diff(out.scores) <= 0).all()
    assert out.retrieved.ids.tolist() == [0, 1]
    assert out.documents[0].metadata["retrieved"] == ["m0", "m1"]
    assert (out.prompt, out.seed, out.texts[0]) == ("a flag", 3, "a flag")
    for document, score in zip(out.documents, out.scores, strict=True):
        image = MeanEmbedder().embed_images(document.images[0][None])[0]
        text = MeanEmbedder().embed_texts(["a flag"])[0]
        np.testing.assert_allclose(score, image @ text, rtol=1e-5)


def test_a_batch_gives_what_each_item_gives_alone_with_its_seed():
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


def test_captions_are_text_and_scored_by_likelihood(generator):
    out = generator.caption(
        grey(48), num_samples=2, seed=1, max_caption_length=12, prefix="Photo of"
    )
    assert len(out.texts) == 2
    assert all(len("Photo of") < len(t) <= len("Photo of") + 12 for t in out.texts)
    assert all(t.startswith("Photo of") for t in out.texts)
    assert (out.scores < 0).all() and (np.diff(out.scores) <= 0).all()
    np.testing.assert_array_equal(out.documents[0].images[0], grey(48))


def test_an_image_of_another_size_is_resized(generator):
    out = generator.caption(
        np.zeros((30, 20, 3), np.uint8), num_samples=2, max_caption_length=3
    )
    assert out.documents[0].images[0].shape == (30, 20, 3)


def test_prompts_are_those_of_the_layout(generator, prompts_seen):
    documents = list(AsciiTokenizer().tokenize([pair("x", "cd", 3)]))
    text = AsciiTokenizer().encode_text("ab")
    image = VOCAB.image_tokens(np.full(4, 2, np.int32))
    generator.text_to_image("ab", 2, documents=documents)
    generator.caption(grey(32), 2, documents=documents, max_caption_length=3)
    generator.text_to_image("ab", 2, num_retrieved=0)
    generator.text_to_image("ab", 2, documents=[])
    assert prompts_seen == [
        text_to_image_prompt(documents, text, VOCAB).tolist(),
        caption_prompt(documents, image, VOCAB).tolist(),
        [VOCAB.eod, *text, VOCAB.break_],
        [VOCAB.eod, *text, VOCAB.break_],
    ]


def test_hand_picked_documents_need_no_memory():
    generator = make_generator(retriever=None, embedder=None)
    picked = [pair("mine", "a", 1), *AsciiTokenizer().tokenize([pair("other", "b", 2)])]
    out = generator.text_to_image("flag", documents=picked, num_samples=2)
    assert [d.id for d in out.retrieved.documents] == ["mine", "other"]
    assert out.retrieved.ids.tolist() == [-1, -1]
    assert out.documents[0].metadata["retrieved"] == ["mine", "other"]
    assert (out.scores < 0).all()  # mean log-likelihood, there is no CLIP
    alone = generator.caption(grey(0), 2, num_retrieved=0, max_caption_length=3)
    assert alone.retrieved.documents == ()


def test_no_prompt_no_output(generator):
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
def test_wrong_inputs_answer_in_one_sentence(generator, arguments, message):
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
    with pytest.raises(ValueError, match="the model has 9 ids but the tokenizer 150"):
        Generator(tiny(vocab_size=9), {}, AsciiTokenizer())
