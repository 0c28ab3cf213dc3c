"""The compiled parts of `sample`: read the prompts, then decode, pass by pass.

    prefix   [ documents of prompt 0 ]         read once
             [ documents of prompt 1 ]
    rows     prompt 0, as it is                read after their prefix, then repeated
             prompt 0, unconditional           for the samples
             prompt 1, as it is
             prompt 1, unconditional

Rows are in the order [prompt, stream, sample], so that the rows of a prefix are
neighbours; sampled tokens are [prompt, sample], and both streams read them.

A pass reads the last token of each row and, with `drafts`, guesses of the next ones:

    last     3                       a sampled token is kept as long as all guesses
    guesses      7 7 2               before it are right, so it is the one sampled
    sampled      7 7 5 .             without guesses: 7 7 5 are kept, 5 is read next
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from racm3_jax.generation import drafts as drafts_lib
from racm3_jax.generation.drafts import Canvas, Drafter
from racm3_jax.generation.grammar import DONE, START, Grammar, advance
from racm3_jax.generation.logits import LogitSettings, contrast, guide, sample_tokens
from racm3_jax.generation.placement import constrain_cache
from racm3_jax.model.cache import Prefix
from racm3_jax.model.transformer import slice_head
from racm3_jax.sharding import constrain_rows


class Rows(NamedTuple):
    """Prompts on the device. Without a prefix, `tokens` are the whole prompts.

    Attributes:
      tokens: each row's own tokens, right-padded.
      lengths: of each row.
      prefix_tokens: tokens that rows share, right-padded, or None.
      prefix_lengths: of each prefix.
      visible: how many tokens of its prefix each row reads.
    """

    tokens: Int32[Array, "rows width"]
    lengths: Int32[Array, " rows"]
    prefix_tokens: Int32[Array, "prefixes prefix"] | None = None
    prefix_lengths: Int32[Array, " prefixes"] | None = None
    visible: Int32[Array, " rows"] | None = None


class Plan(NamedTuple):
    """What may be sampled, and how; all traced, so that no change recompiles.

    Attributes:
      grammar: shared by all rows.
      limits: the most new tokens of each sample.
      forced: a token where the sample has no choice, -1 where it has; or None.
      keys: one per sample.
      table: of guesses, or None.
      cells: which code of its image each token is; or None (see `Drafts`).
      known: the known codes of each sample's image; or None.
    """

    grammar: Grammar
    limits: Int32[Array, " samples"]
    forced: Int32[Array, "samples room"] | None
    keys: Key[Array, " samples"]
    settings: LogitSettings
    table: drafts_lib.Table | None = None
    cells: Int32[Array, "samples room"] | None = None
    known: Int32[Array, "samples codes"] | None = None


class DecodeState(NamedTuple):
    """The state of the decode loop; `canvas` only with guesses."""

    state: Int[Array, " samples"]
    num_in_state: Int[Array, " samples"]
    last: Int32[Array, " samples"]
    tokens: Int32[Array, "samples room"]
    log_probs: Float32[Array, "samples room"]
    lengths: Int32[Array, " samples"]
    canvas: Canvas | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def read_prompts(
    model: Any,
    num_samples: int,
    room: int,
    token_range: tuple[int, int] | None,
    params: Any,
    rows: Rows,
) -> tuple[Any, Float32[Array, "rows vocab"]]:
    """Prefill: the cache of all rows, and the logits that follow their prompts.

    Args:
      model: see `sample`.
      num_samples: how often each row is repeated.
      room: for how many new tokens.
      token_range: half-open range of the tokens whose logits are needed; None is all.
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
            method="prefill_after",
        )
    if token_range is not None:
        logits = logits[:, token_range[0] : token_range[1]]
    cache = constrain_cache(cache.repeat(num_samples))
    return cache, jnp.repeat(logits, num_samples, axis=0)


class _Columns(NamedTuple):
    """Which tokens the columns of logits are of."""

    first: int
    pad: Int32[Array, ""]
    allowed: Bool[Array, "states vocab"]


def _find_columns(
    plan: Plan, token_range: tuple[int, int] | None, num_columns: int
) -> _Columns:
    allowed = plan.grammar.allowed
    pad = jnp.argmax(allowed[DONE]).astype(jnp.int32)
    if token_range is not None:
        return _Columns(
            token_range[0], pad, allowed[:, token_range[0] : token_range[1]]
        )
    # A model may have more rows in its table than the vocabulary has tokens.
    more = num_columns - allowed.shape[1]
    return _Columns(0, pad, jnp.pad(allowed, ((0, 0), (0, more))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def init_decode_state(
    num_samples: int,
    num_streams: int,
    token_range: tuple[int, int] | None,
    room: int,
    drafter: Drafter | None,
    plan: Plan,
    logits: Float32[Array, "rows vocab"],
) -> DecodeState:
    """Samples the first token of every row.

    Args:
      num_samples: of each prompt.
      num_streams: 1, or 2 with an unconditional prompt for each.
      token_range: half-open range of the tokens that `logits` are of, or None for all.
      room: for how many new tokens.
      drafter: how the next tokens will be guessed, or None.
      plan: what may be sampled.
      logits: that follow the prompts.
    """
    columns = _find_columns(plan, token_range, logits.shape[1])
    num_rows = len(plan.limits)
    decoded = DecodeState(
        state=jnp.full(num_rows, START, jnp.int32),
        num_in_state=jnp.zeros(num_rows, jnp.int32),
        last=jnp.full(num_rows, columns.pad, jnp.int32),
        tokens=jnp.full((num_rows, room), columns.pad, jnp.int32),
        log_probs=jnp.zeros((num_rows, room), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
    )
    if drafter is not None:
        canvas = drafts_lib.start_canvas(drafter, plan.known, num_rows, room)
        decoded = decoded._replace(canvas=canvas)
    guesses = jnp.zeros((num_rows, 0), jnp.int32)
    counts = num_samples, num_streams
    return _sample_window(
        plan, columns, *counts, drafter, logits[:, None], guesses, decoded
    )


def _sample_window(
    plan: Plan,
    columns: _Columns,
    num_samples: int,
    num_streams: int,
    drafter: Drafter | None,
    logits: Float32[Array, "rows window vocab"],
    guesses: Int32[Array, "samples guesses"],
    decoded: DecodeState,
) -> DecodeState:
    """Samples the tokens after `last` and after the guesses that are right."""
    window = logits.shape[1]
    states, nums_in_state = _follow_guesses(plan, guesses, decoded)
    places = decoded.lengths[:, None] + jnp.arange(window)
    unfinished = states != DONE

    tokens, log_probs = _sample_places(
        plan, columns, num_samples, num_streams, logits, states, places
    )
    free = unfinished
    if plan.forced is not None:
        forced = drafts_lib.take(plan.forced, places, -1)
        free = unfinished & (forced < 0)
        tokens = jnp.where(forced >= 0, forced, tokens)
        log_probs = jnp.where(forced >= 0, 0.0, log_probs)

    equal = guesses == tokens[:, :-1]
    right = jnp.cumprod(equal, axis=1, dtype=jnp.int32).astype(bool)
    follows = jnp.pad(right, ((0, 0), (1, 0)), constant_values=True)
    kept = follows & unfinished
    num_kept = kept.sum(axis=1, dtype=jnp.int32)

    def last_kept(values):
        at = jnp.maximum(num_kept - 1, 0)[:, None]
        return jnp.take_along_axis(values, at, axis=1)[:, 0]

    last = jnp.where(num_kept > 0, last_kept(tokens), columns.pad)
    state, num_in_state = advance(
        plan.grammar, last_kept(states), last_kept(nums_in_state), last
    )
    canvas = decoded.canvas
    if drafter is not None and canvas is not None:
        tested = (kept & free)[:, :-1]
        judged = tested, tested & equal
        canvas = drafts_lib.follow(
            drafter, plan.cells, canvas, places, tokens, kept, judged
        )
    at = jnp.where(kept, places, decoded.tokens.shape[1])
    lengths = decoded.lengths + num_kept
    return DecodeState(
        jnp.where(lengths >= plan.limits, DONE, state),
        num_in_state,
        last,
        drafts_lib.put(decoded.tokens, at, tokens),
        drafts_lib.put(decoded.log_probs, at, log_probs),
        lengths,
        canvas,
    )


def _sample_places(
    plan: Plan,
    columns: _Columns,
    num_samples: int,
    num_streams: int,
    logits: Float32[Array, "rows window vocab"],
    states: Int[Array, "samples window"],
    places: Int[Array, "samples window"],
) -> tuple[Int32[Array, "samples window"], Float32[Array, "samples window"]]:
    """A token for each place by the logits before it, and its log-probability."""
    first, _, allowed = columns
    window = logits.shape[1]
    # [prompt, stream, sample, window, token] -> one row per place, in each stream.
    # Not split over devices: the filters look at all tokens again and again.
    streams = (
        constrain_rows(logits)
        .astype(jnp.float32)
        .reshape(-1, num_streams, num_samples, *logits.shape[1:])
    )
    given = streams[:, 0].reshape(-1, logits.shape[2])
    may_follow = allowed[states.reshape(-1)]
    masked = jnp.where(may_follow, given, -jnp.inf)
    if num_streams == 2:
        other = streams[:, 1].reshape(given.shape)
        masked = jax.lax.cond(
            plan.settings.contrastive_k > 0,
            lambda: contrast(
                masked,
                jnp.where(may_follow, other, -jnp.inf),
                plan.settings.contrastive_k,
                plan.settings.contrastive_alpha,
            ),
            lambda: jnp.where(
                may_follow, guide(given, other, plan.settings.guidance), -jnp.inf
            ),
        )
    fold_in = jax.vmap(jax.random.fold_in)
    tokens = first + sample_tokens(
        fold_in(jnp.repeat(plan.keys, window), places.reshape(-1)),
        masked,
        plan.settings,
    )
    chosen = jnp.take_along_axis(given, tokens[:, None] - first, axis=1)[:, 0]
    log_probs = chosen - jax.nn.logsumexp(given, axis=-1)
    return tokens.reshape(places.shape), log_probs.reshape(places.shape)


def _follow_guesses(
    plan: Plan, guesses: Int32[Array, "samples guesses"], decoded: DecodeState
) -> tuple[Int[Array, "samples window"], Int[Array, "samples window"]]:
    """The grammar's state before each place, if the guesses before it are right."""
    states, nums = [decoded.state], [decoded.num_in_state]
    for i, guess in enumerate(guesses.T, 1):
        state, num = advance(plan.grammar, states[-1], nums[-1], guess)
        done = decoded.lengths + i >= plan.limits
        states.append(jnp.where(done, DONE, state))
        nums.append(num)
    return jnp.stack(states, axis=1), jnp.stack(nums, axis=1)


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), donate_argnames=("cache", "decoded")
)
def decode_steps(
    model: Any,
    num_samples: int,
    num_streams: int,
    token_range: tuple[int, int] | None,
    num_steps: int | None,
    drafter: Drafter | None,
    params: Any,
    plan: Plan,
    cache: Any,
    decoded: DecodeState,
    stop: Int32[Array, ""],
) -> tuple[Any, DecodeState]:
    """Reads the last tokens and samples the next ones, until rows have `stop` tokens.

    Args:
      model: see `sample`.
      num_samples: of each prompt.
      num_streams: 1, or 2 with an unconditional prompt for each.
      token_range: half-open range of the tokens that the head is computed for, or None
        for all.
      num_steps: how many passes, where that is constant; None stops when all rows are
        done or have `stop` tokens.
      drafter: how the next tokens are guessed, or None: one token per pass.
      params: of the model.
      plan: what may be sampled.
      cache: of all rows; consumed.
      decoded: the state so far, at least one token per row; consumed.
      stop: how many tokens each row should have; with guesses some have more.
    """
    head = (
        () if token_range is None else (slice_head(params, model.config, *token_range),)
    )
    spread = functools.partial(_spread, num_samples, num_streams)

    def decode_and_sample(window, carry):
        cache, decoded = carry
        if drafter is None or window == 1:
            guesses = jnp.zeros((len(decoded.last), 0), jnp.int32)
            logits, cache = model.apply(
                {"params": params}, spread(decoded.last), cache, *head, method="decode"
            )
            logits = logits[:, None]
        else:
            more = plan.table, plan.cells, plan.forced, decoded.canvas, decoded.lengths
            guesses = drafts_lib.propose(drafter, *more)
            tokens = jnp.concatenate([decoded.last[:, None], guesses], axis=1)
            logits, cache = model.apply(
                {"params": params}, spread(tokens), cache, *head, method="decode_window"
            )
        columns = _find_columns(plan, token_range, logits.shape[2])
        counts = num_samples, num_streams
        after = _sample_window(
            plan, columns, *counts, drafter, logits, guesses, decoded
        )
        if guesses.shape[1]:
            cache = cache.advance(spread(after.lengths - decoded.lengths))
        return cache, after

    read_next = functools.partial(
        decode_and_sample, 1 if drafter is None else drafter.window
    )
    carry = (cache, decoded)
    if num_steps is not None:
        return jax.lax.fori_loop(0, num_steps, lambda _, inner: read_next(inner), carry)

    def is_unfinished(decoded):
        return (decoded.state != DONE) & (decoded.lengths < stop)

    if drafter is None or drafter.window == 1 or token_range is not None:
        return _repeat(read_next, carry, is_unfinished)
    only_codes = _allow_only(plan.grammar, drafter.codes)
    read_one = functools.partial(decode_and_sample, 1)
    return _take_turns(read_one, read_next, carry, is_unfinished, only_codes)


def _take_turns(
    read_text: Callable[[Any], Any],
    read_image: Callable[[Any], Any],
    carry: Any,
    is_unfinished: Callable[[DecodeState], Bool[Array, " samples"]],
    only_codes: Bool[Array, " states"],
) -> Any:
    """Passes over text, for which there are no guesses, and over images.

    While no row is inside an image (in a state of `only_codes`), tokens are read one by
    one.
    """

    def is_in_image(decoded):
        return is_unfinished(decoded) & only_codes[decoded.state]

    def is_in_text(decoded):
        return is_unfinished(decoded).any() & ~is_in_image(decoded).any()

    def read_text_then_image(carry):
        return _repeat(read_image, _repeat(read_text, carry, is_in_text), is_in_image)

    return _repeat(read_text_then_image, carry, is_unfinished)


def _spread(num_samples: int, num_streams: int, values: Array) -> Array:
    """[prompt, sample, ...] -> rows [prompt, stream, sample], ..."""
    values = values.reshape(-1, 1, num_samples, *values.shape[1:])
    shape = (len(values), num_streams, *values.shape[2:])
    return jnp.broadcast_to(values, shape).reshape(-1, *values.shape[3:])


def _allow_only(
    grammar: Grammar, token_range: tuple[int, int]
) -> Bool[Array, " states"]:
    """True for states in which only tokens of a half-open range are allowed."""
    columns = jnp.arange(grammar.allowed.shape[1])
    inside = (columns >= token_range[0]) & (columns < token_range[1])
    return ~(grammar.allowed & ~inside).any(axis=1)


def _repeat(
    step: Callable[[Any], Any], carry: Any, is_unfinished: Callable[[Any], Any]
) -> Any:
    """Passes, as long as any row is unfinished."""
    return jax.lax.while_loop(lambda carry: is_unfinished(carry[1]).any(), step, carry)
