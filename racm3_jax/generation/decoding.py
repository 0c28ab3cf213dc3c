"""The compiled parts of `sample`: read the prompts, then draw and read, id by id.

    prefix   [ documents of prompt 0 ]         read once
             [ documents of prompt 1 ]
    rows     prompt 0, as it is                read behind their prefix, then repeated
             prompt 0, unconditional           for the samples
             prompt 1, as it is
             prompt 1, unconditional

Rows lie in the order [prompt, stream, sample], so that the rows of a prefix are
neighbours; what is drawn lies as [prompt, sample], and is read by both streams.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from racm3_jax.generation.grammar import DONE, START, Grammar, advance
from racm3_jax.generation.logits import contrast, guide, sample_tokens
from racm3_jax.generation.placement import constrain_cache
from racm3_jax.model.cache import Prefix
from racm3_jax.model.transformer import slice_head
from racm3_jax.sharding import constrain_rows


class Rows(NamedTuple):
    """Prompts on the device. Without a prefix, `tokens` are the whole prompts.

    Attributes:
      tokens: each row's own ids, right-padded.
      lengths: how many those are.
      prefix_tokens: ids that rows share, right-padded, or None.
      prefix_lengths: how many those are.
      visible: how many of its prefix each row reads.
    """

    tokens: Int32[Array, "rows width"]
    lengths: Int32[Array, " rows"]
    prefix_tokens: Int32[Array, "prefixes prefix"] | None = None
    prefix_lengths: Int32[Array, " prefixes"] | None = None
    visible: Int32[Array, " rows"] | None = None


class Plan(NamedTuple):
    """What may be drawn, and how; all traced, so that no change compiles anew.

    Attributes:
      grammar: shared by all rows.
      limits: the most ids of each drawn row.
      forced: an id where the row has no choice, -1 where it draws; or None.
      keys: one a drawn row.
    """

    grammar: Grammar
    limits: Int32[Array, " drawn"]
    forced: Int32[Array, "drawn room"] | None
    keys: Key[Array, " drawn"]
    temperature: Float32[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float32[Array, ""]
    guidance: Float32[Array, ""]
    contrastive_k: Int32[Array, ""]
    contrastive_alpha: Float32[Array, ""]


class Drawing(NamedTuple):
    """What the loop has drawn so far."""

    state: Int[Array, " drawn"]
    num_in_state: Int[Array, " drawn"]
    last: Int32[Array, " drawn"]
    tokens: Int32[Array, "drawn room"]
    log_probs: Float32[Array, "drawn room"]
    lengths: Int32[Array, " drawn"]


def start_drawing(num_rows: int, room: int, pad: int) -> Drawing:
    """Nothing drawn yet, and room for `room` ids a row."""
    return Drawing(
        state=jnp.full(num_rows, START, jnp.int32),
        num_in_state=jnp.zeros(num_rows, jnp.int32),
        last=jnp.full(num_rows, pad, jnp.int32),
        tokens=jnp.full((num_rows, room), pad, jnp.int32),
        log_probs=jnp.zeros((num_rows, room), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def read_prompts(
    model: Any,
    num_samples: int,
    room: int,
    ids: tuple[int, int] | None,
    params: Any,
    rows: Rows,
) -> tuple[Any, Float32[Array, "rows ids"]]:
    """Prefill: the cache of all rows, and the logits that follow their prompts.

    Args:
      model: see `sample`.
      num_samples: how often each row is repeated.
      room: for how many new ids.
      ids: half-open range of the ids whose logits are wanted, or None for all.
      params: of the model.
      rows: the prompts.
    """
    variables = {"params": params}
    max_length = min(rows.tokens.shape[1] + room, model.config.max_length)
    if rows.prefix_tokens is None:
        logits, cache = model.apply(
            variables, rows.tokens, rows.lengths, max_length, method="prefill"
        )
    else:
        _, read = model.apply(
            variables,
            rows.prefix_tokens,
            rows.prefix_lengths,
            rows.prefix_tokens.shape[1],
            method="prefill",
        )
        assert rows.visible is not None  # they come together
        logits, cache = model.apply(
            variables,
            rows.tokens,
            rows.lengths,
            Prefix(read.layers, rows.visible),
            max_length,
            method="prefill_behind",
        )
    if ids is not None:
        logits = logits[:, ids[0] : ids[1]]
    cache = constrain_cache(cache.repeat(num_samples))
    return cache, jnp.repeat(logits, num_samples, axis=0)


def _draw(
    plan: Plan,
    allowed: Bool[Array, "states ids"],
    first: int,
    pad: Int32[Array, ""],
    num_samples: int,
    num_streams: int,
    step: Int32[Array, ""],
    logits: Float32[Array, "rows ids"],
    drawing: Drawing,
) -> Drawing:
    """One id of every sample; `first` is the id that column 0 is of."""
    # [prompt, stream, sample, id] -> one row a sample, in each stream.
    # Whole on each device: the filters look at all ids again and again.
    streams = (
        constrain_rows(logits)
        .astype(jnp.float32)
        .reshape(-1, num_streams, num_samples, logits.shape[1])
    )
    given = streams[:, 0].reshape(-1, logits.shape[1])
    may_follow = allowed[drawing.state]
    masked = jnp.where(may_follow, given, -jnp.inf)
    if num_streams == 2:
        other = streams[:, 1].reshape(given.shape)
        masked = jax.lax.cond(
            plan.contrastive_k > 0,
            lambda: contrast(
                masked,
                jnp.where(may_follow, other, -jnp.inf),
                plan.contrastive_k,
                plan.contrastive_alpha,
            ),
            lambda: jnp.where(may_follow, guide(given, other, plan.guidance), -jnp.inf),
        )
    tokens = first + sample_tokens(
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(plan.keys, step),
        masked,
        plan.temperature,
        plan.top_k,
        plan.top_p,
    )
    chosen = jnp.take_along_axis(given, tokens[:, None] - first, axis=1)[:, 0]
    log_probs = chosen - jax.nn.logsumexp(given, axis=-1)
    drew = drawing.state != DONE
    if plan.forced is not None:
        forced = plan.forced[:, step]
        tokens = jnp.where(forced >= 0, forced, tokens)
        log_probs = jnp.where(forced >= 0, 0.0, log_probs)
    tokens = jnp.where(drew, tokens, pad)
    state, num_in_state = advance(
        plan.grammar, drawing.state, drawing.num_in_state, tokens
    )
    lengths = drawing.lengths + drew
    return Drawing(
        jnp.where(lengths >= plan.limits, DONE, state),
        num_in_state,
        tokens,
        drawing.tokens.at[:, step].set(tokens),
        drawing.log_probs.at[:, step].set(jnp.where(drew, log_probs, 0.0)),
        lengths,
    )


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("cache", "drawing")
)
def draw_steps(
    model: Any,
    num_samples: int,
    num_streams: int,
    ids: tuple[int, int] | None,
    num_steps: int | None,
    params: Any,
    plan: Plan,
    cache: Any,
    logits: Float32[Array, "rows ids"],
    drawing: Drawing,
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
) -> tuple[Any, Float32[Array, "rows ids"], Drawing]:
    """Draws the ids `start` to `stop` of every row, and reads them.

    Args:
      model: see `sample`.
      num_samples: of each prompt.
      num_streams: 1, or 2 with an unconditional prompt beside each.
      ids: half-open range of the ids that `logits` are of, or None for all.
      num_steps: `stop - start` where it is constant; None stops when all rows are done.
      params: of the model.
      plan: what may be drawn.
      cache: of all rows; consumed.
      logits: that follow what was read; of all rows.
      drawing: what was drawn so far; consumed.
      start: ids drawn before.
      stop: ids drawn after.
    """
    first = 0 if ids is None else ids[0]
    allowed = plan.grammar.allowed
    pad = jnp.argmax(allowed[DONE]).astype(jnp.int32)
    if ids is None:
        # A model may have more rows in its table than the vocabulary has ids.
        allowed = jnp.pad(allowed, ((0, 0), (0, logits.shape[1] - allowed.shape[1])))
        head = ()
    else:
        allowed = allowed[:, ids[0] : ids[1]]
        head = (slice_head(params, model.config, *ids),)

    def draw_and_read(step, carry):
        cache, logits, drawing = carry
        drawing = _draw(
            plan, allowed, first, pad, num_samples, num_streams, step, logits, drawing
        )
        last = drawing.last.reshape(-1, 1, num_samples)
        last = jnp.broadcast_to(last, (len(last), num_streams, num_samples))
        logits, cache = model.apply(
            {"params": params}, last.reshape(-1), cache, *head, method="decode"
        )
        return cache, logits, drawing

    carry = (cache, logits, drawing)
    if num_steps is not None:
        return jax.lax.fori_loop(
            0, num_steps, lambda i, inner: draw_and_read(start + i, inner), carry
        )

    def unfinished(carry):
        step, (_, _, drawing) = carry
        return (step < stop) & jnp.any(drawing.state != DONE)

    def advance_once(carry):
        step, inner = carry
        return step + 1, draw_and_read(step, inner)

    return jax.lax.while_loop(unfinished, advance_once, (start, carry))[1]
