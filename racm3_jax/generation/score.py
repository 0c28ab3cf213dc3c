"""How likely given continuations are: one forward pass, nothing drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from racm3_jax.generation.placement import count_copies, split_rows, where_params_lie
from racm3_jax.generation.sample import PROMPT_BUCKET, round_up
from racm3_jax.model.transformer import compute_logits

_CONTINUATION_BUCKET = 8


@where_params_lie
def compute_log_likelihoods(
    model: Any,
    params: Any,
    prompts: Sequence[Int32[np.ndarray, " prompt"]],
    continuations: Sequence[Int32[np.ndarray, " continuation"]],
    *,
    max_rows: int = 64,
) -> Float32[np.ndarray, " rows"]:
    """Sum of the log-probabilities of each continuation's ids, in nats.

    Args:
      model: a `Transformer`.
      params: its parameters.
      prompts: one a row, not empty.
      continuations: what follows each, not empty.
      max_rows: rows read at once by each copy of the model.

    Raises:
      ValueError: a row that is longer than the model reads.
    """
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    ends = starts + [len(c) for c in continuations]
    max_length = model.config.max_length
    if ends.max() > max_length:
        raise ValueError(
            f"a prompt with what follows it is {ends.max()} ids, more than the model's "
            f"max_length {max_length}: give fewer documents or shorter ones"
        )
    width = round_up(int((ends - starts).max()), _CONTINUATION_BUCKET)
    length = min(round_up(int(ends.max()), PROMPT_BUCKET), max_length)
    copies = count_copies()
    rows = min(max_rows * copies, 1 << (len(starts) - 1).bit_length())
    rows = round_up(rows, copies)
    tokens = np.zeros((round_up(len(starts), rows), length), np.int32)
    for row, prompt, continuation in zip(tokens, prompts, continuations, strict=False):
        row[: len(prompt) + len(continuation)] = [*prompt, *continuation]
    fill = [(0, len(tokens) - len(starts))]
    starts, ends = np.pad(starts, fill, mode="edge"), np.pad(ends, fill, mode="edge")
    columns = (tokens, starts, ends)
    parts = [
        np.asarray(_read(model, width, params, *split_rows([x[part] for x in columns])))
        for part in (slice(i, i + rows) for i in range(0, len(tokens), rows))
    ]
    return np.concatenate(parts)[: len(prompts)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: Any,
    width: int,
    params: Any,
    tokens: Int32[Array, "rows length"],
    starts: Int[Array, " rows"],
    ends: Int[Array, " rows"],
) -> Float32[Array, " rows"]:
    """Logits are computed for the last `width` places only."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (index < ends[:, None]).astype(jnp.int32)
    hidden = model.apply({"params": params}, tokens, index, segment_ids)
    places = starts[:, None] + jnp.arange(width)
    before = jnp.minimum(places - 1, tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    log_probs = jax.nn.log_softmax(compute_logits(params, model.config, hidden), -1)
    targets = jnp.take_along_axis(
        tokens, jnp.minimum(places, tokens.shape[1] - 1), axis=1
    )
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return jnp.where(places < ends[:, None], chosen, 0.0).sum(-1)
