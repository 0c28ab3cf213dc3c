"""A `Generator` with a tiny Transformer, and stand-ins for tokenizer and memory."""

from __future__ import annotations

import types

import jax
import numpy as np

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.grammar import DONE, START
from racm3_jax.generation.sample import Samples
from racm3_jax.generation.tasks import Generator
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import init_params
from racm3_jax.tokenizers.mixed import MixedTokenizer
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
    """Text tokens are characters; an image is four grey levels, one per quadrant."""

    vocab = VOCAB

    def __init__(self):
        self.text = types.SimpleNamespace(decode=lambda ids: bytes(list(ids)).decode())
        self.image = types.SimpleNamespace(
            image_size=SIZE, encode=self.encode, decode=self.decode_codes
        )

    def encode_text(self, text):
        return np.array(list(text.encode("ascii")), np.int32)

    def encode(self, images):
        corners = images[:, :: SIZE // 2, :: SIZE // 2, 0]
        return (corners // 16).reshape(len(images), 4).astype(np.int32)

    def decode_codes(self, codes):
        grey = (np.asarray(codes) * 16).astype(np.uint8).reshape(-1, 2, 2, 1)
        half = SIZE // 2
        return np.repeat(np.repeat(grey.repeat(3, 3), half, 1), half, 2)

    def encode_image(self, image):
        return VOCAB.image_tokens(self.encode(resize_image(image, SIZE)[None])[0])

    def split_tokens(self, tokens, id=""):
        return MixedTokenizer.split_tokens(self, tokens, id)

    def _check_range(self, tokens, ids, name):
        MixedTokenizer._check_range(self, tokens, ids, name)

    def _check_image(self, tokens):
        MixedTokenizer._check_image(self, tokens)

    def decode(self, document):
        segments = tuple(
            Segment(text=self.text.decode(s.tokens))
            if s.modality == "text"
            else Segment(image=self.decode_codes(VOCAB.image_codes(s.tokens)[None])[0])
            for s in document.segments
        )
        return Document(document.id, segments)

    def fit_images(self, images):
        return images

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

    alignment = None

    def align(self, rows):
        return rows

    def embed_texts(self, texts):
        rows = [np.bincount([ord(c) % 4 for c in t], minlength=4) for t in texts]
        return self.unit(np.array(rows))

    def embed_images(self, images):
        fitting = np.stack([resize_image(image, SIZE) for image in images])
        return self.unit(AsciiTokenizer().encode(fitting) + 1)

    def embed_documents(self, documents):
        texts = self.embed_texts([d.text for d in documents])
        images = self.embed_images([d.images[0] for d in documents])
        return types.SimpleNamespace(document=self.unit(texts + images))

    @staticmethod
    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class ThreeRows:
    """What the generator needs of a memory besides its search."""

    num_allowed = 3

    def __init__(self, documents):
        self.held = documents

    def allowed_ids(self):
        return np.arange(3)

    def documents(self, ids):
        return list(AsciiTokenizer().tokenize([self.held[i] for i in ids]))


class FirstDocuments:
    """A memory of three documents; every query retrieves the first ones."""

    def __init__(self):
        self.documents = [pair(f"m{i}", f"memory {i}", i) for i in range(3)]
        self.memory = ThreeRows(self.documents)
        self.num_calls = 0
        self.asked = []

    def usual_score(self, modality):
        return float("nan")

    def retrieve(self, queries, nums, mains):
        self.asked.append((queries, mains))
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


def make_generator(style=tiny, times=3, vocab_size=VOCAB.size, **changes):
    config = style(vocab_size=vocab_size, max_length=128, num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    parts = {"retriever": FirstDocuments(), "embedder": MeanEmbedder()} | changes
    return Generator(config, widen(params, times), AsciiTokenizer(), **parts)


def widen(params, times=3):
    """Large enough that samples differ from prompt to prompt."""
    return jax.tree.map(lambda x: x * times, params)


def sample_by_grammar(
    model,
    params,
    tokens,
    lengths,
    grammar,
    config,
    key,
    *,
    num_samples,
    row_seeds,
    forced=None,
    row_lengths=None,
    **options,
):
    """`sample` without a model: uniform among the allowed tokens, in NumPy.

    Tokens depend on the prompt, the seed and the sample's number, as those of `sample`.
    """
    allowed, following, limits, after = (np.asarray(x) for x in grammar)
    most = config.max_new_tokens
    new = np.full((len(lengths), num_samples, most), VOCAB.pad, np.int32)
    log_probs = np.zeros(new.shape, np.float32)
    for i, j in np.ndindex(new.shape[:2]):
        assert lengths[i] < model.config.max_length
        prompt = tokens[i, : lengths[i]].tolist()
        rng = np.random.default_rng([*prompt, int(row_seeds[i]), j])
        state, count = START, 0
        for step in range(most if row_lengths is None else row_lengths[i]):
            if state == DONE:
                break
            token = int(rng.choice(np.flatnonzero(allowed[state])))
            log_probs[i, j, step] = -rng.random()
            if forced is not None and forced[i, step] >= 0:
                token, log_probs[i, j, step] = int(forced[i, step]), 0.0
            new[i, j, step] = token
            next_state = following[state, token]
            count = count + 1 if next_state == state else 0
            if next_state == state and 0 < limits[state] <= count:
                next_state, count = after[state], 0
            state = next_state
    ends = (new != VOCAB.pad).sum(-1).astype(np.int32)
    return Samples(new, log_probs, ends, ends, 0 * ends, 0 * ends)
