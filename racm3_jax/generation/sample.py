"""The only decode loop: prefill the prompts once, then one id a row and a step.

    prompt_tokens  [ a b c . . . . . ]   right-padded to a bucket (. = padding)
                   [ a b c d e . . . ]
    prefill once -> cache -> repeated for `num_samples` -> draw, decode, draw, ...

Everything that differs from call to call (the lengths, the grammar, temperature, k, p,
the seeds) is an argument of one compiled program; a program is compiled for each bucket
of rows, of prompt length and of new ids, not for each prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Key

from racm3_jax.generation.grammar import DONE, START, Grammar, advance
from racm3_jax.generation.logits import sample_tokens

PROMPT_BUCKET = 64
NEW_TOKENS_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most probable id.
      top_p: share of the probability mass that stays (nucleus); 1 keeps everything.
      top_k: how many ids stay; 0 keeps everything.
      max_new_tokens: the most ids drawn for a row (fewer where the model's max_length
        leaves less room and `fixed_length` is False).
      fixed_length: True when the grammar always emits `max_new_tokens` ids (images):
        the loop then has a constant trip count and never asks whether all are done.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    fixed_length: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be a number >= 0 (0 is greedy); got "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1 (1 keeps everything); got "
                f"{self.top_p}"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k must be >= 0 (0 keeps everything); got {self.top_k}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {self.max_new_tokens}")


class Samples(NamedTuple):
    """What was drawn.

    Attributes:
      tokens: the new ids; `<pad>` after the end of a span.
      log_probs: the model's own log-probability of each id in nats, before grammar,
        temperature and filters; 0 after the end.
      lengths: how many ids each sample has.
    """

    tokens: Int32[np.ndarray, "batch samples new"]
    log_probs: Float32[np.ndarray, "batch samples new"]
    lengths: Int32[np.ndarray, "batch samples"]


class _Drawing(NamedTuple):
    """What the loop carries, apart from the model's cache."""

    state: Int[Array, " rows"]
    num_in_state: Int[Array, " rows"]
    last: Int32[Array, " rows"]
    tokens: Int32[Array, "rows new"]
    log_probs: Float32[Array, "rows new"]
    lengths: Int32[Array, " rows"]


class _Options(NamedTuple):
    """The traced settings of one call (see `SamplingConfig`)."""

    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]


def sample(
    model: Any,
    params: Any,
    prompt_tokens: Int32[np.ndarray, "batch length"],
    prompt_lengths: Int32[np.ndarray, " batch"],
    grammar: Grammar,
    config: SamplingConfig,
    key: Key[Array, ""],
    *,
    num_samples: int = 1,
    row_seeds: Int[np.ndarray, " batch"] | None = None,
) -> Samples:
    """Continues each prompt `num_samples` times under a grammar.

    Sample j of a row is drawn with `fold_in(fold_in(key, row_seed), j)`: it depends on
    its prompt and its seed, not on the rows beside it nor on how many samples are asked.

    Args:
      model: a `Transformer`, best with the config that `prepare_decoding` gives.
      params: its parameters, in the same form.
      prompt_tokens: vocabulary ids, right-padded with any id. Its width, rounded up, is
        the length bucket.
      prompt_lengths: ids in each prompt, at least 1.
      grammar: what may be emitted; shared by all rows.
      config: temperature, filters, and how many ids.
      key: a JAX key.
      num_samples: continuations of each prompt.
      row_seeds: one number >= 0 a row; 0, 1, ... unless given.

    Returns:
      The new ids only, with log-probabilities, as NumPy arrays.

    Raises:
      ValueError: on an empty prompt, no samples, or no room in the model's max_length.
    """
    tokens = np.asarray(prompt_tokens, np.int32)
    lengths = np.asarray(prompt_lengths, np.int32)
    max_length = model.config.max_length
    _check(tokens, lengths, config, num_samples, max_length)
    num_rows = len(lengths)
    seeds = np.arange(num_rows) if row_seeds is None else np.asarray(row_seeds)

    # Padding rows repeat the last one: they end when it ends.
    rows = 1 << (num_rows - 1).bit_length()
    fill = np.minimum(np.arange(rows), num_rows - 1)
    width = min(round_up(tokens.shape[1], PROMPT_BUCKET), max_length)
    padded = np.zeros((rows, width), np.int32)
    kept = tokens[fill, :width]
    padded[:, : kept.shape[1]] = kept
    room = config.max_new_tokens
    if not config.fixed_length:
        room = round_up(room, NEW_TOKENS_BUCKET)
    drawn = _generate(
        model,
        room,
        num_samples,
        config.fixed_length,
        params,
        padded,
        lengths[fill],
        np.minimum(config.max_new_tokens, max_length - lengths[fill]),
        grammar,
        _Options(
            jnp.asarray(config.temperature, jnp.float32),
            jnp.asarray(config.top_k, jnp.int32),
            jnp.asarray(config.top_p, jnp.float32),
        ),
        key,
        seeds[fill].astype(np.uint32),
    )
    new = slice(0, config.max_new_tokens)
    tokens, log_probs, lengths = (
        np.asarray(x).reshape(rows, num_samples, *x.shape[1:])[:num_rows]
        for x in (drawn.tokens[:, new], drawn.log_probs[:, new], drawn.lengths)
    )
    return Samples(tokens, log_probs, lengths)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def _check(
    tokens: Int32[np.ndarray, "batch length"],
    lengths: Int32[np.ndarray, " batch"],
    config: SamplingConfig,
    num_samples: int,
    max_length: int,
) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1; got {num_samples}")
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("a prompt needs at least one id; got an empty one")
    longest = int(lengths.max())
    if len(tokens) != len(lengths) or longest > tokens.shape[1]:
        raise ValueError(
            f"prompt_tokens {list(tokens.shape)} do not hold {len(lengths)} prompts of "
            f"up to {longest} ids"
        )
    needed = config.max_new_tokens if config.fixed_length else 1
    if longest + needed > max_length:
        raise ValueError(
            f"the prompt is too long: {longest} ids, and at least {needed} to write, "
            f"exceed the model's max_length {max_length}; retrieve fewer documents "
            "(num_retrieved) or shorten the prompt"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Any,
    room: int,
    num_samples: int,
    fixed_length: bool,
    params: Any,
    prompt_tokens: Int32[Array, "batch length"],
    prompt_lengths: Int32[Array, " batch"],
    limits: Int32[Array, " batch"],
    grammar: Grammar,
    options: _Options,
    key: Key[Array, ""],
    row_seeds: Int[Array, " batch"],
) -> _Drawing:
    """The compiled program: prefill, repeat, and the loop over at most `room` ids."""
    max_length = min(prompt_tokens.shape[1] + room, model.config.max_length)
    variables = {"params": params}
    logits, cache = model.apply(
        variables, prompt_tokens, prompt_lengths, max_length, method="prefill"
    )
    cache = cache.repeat(num_samples)
    logits = jnp.repeat(logits, num_samples, axis=0)
    limits = jnp.repeat(limits, num_samples)
    rows, unknown = len(logits), logits.shape[1] - grammar.allowed.shape[1]
    # A model may have more rows in its table than the vocabulary has ids.
    allowed = jnp.pad(grammar.allowed, ((0, 0), (0, unknown)))
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, 0))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_seeds)
    keys = fold(
        jnp.repeat(keys, num_samples), jnp.tile(jnp.arange(num_samples), len(keys))
    )
    pad = jnp.argmax(grammar.allowed[DONE]).astype(jnp.int32)

    def draw(step, logits: Float32[Array, "rows vocab"], drawing: _Drawing):
        logits = logits.astype(jnp.float32)
        running = drawing.state != DONE
        masked = jnp.where(allowed[drawing.state], logits, -jnp.inf)
        tokens = sample_tokens(
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step),
            masked,
            options.temperature,
            options.top_k,
            options.top_p,
        )
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        log_probs = jnp.where(running, log_probs, 0.0)
        state, num_in_state = advance(
            grammar, drawing.state, drawing.num_in_state, tokens
        )
        lengths = drawing.lengths + running
        return _Drawing(
            jnp.where(lengths >= limits, DONE, state),
            num_in_state,
            tokens,
            drawing.tokens.at[:, step].set(tokens),
            drawing.log_probs.at[:, step].set(log_probs),
            lengths,
        )

    def draw_and_read(step, carry):
        cache, logits, drawing = carry
        drawing = draw(step, logits, drawing)
        logits, cache = model.apply(variables, drawing.last, cache, method="decode")
        return cache, logits, drawing

    start = _Drawing(
        state=jnp.full(rows, START, jnp.int32),
        num_in_state=jnp.zeros(rows, jnp.int32),
        last=jnp.full(rows, pad),
        tokens=jnp.full((rows, room), pad),
        log_probs=jnp.zeros((rows, room), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
    )
    carry = (cache, logits, start)
    if fixed_length:
        return jax.lax.fori_loop(0, room, draw_and_read, carry)[2]

    def unfinished(carry):
        step, (_, _, drawing) = carry
        return (step < room) & jnp.any(drawing.state != DONE)

    def advance_once(carry):
        step, inner = carry
        return step + 1, draw_and_read(step, inner)

    return jax.lax.while_loop(unfinished, advance_once, (0, carry))[1][2]
