"""The only decode loop: prefill the prompts once, then sample new tokens pass by pass.

    prompt_tokens  [ a b c . . . . . ]   right-padded to a bucket (. = padding)
                   [ a b c d e . . . ]
    prefill once -> cache -> repeated for `num_samples` -> sample, decode, sample, ...

A pass decodes one token per row, or several with `drafts`: the samples are the same.

Everything that differs from call to call (the lengths, the grammar, temperature, k, p,
guidance, forced tokens, the seeds) is an argument of one compiled program; a program is
compiled for each bucket of rows, of prompt length and of new tokens, not for each prompt.
This module prepares the arrays; `decoding` is the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Key

from racm3_jax.generation.decoding import (
    DecodeState,
    Plan,
    Rows,
    decode_steps,
    init_decode_state,
    read_prompts,
)
from racm3_jax.generation.drafts import Drafter, Drafts
from racm3_jax.generation.grammar import DONE, Grammar
from racm3_jax.generation.logits import LogitSettings
from racm3_jax.generation.placement import count_copies, split_rows, where_params_lie
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.types import DraftCounts

PROMPT_BUCKET = 64
OWN_BUCKET = 32  # of what comes after a shared prefix
NEW_TOKENS_BUCKET = 16
PROGRESS_EVERY = 16  # tokens of a row between two reports

_Tokens = Int32[np.ndarray, "batch length"]
_Lengths = Int[np.ndarray, " batch"]


class Samples(NamedTuple):
    """The sampled tokens.

    Attributes:
      tokens: the new tokens; `<pad>` after the end of a span.
      log_probs: the model's own log-probability of each token in nats, before guidance,
        grammar, temperature and filters (with `token_range`: among those tokens); 0 after
        the end and where the token was forced.
      lengths: how many tokens each sample has.
      passes: how many passes of the model each sample took.
      tested: how many guesses were compared with sampled tokens; 0 without drafts.
      accepted: how many of them were equal.
      drafter: made the guesses, or None.
    """

    tokens: Int32[np.ndarray, "batch samples new"]
    log_probs: Float32[np.ndarray, "batch samples new"]
    lengths: Int32[np.ndarray, "batch samples"]
    passes: Int32[np.ndarray, "batch samples"]
    tested: Int32[np.ndarray, "batch samples"]
    accepted: Int32[np.ndarray, "batch samples"]
    drafter: Drafter | None = None

    def count_drafts(self, row: int) -> DraftCounts:
        """How the tokens of a row's samples were guessed, for a person to read."""
        tested = int(self.tested[row].sum())
        return DraftCounts(
            "off" if self.drafter is None else self.drafter.source,
            1 if self.drafter is None else self.drafter.window,
            float(self.passes[row].mean()),
            float(self.accepted[row].sum()) / tested if tested else None,
        )


class Unconditional(NamedTuple):
    """The second prompts of guidance: see `SamplingConfig.guidance`.

    Attributes:
      tokens: right-padded, as the first prompts.
      lengths: of each.
      prefix_lengths: how many tokens at its start are equal to the first prompt's.
    """

    tokens: _Tokens
    lengths: _Lengths
    prefix_lengths: _Lengths


class Progress(NamedTuple):
    """How far a running call is.

    Attributes:
      tokens: the tokens so far; of `Generator.infill` and `edit` all of the image, -1
        where one is still missing.
      num_sampled: tokens of each row so far.
      max_new_tokens: the most tokens of a row.
      seconds: since the first token was sampled.
      tokens_per_second: of all samples together.
    """

    tokens: Int32[np.ndarray, "batch samples new"]
    num_sampled: int
    max_new_tokens: int
    seconds: float
    tokens_per_second: float


OnProgress = Callable[[Progress], None]


@where_params_lie
def sample(
    model: Any,
    params: Any,
    prompt_tokens: _Tokens,
    prompt_lengths: _Lengths,
    grammar: Grammar,
    config: SamplingConfig,
    key: Key[Array, ""],
    *,
    num_samples: int = 1,
    row_seeds: Int[np.ndarray, " batch"] | None = None,
    prefix_lengths: _Lengths | None = None,
    unconditional: Unconditional | None = None,
    forced: Int32[np.ndarray, "batch new"] | None = None,
    row_lengths: _Lengths | None = None,
    token_range: range | None = None,
    drafts: Drafts | None = None,
    on_progress: OnProgress | None = None,
) -> Samples:
    """Continues each prompt `num_samples` times under a grammar.

    Sample j of a row is sampled with `fold_in(fold_in(key, row_seed), j)`: it depends on
    its prompt and its seed, not on the other rows nor on `num_samples`.

    Args:
      model: a `Transformer`, best with the config that `prepare_decoding` gives.
      params: its parameters, in the same form.
      prompt_tokens: right-padded with any token; the width is rounded up to a bucket.
      prompt_lengths: tokens in each prompt, at least 1.
      grammar: what may be emitted; shared by all rows.
      config: temperature, filters, guidance, and how many tokens.
      key: a JAX key.
      num_samples: continuations of each prompt.
      row_seeds: one number >= 0 per row; 0, 1, ... unless given.
      prefix_lengths: how many tokens at the start of each prompt are its retrieved
        documents. Where several rows share them (samples, guidance, or prompts with the
        same documents) they are read once.
      unconditional: the second prompts, when `config` guides; else ignored.
      forced: a token where a row has no choice, -1 where one is sampled; where rows are
        shorter than `max_new_tokens`, the rest is sampled.
      row_lengths: the most tokens of each row; `max_new_tokens` unless given. When given,
        every row must have room for its own.
      token_range: the only tokens that the grammar allows, where they are a range (the
        codes of an image): the head is then computed for those only.
      drafts: guesses of the next tokens, so that a pass gives several; they do not
        change the samples.
      on_progress: called every `PROGRESS_EVERY` tokens.

    Returns:
      The new tokens only, with log-probabilities, as NumPy arrays.

    Raises:
      ValueError: on an empty prompt, no samples, no room in the model's max_length, or
        guidance without unconditional prompts.
    """
    max_length, most = model.config.max_length, config.max_new_tokens
    prompts = [_make_stream(prompt_tokens, prompt_lengths, prefix_lengths)]
    if config.needs_unconditional:
        prompts.append(_second_stream(unconditional))
    limits = _find_limits(prompts, config, num_samples, row_lengths, max_length)
    num_rows = len(limits)
    seeds = np.arange(num_rows) if row_seeds is None else np.asarray(row_seeds)

    # Padding rows repeat the last one: they end when it ends.
    rows = round_up(1 << (num_rows - 1).bit_length(), count_copies())
    fill = np.minimum(np.arange(rows), num_rows - 1)
    prompts = [_Stream(*(x[fill] for x in stream)) for stream in prompts]
    room = most if config.fixed_length else round_up(most, NEW_TOKENS_BUCKET)
    forced = None if forced is None else _pad(forced[fill], room)
    keys = _make_keys(key, seeds[fill].astype(np.uint32), num_samples)
    plan = _make_plan(grammar, config, limits[fill], forced, keys, num_samples)
    if drafts is not None:
        plan = _add_drafts(plan, drafts, fill, room, num_samples)
    last, exact = int(limits.max()), config.fixed_length and row_lengths is None
    only = None if token_range is None else (token_range.start, token_range.stop)
    drafter = None if drafts is None else drafts.drafter
    loop = _Loop(model, num_samples, len(prompts), only, drafter, last, exact)
    arranged = split_rows(_arrange(prompts, num_samples, max_length))
    decoded = loop.run(params, plan, arranged, room, num_rows, on_progress)
    return loop.collect(decoded, num_rows, most)


class _Loop(NamedTuple):
    """What all passes of a call have in common.

    Attributes:
      model: see `sample`.
      num_samples: of each prompt.
      num_streams: 1, or 2 with guidance.
      token_range: half-open range that the head is computed for, or None.
      drafter: makes the guesses, or None.
      last: the most tokens of a row.
      exact: every row has `last` tokens.
    """

    model: Any
    num_samples: int
    num_streams: int
    token_range: tuple[int, int] | None
    drafter: Drafter | None
    last: int
    exact: bool

    def run(
        self,
        params: Any,
        plan: Plan,
        prompts: Rows,
        room: int,
        num_rows: int,
        on_progress: OnProgress | None,
    ) -> DecodeState:
        """Reads the prompts, then decodes until all rows are done."""
        model, num_samples, num_streams, token_range, drafter, last, exact = self
        cache, logits = read_prompts(
            model, num_samples, room, token_range, params, prompts
        )
        decoded = split_rows(
            init_decode_state(
                num_samples, num_streams, token_range, room, drafter, plan, logits
            )
        )
        constant = exact and on_progress is None and drafter is None
        stride = last if on_progress is None else PROGRESS_EVERY
        started = time.monotonic()
        stop, done = 0, False
        while stop < last and not done:
            stop = min(stop + stride, last)
            cache, decoded = decode_steps(
                model,
                num_samples,
                num_streams,
                token_range,
                last - 1 if constant else None,
                drafter,
                params,
                plan,
                cache,
                decoded,
                jnp.asarray(stop, jnp.int32),
            )
            if on_progress is None:
                continue
            done = not np.asarray(decoded.state != DONE).any()
            if done:  # guesses can be right beyond the next report
                stop = max(stop, int(decoded.lengths.max()))
            tokens = self._shape(decoded.tokens, num_rows)[..., :stop]
            seconds = time.monotonic() - started
            written = int(self._shape(decoded.lengths, num_rows).sum())
            speed = written / max(seconds, 1e-9)
            on_progress(Progress(tokens, stop, last, seconds, speed))
        return decoded

    def collect(self, decoded: DecodeState, num_rows: int, most: int) -> Samples:
        """The samples, without the rows that were only padding."""

        def shaped(x: Any) -> np.ndarray:
            return self._shape(x, num_rows)

        lengths, canvas = shaped(decoded.lengths), decoded.canvas
        none = np.zeros_like(lengths)
        return Samples(
            shaped(decoded.tokens)[..., :most],
            shaped(decoded.log_probs)[..., :most],
            lengths,
            lengths if canvas is None else shaped(canvas.passes),
            none if canvas is None else shaped(canvas.tested),
            none if canvas is None else shaped(canvas.accepted),
            self.drafter,
        )

    def _shape(self, x: Any, num_rows: int) -> np.ndarray:
        """[rows, ...] -> [prompts, samples, ...] on the host."""
        x = np.asarray(x)
        return x.reshape(-1, self.num_samples, *x.shape[1:])[:num_rows]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


class _Stream(NamedTuple):
    """One prompt per row, and how much of each is its prefix."""

    tokens: _Tokens
    lengths: _Lengths
    prefix_lengths: _Lengths


def _make_stream(
    tokens: _Tokens, lengths: _Lengths, prefix_lengths: _Lengths | None
) -> _Stream:
    lengths = np.asarray(lengths, np.int32)
    if prefix_lengths is None:
        prefix_lengths = np.zeros_like(lengths)
    return _Stream(
        np.asarray(tokens, np.int32), lengths, np.asarray(prefix_lengths, np.int32)
    )


def _second_stream(unconditional: Unconditional | None) -> _Stream:
    if unconditional is None:
        raise ValueError(
            "guidance and contrastive_k compare with unconditional prompts, and this "
            "call has none: use guidance=1 and contrastive_k=0"
        )
    return _make_stream(*unconditional)


def _find_limits(
    prompts: list[_Stream],
    config: SamplingConfig,
    num_samples: int,
    row_lengths: _Lengths | None,
    max_length: int,
) -> _Lengths:
    """The most new tokens of each row, once the prompts have passed all checks."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1; got {num_samples}")
    for stream in prompts:
        _check(stream, config, row_lengths, max_length)
    longest = np.max([stream.lengths for stream in prompts], axis=0)
    if row_lengths is None:
        row_lengths = np.full(len(longest), config.max_new_tokens)
    return np.minimum(row_lengths, max_length - longest)


def _check(
    stream: _Stream,
    config: SamplingConfig,
    row_lengths: _Lengths | None,
    max_length: int,
) -> None:
    tokens, lengths, prefix_lengths = stream
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("a prompt needs at least one token; got an empty one")
    longest = int(lengths.max())
    if len(tokens) != len(lengths) or longest > tokens.shape[1]:
        raise ValueError(
            f"prompt_tokens {list(tokens.shape)} do not hold {len(lengths)} prompts of "
            f"up to {longest} tokens"
        )
    if (prefix_lengths >= lengths).any():
        raise ValueError(
            "a prompt needs at least one token after its prefix; got prefix_lengths "
            f"{prefix_lengths.tolist()} of prompts of {lengths.tolist()}"
        )
    needed = np.full(len(lengths), config.max_new_tokens if config.fixed_length else 1)
    if row_lengths is not None:
        needed = np.asarray(row_lengths)
    worst = int(np.argmax(lengths + needed))
    if lengths[worst] + needed[worst] > max_length:
        raise ValueError(
            f"the prompt is too long: {lengths[worst]} tokens and at least "
            f"{needed[worst]} new ones exceed the model's max_length {max_length}; "
            "retrieve fewer documents (num_retrieved) or shorten the prompt"
        )


def _pad(
    values: Int32[np.ndarray, "batch new"], room: int
) -> Int32[np.ndarray, "batch room"]:
    padded = np.full((len(values), room), -1, np.int32)
    padded[:, : values.shape[1]] = values
    return padded


def _add_drafts(
    plan: Plan, drafts: Drafts, fill: np.ndarray, room: int, num_samples: int
) -> Plan:
    cells, known = drafts.cells, drafts.known
    if cells is not None:
        cells = jnp.asarray(np.repeat(_pad(cells[fill], room), num_samples, axis=0))
    if known is not None:
        known = jnp.asarray(np.repeat(known[fill], num_samples, axis=0), jnp.int32)
    cells, known = (x if x is None else split_rows(x) for x in (cells, known))
    return plan._replace(table=drafts.table, cells=cells, known=known)


def _make_plan(
    grammar: Grammar,
    config: SamplingConfig,
    limits: _Lengths,
    forced: Int32[np.ndarray, "batch room"] | None,
    keys: Key[Array, " samples"],
    num_samples: int,
) -> Plan:
    """The plan of all samples: each has the limits and forced tokens of its row."""
    fixed = None if forced is None else np.repeat(forced, num_samples, axis=0)
    return Plan(
        grammar,
        split_rows(jnp.asarray(np.repeat(limits, num_samples), jnp.int32)),
        None if fixed is None else split_rows(jnp.asarray(fixed)),
        split_rows(keys),
        LogitSettings.of(config),
    )


def _make_keys(
    key: Key[Array, ""], seeds: np.ndarray, num_samples: int
) -> Key[Array, " samples"]:
    """One key per sample, from the seed of its row and its number in the row."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, 0))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, seeds)
    numbers = jnp.tile(jnp.arange(num_samples), len(keys))
    return fold(jnp.repeat(keys, num_samples), numbers)


def _arrange(prompts: list[_Stream], num_samples: int, max_length: int) -> Rows:
    """Prompts -> device rows [prompt, stream], with a shared prefix where it saves time."""
    main = prompts[0]
    num_rows = len(main.lengths)
    longest = int(main.prefix_lengths.max())
    start = main.tokens[:, :longest]
    same = bool((main.prefix_lengths == longest).all() and (start == start[:1]).all())
    readers = len(prompts) * num_samples * (num_rows if same else 1)
    is_shared = longest > 1 and main.prefix_lengths.min() > 0 and readers > 1
    skipped = [s.prefix_lengths if is_shared else 0 * s.prefix_lengths for s in prompts]
    # [stream][row] -> rows in the order [row, stream]
    own = [
        stream.tokens[i, skip[i] : stream.lengths[i]]
        for i in range(num_rows)
        for stream, skip in zip(prompts, skipped, strict=True)
    ]
    lengths = np.array([len(row) for row in own], np.int32)
    if is_shared:
        width = round_up(int(lengths.max()), OWN_BUCKET)
    else:
        width = round_up(max(s.tokens.shape[1] for s in prompts), PROMPT_BUCKET)
    tokens = np.zeros((len(own), min(width, max_length)), np.int32)
    for row, values in zip(tokens, own, strict=True):
        row[: len(values)] = values
    if not is_shared:
        return Rows(jnp.asarray(tokens), jnp.asarray(lengths))
    for stream in prompts[1:]:
        for i, seen in enumerate(stream.prefix_lengths):
            if (stream.tokens[i, :seen] != main.tokens[i, :seen]).any():
                raise ValueError(
                    f"the unconditional prompt {i} does not begin with the "
                    f"{seen} tokens of its prefix"
                )
    chosen = slice(0, 1) if same else slice(None)
    width = min(round_up(longest, PROMPT_BUCKET), max_length)
    prefix = np.zeros((len(start[chosen]), width), np.int32)
    prefix[:, :longest] = start[chosen]
    visible = np.stack([s.prefix_lengths for s in prompts], axis=1).reshape(-1)
    return Rows(
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(prefix),
        jnp.asarray(main.prefix_lengths[chosen]),
        jnp.asarray(visible, jnp.int32),
    )
