"""Grammars as diagrams, and random walks that always obey them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.generation.grammar import (
    DONE,
    START,
    advance,
    image_grammar,
    interleaved_grammar,
    text_grammar,
)
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=5, num_image_codes=4, image_length=3, num_sentinels=2)
STEP = jax.jit(advance)


def random_walks(grammar, num_steps, num_walks=300):
    """Tokens sampled uniformly among the allowed ones, and the last state."""
    rng = np.random.default_rng(0)
    allowed = np.asarray(grammar.allowed)
    state = jnp.full(num_walks, START)
    count = jnp.zeros(num_walks, jnp.int32)
    walks = []
    for _ in range(num_steps):
        choices = [np.flatnonzero(allowed[s]) for s in np.asarray(state)]
        tokens = np.array([rng.choice(c) for c in choices])
        state, count = STEP(grammar, state, count, tokens)
        walks.append(tokens)
    return np.stack(walks, axis=1), np.asarray(state)


def test_an_image_is_exactly_its_length_then_padding():
    """`i i i <pad> <pad>`, always."""
    walks, state = random_walks(image_grammar(VOCAB), 5)
    assert VOCAB.is_image(walks[:, :3]).all()
    assert (walks[:, 3:] == VOCAB.pad).all()
    assert (state == DONE).all()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_region_of_an_image_has_the_given_length(length):
    walks, _ = random_walks(image_grammar(VOCAB, length), length + 1)
    assert VOCAB.is_image(walks[:, :length]).all()
    assert (walks[:, length] == VOCAB.pad).all()


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 4), (3, 3), (2, 6)])
@pytest.mark.parametrize("ends", [("eoss",), ("eod", "break_")])
def test_text_ends_once_and_within_its_limits(low, high, ends):
    """`t t t <eoss> <pad> ...` with low..high text tokens."""
    ends = tuple(getattr(VOCAB, name) for name in ends)
    grammar = text_grammar(VOCAB, high, min_length=low, ends=ends)
    walks, state = random_walks(grammar, high + 2)
    seen = set()
    for walk in walks:
        num_text = int(VOCAB.is_text(walk).sum())
        assert VOCAB.is_text(walk[:num_text]).all()
        assert walk[num_text] in ends
        assert (walk[num_text + 1 :] == VOCAB.pad).all()
        seen.add(num_text)
    assert seen == set(range(low, high + 1))
    assert (state == DONE).all()


def test_grammars_of_other_lengths_have_equal_shapes():
    shapes = {
        tuple(x.shape for x in text_grammar(VOCAB, high, min_length=low))
        for low, high in [(1, 1), (1, 9), (4, 5)]
    }
    assert len(shapes) == 1


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="got length 0"):
        image_grammar(VOCAB, 0)
    with pytest.raises(ValueError, match="min_length 3, max_length 2"):
        text_grammar(VOCAB, 2, min_length=3)


@pytest.mark.parametrize(("max_text", "max_segments"), [(1, 1), (4, 1), (1, 3), (3, 2)])
def test_free_documents_are_whole_segments_between_breaks(max_text, max_segments):
    """`t t <break> i i i <break> t <eod>`: every walk parses."""
    grammar = interleaved_grammar(VOCAB, max_text, max_segments)
    longest = max_segments * (max(max_text, 3) + 1)
    walks, state = random_walks(grammar, longest)
    assert (state == DONE).all()
    lengths, counts, kinds = set(), set(), set()
    for walk in walks:
        body = walk[: int(np.argmax(walk == VOCAB.eod))]
        assert (walk[len(body) + 1 :] == VOCAB.pad).all()
        segments = np.split(body, np.flatnonzero(body == VOCAB.break_))
        segments = [s[s != VOCAB.break_] for s in segments]
        counts.add(len(segments))
        for segment in segments:
            is_text = bool(VOCAB.is_text(segment).all())
            assert is_text or VOCAB.is_image(segment).all()
            assert len(segment) <= max_text if is_text else len(segment) == 3
            kinds.add(is_text)
            lengths.add(len(segment) if is_text else 0)
    assert counts == set(range(1, max_segments + 1)) and kinds == {True, False}
    assert lengths == set(range(max_text + 1))
    with pytest.raises(ValueError, match="got 0 and 1"):
        interleaved_grammar(VOCAB, 0, 1)
