"""A small vocabulary, diagrams <-> tokens, and random documents."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.types import Retrieved, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab


@pytest.fixture(scope="session")
def vocab() -> Vocab:
    return Vocab(num_text_ids=20, num_image_codes=10, image_length=2, num_sentinels=16)


@pytest.fixture(scope="session")
def parse(vocab):
    """The inverse of `Vocab.picture`."""
    tokens = {vocab.name(i): i for i in range(vocab.size)}
    return lambda diagram: np.array(
        [tokens[name] for name in diagram.split()], np.int32
    )


@pytest.fixture(scope="session")
def make_document(parse, vocab):
    """`make_document("t1 t2", "i3 i4")`: one argument per segment; "" is an empty text."""

    def make(*diagrams: str, id: str = "d") -> TokenizedDocument:
        segments = []
        for diagram in diagrams:
            tokens = parse(diagram)
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


@pytest.fixture(scope="session")
def ring_batches(vocab):
    """Batches, by default without masks; each document reads the two after it in a ring."""
    plain = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)

    def collect(
        documents, start_step, num_steps, variants=None, masking=None, **settings
    ):
        memory = types.SimpleNamespace(
            documents=lambda ids: [documents[i] for i in ids],
            queries=lambda ids, modality, variant: np.asarray(ids, np.float32)[:, None],
        )

        def retrieve(queries, nums, mains):
            rows = [(int(q[0]) + np.array([1, 2])) % len(documents) for q in queries]
            found = [tuple(documents[i] for i in pair) for pair in rows]
            ones = np.ones(2, np.float32)
            return [Retrieved(r, ones, d) for r, d in zip(rows, found, strict=True)]

        sizes = {"rows": 4, "row_length": 24, "examples_per_batch": 4}
        with make_batches(
            memory,
            types.SimpleNamespace(retrieve=retrieve),
            np.arange(len(documents)),
            vocab,
            dataclasses.replace(plain, **(masking or {})),
            PipelineConfig(**sizes, min_documents=2, seed=5, **settings),
            start_step=start_step,
            num_steps=num_steps,
            variants=variants,
        ) as batches:
            return [batch for batch, _ in batches]

    return collect
