"""Which tokens may follow, as arrays: a small state machine over the vocabulary.

    image_grammar, n = 3:   start --image token x 3--> done
    text_grammar:           start --text token--> text --text token--> .. --<eoss>--> done
                                            (after max_length text tokens: only <eoss>)

A state counts the tokens emitted in it, so "exactly 1024 image tokens" is one state with
a limit and not 1024 states. The arrays are arguments of the compiled decode loop: other
lengths or ends never recompile it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from racm3_jax.vocab import Vocab

DONE = 0
START = 1


class Grammar(NamedTuple):
    """A state machine; state 0 is done (it only emits `<pad>`), state 1 is the start.

    Attributes:
      allowed: True where the token may be emitted in the state.
      next_state: the state that follows a token.
      limits: the most tokens of a state before `after` follows; 0 is any number.
      after: the state that follows when the limit is reached.
    """

    allowed: Bool[Array, "states vocab"]
    next_state: Int32[Array, "states vocab"]
    limits: Int32[Array, " states"]
    after: Int32[Array, " states"]


def advance(
    grammar: Grammar,
    state: Int[Array, " batch"],
    count: Int[Array, " batch"],
    tokens: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """The state of each row, and how many tokens it emitted in it, after `tokens`."""
    following = grammar.next_state[state, tokens]
    count = jnp.where(following == state, count + 1, 0)
    limit = grammar.limits[state]
    full = (following == state) & (limit > 0) & (count >= limit)
    return (
        jnp.where(full, grammar.after[state], following),
        jnp.where(full, 0, count),
    )


def image_grammar(vocab: Vocab, length: int | None = None) -> Grammar:
    """Exactly `length` image tokens (one whole image by default), then done."""
    length = vocab.image_length if length is None else length
    if length < 1:
        raise ValueError(f"an image span has at least one token; got length {length}")
    return _build(
        vocab,
        [(_mark_tokens(vocab.size, vocab.image_range), {}, length, DONE)],
    )


def text_grammar(
    vocab: Vocab,
    max_length: int,
    *,
    min_length: int = 1,
    ends: Sequence[int] | None = None,
) -> Grammar:
    """Between `min_length` and `max_length` text tokens, then one of `ends`.

    Args:
      vocab: the token ranges.
      max_length: the most text tokens; after them only `ends` are allowed.
      min_length: the fewest text tokens, at least 1.
      ends: the control tokens that close the span; `<eoss>` by default.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(
            "a text span needs 1 <= min_length <= max_length; got "
            f"min_length {min_length}, max_length {max_length}"
        )
    ends = (vocab.eoss,) if ends is None else tuple(ends)
    text, close = (
        _mark_tokens(vocab.size, vocab.text_range),
        _mark_tokens(vocab.size, ends),
    )
    first, more, full = START, START + 1, START + 2
    finish = dict.fromkeys(ends, DONE)
    free = max_length - min_length
    return _build(
        vocab,
        [
            (text, {}, min_length, more if free else full),
            (text | close, finish, free, full),
            (close, finish, 0, first),
        ],
    )


def interleaved_grammar(
    vocab: Vocab, max_text_length: int, max_segments: int
) -> Grammar:
    """One to `max_segments` segments, each a text or a whole image, then `<eod>`.

    A segment begins with either; after it comes `<break>` and the next one, or `<eod>`:

        start --text token--> text --<break>--> start of the next ...
              --image token--> image --(n tokens)--> close --<break>--> start of the next
                                                           --<eod>--> done
    """
    if max_text_length < 1 or max_segments < 1:
        raise ValueError(
            "free generation needs max_text_length >= 1 and max_segments >= 1; got "
            f"{max_text_length} and {max_segments}"
        )
    size = vocab.size
    text, image = (
        _mark_tokens(size, vocab.text_range),
        _mark_tokens(size, vocab.image_range),
    )
    states = []
    for segment in range(max_segments):
        first = START + 4 * segment
        in_text, in_image, close = first + 1, first + 2, first + 3
        finish = {vocab.eod: DONE}
        if segment + 1 < max_segments:
            finish[vocab.break_] = first + 4
        ends = _mark_tokens(size, tuple(finish))
        next_states = dict.fromkeys(
            vocab.text_range, in_text if max_text_length > 1 else close
        ) | dict.fromkeys(
            vocab.image_range, in_image if vocab.image_length > 1 else close
        )
        # The first token of a segment is sampled in its start state.
        states += [
            (text | image, next_states, 0, first),
            (text | ends, finish, max_text_length - 1, close),
            (image, {}, vocab.image_length - 1, close),
            (ends, finish, 0, close),
        ]
    return _build(vocab, states)


def _mark_tokens(
    size: int, tokens: range | Sequence[int]
) -> Bool[np.ndarray, " vocab"]:
    mask = np.zeros(size, bool)
    mask[list(tokens)] = True
    return mask


def _build(
    vocab: Vocab,
    states: Sequence[tuple[Bool[np.ndarray, " vocab"], dict[int, int], int, int]],
) -> Grammar:
    """States 1, 2, ... as (allowed tokens, next state of single tokens, limit, after).

    All other tokens stay in the state; state 0 (done) is added in front.
    """
    allowed = np.stack([_mark_tokens(vocab.size, [vocab.pad])] + [s[0] for s in states])
    next_state = np.repeat(
        np.arange(len(allowed), dtype=np.int32)[:, None], vocab.size, axis=1
    )
    for row, (_, next_states, _, _) in enumerate(states, START):
        next_state[row, list(next_states)] = list(next_states.values())
    limits = np.asarray([0] + [s[2] for s in states], np.int32)
    after = np.asarray([DONE] + [s[3] for s in states], np.int32)
    return Grammar(*map(jnp.asarray, (allowed, next_state, limits, after)))
