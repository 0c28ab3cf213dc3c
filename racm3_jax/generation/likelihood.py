"""How likely a model finds given sequences: one forward pass, nothing is sampled.

    context          targets           row
    <eod> r <eod>    t1 t2 <break> …   -> nats of t1, t2, …, given all before them

Rows of similar length are read together, padded to a few lengths, so that few programs
are compiled. A row's likelihoods do not depend on the other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.placement import count_copies, mesh_of, split_rows
from racm3_jax.generation.sample import PROMPT_BUCKET, round_up
from racm3_jax.model.transformer import compute_logits
from racm3_jax.sharding import current_mesh

# Positions of a row whose logits exist at the same time.
_CHUNK_LENGTH = 64


class Scored(NamedTuple):
    """A sequence of which the last tokens are scored.

    Attributes:
      context: tokens, at least one (a sequence begins with `<eod>`).
      targets: the tokens after them, whose likelihood is computed.
    """

    context: Int32[np.ndarray, " context"]
    targets: Int32[np.ndarray, " targets"]


def compute_log_likelihoods(
    engine: Engine, sequences: Sequence[Scored], *, num_rows: int | None = None
) -> Float64[np.ndarray, " sequences"]:
    """Log-likelihood of all targets of each sequence, in nats; see `score_tokens`."""
    found = score_tokens(engine, sequences, num_rows=num_rows)
    return np.array([-nats.sum() for nats in found])


def score_tokens(
    engine: Engine, sequences: Sequence[Scored], *, num_rows: int | None = None
) -> list[Float64[np.ndarray, " targets"]]:
    """The negative log-likelihood of every target, in nats.

    Args:
      engine: its model and parameters are used, its memory is not.
      sequences: in any order; each is scored alone.
      num_rows: most sequences in one pass, on each copy of the model; `engine.max_rows`
        unless given.

    Raises:
      ValueError: a context is empty, or a sequence is longer than the model reads.
    """
    max_length = engine.model.config.max_length
    lengths = [len(s.context) + len(s.targets) - 1 for s in sequences]
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if not len(sequence.context):
            raise ValueError(f"sequence {i} has no context: begin it with <eod>")
        if length > max_length:
            raise ValueError(
                f"sequence {i} has {length} positions, more than the model's "
                f"max_length {max_length}: give fewer documents or shorter ones"
            )
    scores: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    with current_mesh(mesh_of(engine.params)):
        copies = count_copies()
        fitting = (num_rows or engine.max_rows) * copies
        rows = round_up(min(fitting, 1 << (len(lengths) - 1).bit_length()), copies)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            found = _read_rows(engine, [sequences[i] for i in members], rows)
            for i, nats in zip(members, found, strict=False):
                first = len(sequences[i].context) - 1
                scores[i] = nats[first : lengths[i]].astype(np.float64)
    return scores


def _read_rows(
    engine: Engine, sequences: Sequence[Scored], num_rows: int
) -> Float[np.ndarray, "rows length"]:
    """Nats at every position from the first target's to the last one's, in one pass.

    Positions after the end of a sequence, and rows without one, are padding.
    """
    first = min(len(s.context) - 1 for s in sequences)
    last = max(len(s.context) + len(s.targets) - 1 for s in sequences)
    width = min(round_up(last, PROMPT_BUCKET), engine.model.config.max_length)
    tokens = np.zeros((num_rows, width + 1), np.int32)
    lengths = np.zeros(num_rows, np.int32)
    for i, sequence in enumerate(sequences):
        joined = np.concatenate(sequence)
        tokens[i, : len(joined)], lengths[i] = joined, len(joined) - 1
    columns = split_rows((tokens, lengths))
    return np.asarray(_read(engine.model, engine.params, *columns, first, last))


@functools.partial(jax.jit, static_argnums=0)
def _read(
    model: Any,
    params: Any,
    tokens: Int[Array, "rows longer"],
    lengths: Int[Array, " rows"],
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> Float[Array, "rows length"]:
    """Nats at the positions `first` to `last`, chunk by chunk."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = model.apply({"params": params}, inputs, positions, segment_ids)
    chunk = min(_CHUNK_LENGTH, inputs.shape[1])

    def score(i: Array, nats: Array) -> Array:
        def cut(x: Array) -> Array:
            # The last chunk may begin earlier, so that it does not end after the row.
            return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)

        logits = compute_logits(params, model.config, cut(hidden))
        chosen = jnp.take_along_axis(logits, cut(targets)[..., None], axis=-1)[..., 0]
        found = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jax.lax.dynamic_update_slice_in_dim(nats, found, i * chunk, axis=1)

    nothing = jnp.zeros(inputs.shape, jnp.float32)
    return jax.lax.fori_loop(first // chunk, -(-last // chunk), score, nothing)
