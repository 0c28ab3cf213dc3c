"""A small vocabulary, pictures <-> ids, and random documents."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.types import TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab


@pytest.fixture(scope="session")
def vocab() -> Vocab:
    return Vocab(num_text_ids=20, num_image_codes=10, image_length=2, num_sentinels=16)


@pytest.fixture(scope="session")
def parse(vocab):
    """The inverse of `Vocab.picture`."""
    ids = {vocab.name(i): i for i in range(vocab.size)}
    return lambda picture: np.array([ids[name] for name in picture.split()], np.int32)


@pytest.fixture(scope="session")
def make_document(parse, vocab):
    """`make_document("t1 t2", "i3 i4")`: one argument a segment; "" is an empty text."""

    def make(*pictures: str, id: str = "d") -> TokenizedDocument:
        segments = []
        for picture in pictures:
            tokens = parse(picture)
            image = bool(len(tokens)) and bool(vocab.is_image(tokens).all())
            segments.append(TokenizedSegment("image" if image else "text", tokens))
        return TokenizedDocument(id=id, segments=tuple(segments))

    return make


@pytest.fixture(scope="session")
def sample_document(vocab):
    """Interleaved documents of 1 to 5 segments, with 0 to 5 images, some texts empty."""

    def sample(rng: np.random.Generator, id: str = "d") -> TokenizedDocument:
        segments = []
        for _ in range(rng.integers(1, 6)):
            if rng.random() < 0.5:
                tokens = rng.integers(vocab.num_text_ids, size=rng.integers(0, 12))
                segment = TokenizedSegment("text", tokens.astype(np.int32))
            else:
                codes = rng.integers(vocab.num_image_codes, size=vocab.image_length)
                tokens = vocab.image_tokens(codes).astype(np.int32)
                segment = TokenizedSegment("image", tokens)
            segments.append(segment)
        return TokenizedDocument(id=id, segments=tuple(segments))

    return sample
