"""The compiled parts of `sample`: read the prompts, then read and draw, pass by pass.

    prefix   [ documents of prompt 0 ]         read once
             [ documents of prompt 1 ]
    rows     prompt 0, as it is                read after their prefix, then repeated
             prompt 0, unconditional           for the samples
             prompt 1, as it is
             prompt 1, unconditional

Rows lie in the order [prompt, stream, sample], so that the rows of a prefix are
neighbours; what is drawn lies as [prompt, sample], and is read by both streams.

A pass reads the last id of each row, and with `drafts` guesses of the next ones after it:

    last     3                       what the model samples after each is what it would
    guesses      7 7 2               sample without the guesses, as long as those before
    sampled      7 7 5 .             are right: here 7 7 5 stay, and 5 is read next
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
      table: of guesses, or None.
      cells: which code of its image each id of a row is; or None (see `Drafts`).
      known: what is known of each row's image; or None.
    """

    grammar: Grammar
    limits: Int32[Array, " drawn"]
    forced: Int32[Array, "drawn room"] | None
    keys: Key[Array, " drawn"]
    settings: LogitSettings
    table: drafts_lib.Table | None = None
    cells: Int32[Array, "drawn room"] | None = None
    known: Int32[Array, "drawn codes"] | None = None


class Drawing(NamedTuple):
    """What the loop has drawn so far; `canvas` only where it guesses."""

    state: Int[Array, " drawn"]
    num_in_state: Int[Array, " drawn"]
    last: Int32[Array, " drawn"]
    tokens: Int32[Array, "drawn room"]
    log_probs: Float32[Array, "drawn room"]
    lengths: Int32[Array, " drawn"]
    canvas: Canvas | None = None


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
            method="prefill_after",
        )
    if ids is not None:
        logits = logits[:, ids[0] : ids[1]]
    cache = constrain_cache(cache.repeat(num_samples))
    return cache, jnp.repeat(logits, num_samples, axis=0)


class _Ids(NamedTuple):
    """Which ids the columns of logits are of."""

    first: int
    pad: Int32[Array, ""]
    allowed: Bool[Array, "states ids"]


def _find_ids(plan: Plan, ids: tuple[int, int] | None, num_columns: int) -> _Ids:
    allowed = plan.grammar.allowed
    pad = jnp.argmax(allowed[DONE]).astype(jnp.int32)
    if ids is not None:
        return _Ids(ids[0], pad, allowed[:, ids[0] : ids[1]])
    # A model may have more rows in its table than the vocabulary has ids.
    more = num_columns - allowed.shape[1]
    return _Ids(0, pad, jnp.pad(allowed, ((0, 0), (0, more))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def start_drawing(
    num_samples: int,
    num_streams: int,
    ids: tuple[int, int] | None,
    room: int,
    drafter: Drafter | None,
    plan: Plan,
    logits: Float32[Array, "rows ids"],
) -> Drawing:
    """The first id of every row.

    Args:
      num_samples: of each prompt.
      num_streams: 1, or 2 with an unconditional prompt beside each.
      ids: half-open range of the ids that `logits` are of, or None for all.
      room: for how many ids.
      drafter: how the next ids will be guessed, or None.
      plan: what may be drawn.
      logits: that follow the prompts.
    """
    columns = _find_ids(plan, ids, logits.shape[1])
    num_rows = len(plan.limits)
    drawing = Drawing(
        state=jnp.full(num_rows, START, jnp.int32),
        num_in_state=jnp.zeros(num_rows, jnp.int32),
        last=jnp.full(num_rows, columns.pad, jnp.int32),
        tokens=jnp.full((num_rows, room), columns.pad, jnp.int32),
        log_probs=jnp.zeros((num_rows, room), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
    )
    if drafter is not None:
        canvas = drafts_lib.start_canvas(drafter, plan.known, num_rows, room)
        drawing = drawing._replace(canvas=canvas)
    guesses = jnp.zeros((num_rows, 0), jnp.int32)
    counts = num_samples, num_streams
    return _draw(plan, columns, *counts, drafter, logits[:, None], guesses, drawing)


def _draw(
    plan: Plan,
    columns: _Ids,
    num_samples: int,
    num_streams: int,
    drafter: Drafter | None,
    logits: Float32[Array, "rows window ids"],
    guesses: Int32[Array, "drawn guesses"],
    drawing: Drawing,
) -> Drawing:
    """The ids of every sample after `last` and its guesses, as far as those are right."""
    window = logits.shape[1]
    states, nums_in_state = _follow_guesses(plan, guesses, drawing)
    places = drawing.lengths[:, None] + jnp.arange(window)
    drew = states != DONE

    tokens, log_probs = _sample_places(
        plan, columns, num_samples, num_streams, logits, states, places
    )
    free = drew
    if plan.forced is not None:
        forced = drafts_lib.take(plan.forced, places, -1)
        free = drew & (forced < 0)
        tokens = jnp.where(forced >= 0, forced, tokens)
        log_probs = jnp.where(forced >= 0, 0.0, log_probs)

    equal = guesses == tokens[:, :-1]
    right = jnp.cumprod(equal, axis=1, dtype=jnp.int32).astype(bool)
    follows = jnp.pad(right, ((0, 0), (1, 0)), constant_values=True)
    kept = follows & drew
    num_kept = kept.sum(axis=1, dtype=jnp.int32)

    def last_kept(values):
        at = jnp.maximum(num_kept - 1, 0)[:, None]
        return jnp.take_along_axis(values, at, axis=1)[:, 0]

    last = jnp.where(num_kept > 0, last_kept(tokens), columns.pad)
    state, num_in_state = advance(
        plan.grammar, last_kept(states), last_kept(nums_in_state), last
    )
    canvas = drawing.canvas
    if drafter is not None and canvas is not None:
        tested = (kept & free)[:, :-1]
        judged = tested, tested & equal
        canvas = drafts_lib.follow(
            drafter, plan.cells, canvas, places, tokens, kept, judged
        )
    at = jnp.where(kept, places, drawing.tokens.shape[1])
    lengths = drawing.lengths + num_kept
    return Drawing(
        jnp.where(lengths >= plan.limits, DONE, state),
        num_in_state,
        last,
        drafts_lib.put(drawing.tokens, at, tokens),
        drafts_lib.put(drawing.log_probs, at, log_probs),
        lengths,
        canvas,
    )


def _sample_places(
    plan: Plan,
    columns: _Ids,
    num_samples: int,
    num_streams: int,
    logits: Float32[Array, "rows window ids"],
    states: Int[Array, "drawn window"],
    places: Int[Array, "drawn window"],
) -> tuple[Int32[Array, "drawn window"], Float32[Array, "drawn window"]]:
    """An id for each place by the logits before it, and its log-probability."""
    first, _, allowed = columns
    window = logits.shape[1]
    # [prompt, stream, sample, window, id] -> one row a place, in each stream.
    # Whole on each device: the filters look at all ids again and again.
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
    plan: Plan, guesses: Int32[Array, "drawn guesses"], drawing: Drawing
) -> tuple[Int[Array, "drawn window"], Int[Array, "drawn window"]]:
    """The grammar's state before each place, if the guesses before it are right."""
    states, nums = [drawing.state], [drawing.num_in_state]
    for i, guess in enumerate(guesses.T, 1):
        state, num = advance(plan.grammar, states[-1], nums[-1], guess)
        done = drawing.lengths + i >= plan.limits
        states.append(jnp.where(done, DONE, state))
        nums.append(num)
    return jnp.stack(states, axis=1), jnp.stack(nums, axis=1)


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), donate_argnames=("cache", "drawing")
)
def draw_steps(
    model: Any,
    num_samples: int,
    num_streams: int,
    ids: tuple[int, int] | None,
    num_steps: int | None,
    drafter: Drafter | None,
    params: Any,
    plan: Plan,
    cache: Any,
    drawing: Drawing,
    stop: Int32[Array, ""],
) -> tuple[Any, Drawing]:
    """Reads what was drawn last, and draws what follows, until rows have `stop` ids.

    Args:
      model: see `sample`.
      num_samples: of each prompt.
      num_streams: 1, or 2 with an unconditional prompt beside each.
      ids: half-open range of the ids that the head is computed for, or None for all.
      num_steps: how many passes, where that is constant; None stops when all rows are
        done or have `stop` ids.
      drafter: how the next ids are guessed, or None: an id a pass.
      params: of the model.
      plan: what may be drawn.
      cache: of all rows; consumed.
      drawing: what was drawn so far, at least one id a row; consumed.
      stop: how many ids each row shall have; with guesses some have more.
    """
    head = () if ids is None else (slice_head(params, model.config, *ids),)
    spread = functools.partial(_spread, num_samples, num_streams)

    def read_and_draw(window, carry):
        cache, drawing = carry
        if drafter is None or window == 1:
            guesses = jnp.zeros((len(drawing.last), 0), jnp.int32)
            logits, cache = model.apply(
                {"params": params}, spread(drawing.last), cache, *head, method="decode"
            )
            logits = logits[:, None]
        else:
            more = plan.table, plan.cells, plan.forced, drawing.canvas, drawing.lengths
            guesses = drafts_lib.propose(drafter, *more)
            tokens = jnp.concatenate([drawing.last[:, None], guesses], axis=1)
            logits, cache = model.apply(
                {"params": params}, spread(tokens), cache, *head, method="decode_window"
            )
        columns = _find_ids(plan, ids, logits.shape[2])
        counts = num_samples, num_streams
        after = _draw(plan, columns, *counts, drafter, logits, guesses, drawing)
        if guesses.shape[1]:
            cache = cache.advance(spread(after.lengths - drawing.lengths))
        return cache, after

    read_next = functools.partial(
        read_and_draw, 1 if drafter is None else drafter.window
    )
    carry = (cache, drawing)
    if num_steps is not None:
        return jax.lax.fori_loop(0, num_steps, lambda _, inner: read_next(inner), carry)

    def is_unfinished(drawing):
        return (drawing.state != DONE) & (drawing.lengths < stop)

    if drafter is None or drafter.window == 1 or ids is not None:
        return _repeat(read_next, carry, is_unfinished)
    only_codes = _allow_only(plan.grammar, drafter.codes)
    read_one = functools.partial(read_and_draw, 1)
    return _take_turns(read_one, read_next, carry, is_unfinished, only_codes)


def _take_turns(
    read_text: Callable[[Any], Any],
    read_image: Callable[[Any], Any],
    carry: Any,
    is_unfinished: Callable[[Drawing], Bool[Array, " drawn"]],
    only_codes: Bool[Array, " states"],
) -> Any:
    """Passes where texts may come, which nothing guesses.

    While no row is inside of an image (in a state of `only_codes`), ids are read one by
    one.
    """

    def is_in_image(drawing):
        return is_unfinished(drawing) & only_codes[drawing.state]

    def is_in_text(drawing):
        return is_unfinished(drawing).any() & ~is_in_image(drawing).any()

    def read_text_then_image(carry):
        return _repeat(read_image, _repeat(read_text, carry, is_in_text), is_in_image)

    return _repeat(read_text_then_image, carry, is_unfinished)


def _spread(num_samples: int, num_streams: int, values: Array) -> Array:
    """[prompt, sample, ...] -> rows [prompt, stream, sample], ..."""
    values = values.reshape(-1, 1, num_samples, *values.shape[1:])
    shape = (len(values), num_streams, *values.shape[2:])
    return jnp.broadcast_to(values, shape).reshape(-1, *values.shape[3:])


def _allow_only(grammar: Grammar, ids: tuple[int, int]) -> Bool[Array, " states"]:
    """True for states in which nothing may come but ids of a half-open range."""
    columns = jnp.arange(grammar.allowed.shape[1])
    inside = (columns >= ids[0]) & (columns < ids[1])
    return ~(grammar.allowed & ~inside).any(axis=1)


def _repeat(
    step: Callable[[Any], Any], carry: Any, goes_on: Callable[[Any], Any]
) -> Any:
    """Passes, as long as it is so for any row."""
    return jax.lax.while_loop(lambda carry: goes_on(carry[1]).any(), step, carry)
