"""How likely a model finds given sequences: the one forward pass behind every score.

    context          scored            row
    <eod> r <eod>    t1 t2 <break> …   -> nats of t1, t2, …, given all before them

Rows are padded to a few lengths and a fixed number, so that few programs are compiled; a
row's figures do not depend on its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

from racm3_jax.generation.placement import mesh_of, split_rows
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import Transformer, head_weights
from racm3_jax.sharding import count_row_shards, current_mesh
from racm3_jax.training.loss import chunked_cross_entropy

if TYPE_CHECKING:
    from racm3_jax.generation.tasks import Generator

_LENGTH_BUCKET = 64


class Scored(NamedTuple):
    """The context, and what is scored.

    Attributes:
      context: vocabulary ids, at least one (a sequence begins with `<eod>`).
      targets: the ids whose likelihood is asked for.
    """

    context: Int32[np.ndarray, " context"]
    targets: Int32[np.ndarray, " targets"]


def score_tokens(
    generator: Generator, sequences: Sequence[Scored], *, num_rows: int = 8
) -> list[Float64[np.ndarray, " targets"]]:
    """The negative log-likelihood of every target, in nats.

    Args:
      generator: its model and parameters are used, its memory is not.
      sequences: in any order; each is scored alone.
      num_rows: sequences in one pass, on each copy of the model.

    Raises:
      ValueError: a context is empty, or a sequence is longer than the model reads.
    """
    config = generator.model.config
    mesh = mesh_of(generator.params)
    if mesh is not None:
        num_rows *= count_row_shards(mesh)
    lengths = [len(s.context) + len(s.targets) - 1 for s in sequences]
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if not len(sequence.context):
            raise ValueError(f"sequence {i} has no context: begin it with <eod>")
        if length > config.max_length:
            raise ValueError(
                f"sequence {i} has {length} positions, the model reads at most "
                f"{config.max_length}: retrieve fewer documents"
            )
    # Rows of like length together waste little; a row's result is the same anywhere.
    order = np.argsort(lengths, kind="stable")
    scores: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    for start in range(0, len(order), num_rows):
        members = order[start : start + num_rows]
        longest = max(lengths[i] for i in members)
        width = min(-(-longest // _LENGTH_BUCKET) * _LENGTH_BUCKET, config.max_length)
        inputs = np.zeros((num_rows, width), np.int32)
        targets, segments = np.zeros_like(inputs), np.zeros_like(inputs)
        for row, i in enumerate(members):
            tokens = np.concatenate([sequences[i].context, sequences[i].targets])
            inputs[row, : lengths[i]] = tokens[:-1]
            targets[row, : lengths[i]] = tokens[1:]
            segments[row, : lengths[i]] = 1
        with current_mesh(mesh):
            columns = split_rows((inputs, targets, segments))
            found = _negative_log_likelihood(config, generator.params, *columns)
        found = np.asarray(found)
        for row, i in enumerate(members):
            first = len(sequences[i].context) - 1
            scores[i] = found[row, first : lengths[i]].astype(np.float64)
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _negative_log_likelihood(
    config: ModelConfig,
    params: Any,
    inputs: Int[Array, "rows length"],
    targets: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
) -> Float[Array, "rows length"]:
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden = Transformer(config).apply({"params": params}, inputs, positions, segments)
    weights = segments.astype(jnp.float32)
    head = head_weights(params, config)
    return chunked_cross_entropy(jnp.asarray(hidden), head, targets, weights).nll
