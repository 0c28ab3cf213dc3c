"""Causal self-attention within segments: one function, several implementations.

A token attends to itself and to earlier tokens of its own segment (packed example):

    segment_ids   1 1 1 2 2 0          keys
                              q 1  x . . . . .
                              u 1  x x . . . .
                              e 1  x x x . . .
                              r 2  . . . x . .
                              i 2  . . . x x .
                              e 0  . . . . . x

Padding (segment 0) attends to padding, so that no softmax is empty; its output is not
used. All implementations agree, and segments never affect each other: a masked key has
exactly weight 0 and gradient 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from racm3_jax.model import attention_kernels
from racm3_jax.model.config import AttentionKind
from racm3_jax.model.contract import contract
from racm3_jax.sharding import current_platform

# Finite, so that a fully masked row would still be a softmax without NaN.
_MASKED = -1e30
# Maximum queries per block; fewer blocks compile faster.
_BLOCK_QUERIES = 72
_BLOCK_QUERIES_HALF = 136
# Maximum scores of a block, over rows and heads: 128 MB in float32.
_BLOCK_SCORES = 2**25

_Q = Float[Array, "batch length heads head_dim"]
_KV = Float[Array, "batch length kv_heads head_dim"]
_Segments = Int[Array, "batch length"]
_Keys = Float[Array, "rows kv_heads head_dim tokens"]
_Values = Float[Array, "rows kv_heads tokens head_dim"]

IMPLEMENTATIONS = ("plain", "blocked", "cudnn", "splash")


def choose_implementation(dtype: str = "bfloat16") -> str:
    """Resolves "auto" for the current platform, see `sharding.current_platform`.

    - "blocked" on one CPU device, where it takes half the time of "plain". It may loop
      over rows of the batch, which would undo a sharding of that axis: with a mesh of
      several CPU devices (`jax.set_mesh`) it is "plain". Without a mesh every process
      computes independently, so that several give the same result as one.
    - "cudnn" on NVIDIA GPUs from Hopper on, in half precision; "plain" on others.
    - "splash" on TPUs.

    Args:
      dtype: of the matmuls.
    """
    backend = current_platform()
    if backend == "cpu":
        mesh = jax.sharding.get_abstract_mesh()
        return "blocked" if mesh.empty or mesh.size == 1 else "plain"
    if backend == "tpu":
        return "splash"
    half = dtype in ("bfloat16", "float16")
    return "cudnn" if half and attention_kernels.has_packed_cudnn() else "plain"


def attention(
    q: _Q,
    k: _KV,
    v: _KV,
    segment_ids: _Segments,
    implementation: AttentionKind = "auto",
    max_segments: int = 16,
) -> _Q:
    """Softmax attention, causal and within segments, scaled by 1/sqrt(head_dim).

    Query head `h` uses key head `h // (heads / kv_heads)`. The matmuls run in the
    dtype of `q`; softmax and sums in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      segment_ids: numbers the examples of each row; a segment is contiguous.
      implementation: one of `IMPLEMENTATIONS`, or "auto" for this machine's best.
      max_segments: maximum per row, padding counted as one; only "cudnn" needs the
        bound.

    Returns:
      The attended values, in the dtype of `q`.

    Raises:
      ValueError: unknown implementation.
    """
    chosen = implementation
    if implementation == "auto":
        chosen = choose_implementation(str(q.dtype))
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} does not exist; use 'auto' "
            "or one of " + ", ".join(map(repr, IMPLEMENTATIONS))
        )
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    scaled = q * head_dim**-0.5
    if chosen == "cudnn":
        return attention_kernels.attend_cudnn(scaled, k, v, segment_ids, max_segments)
    if chosen == "splash":
        return attention_kernels.attend_splash(scaled, k, v, segment_ids)
    grouped = scaled.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    attend = _plain if chosen == "plain" else _blocked
    return attend(grouped, k, v, segment_ids).reshape(q.shape).astype(q.dtype)


def attend_to_cache(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch kv_heads head_dim max_length"],
    v: Float[Array, "batch kv_heads max_length head_dim"],
    positions: Int[Array, "batch length"],
    prefix: tuple[_Keys, _Values, Int[Array, " batch"]] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention of new tokens to a cache that already contains their keys and values.

    A prefix shared by several rows is read once for all of them: prefix and row cache
    have separate softmax sums, which are merged exactly (as in FlashAttention).

    Args:
      q: queries of the new tokens.
      k: cached keys of each row, in the layout of the product with queries.
      v: cached values.
      positions: index of each new token in its row; it attends to keys 0..position.
      prefix: shared keys and values (the rows of a prefix are adjacent), and the number
        of prefix tokens that each row attends to.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    dtype = str(q.dtype)
    # Query heads that share keys are rows of one matmul: [row, kv_head, query,
    # head_dim].
    rows = (q * head_dim**-0.5).reshape(batch, length, kv_heads, group, head_dim)
    rows = rows.swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    last = jnp.repeat(positions, group, axis=1)
    sums = _read(rows, k, v, last[:, None, :, None] + 1, dtype)
    if prefix is not None:
        shared_k, shared_v, visible = prefix
        shape = (len(shared_k), batch // len(shared_k), kv_heads, length * group)
        shared = rows.reshape(*shape, head_dim).swapaxes(1, 2)
        shared = shared.reshape(len(shared_k), kv_heads, -1, head_dim)
        visible = jnp.repeat(visible.reshape(shape[:2]), length * group, axis=1)
        found = _read(shared, shared_k, shared_v, visible[:, None, :, None], dtype)
        shape = (shape[0], kv_heads, shape[1], shape[3], -1)
        found = (x.reshape(shape).swapaxes(1, 2) for x in found)
        sums = _merge(sums, [x.reshape(batch, kv_heads, *x.shape[3:]) for x in found])
    values, weight, _ = sums
    out = (values / weight).reshape(batch, kv_heads, length, group, head_dim)
    return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


def _read(
    q: Float[Array, "rows kv_heads queries head_dim"],
    k: _Keys,
    v: _Values,
    visible: Int[Array, "rows 1 queries 1"],
    dtype: str,
) -> tuple[Array, Array, Array]:
    """Weighted sums of values, sums of weights, and the maximum scores.

    The weights are exp(score - maximum score of the query).
    """
    scores = contract("bkqd,bkds->bkqs", q, k, dtype)
    scores = jnp.where(jnp.arange(k.shape[3]) < visible, scores, _MASKED)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    values = contract("bkqs,bksd->bkqd", weights, v, dtype)
    return values, weights.sum(axis=-1, keepdims=True), highest


def _merge(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
    """Merges two results of `_read` over different keys."""
    highest = jnp.maximum(one[2], other[2])
    scales = [jnp.exp(part[2] - highest) for part in (one, other)]
    sums = [one[i] * scales[0] + other[i] * scales[1] for i in range(2)]
    return [*sums, highest]


def _plain(q, k, v, segment_ids):
    """Plain attention over all pairs; the reference of the tests."""
    length = q.shape[1]
    dtype = str(q.dtype)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = same & np.tri(length, dtype=bool)
    scores = contract("bqkgd,bskd->bkgqs", q, k, dtype)
    weights = jax.nn.softmax(
        jnp.where(visible[:, None, None], scores, _MASKED), axis=-1
    )
    return contract("bkgqs,bskd->bqkgd", weights, v, dtype)


def _blocks(length: int, dtype: str) -> list[tuple[int, int]]:
    """Ranges of queries, `[start, stop)`; block i needs the keys `[0, stop)`."""
    most = _BLOCK_QUERIES if dtype == "float32" else _BLOCK_QUERIES_HALF
    count = -(-length // most)
    size = -(-length // count)
    return [(i, min(i + size, length)) for i in range(0, length, size)]


def _visible(
    segments: Int[Array, " length"], start: int, stop: int
) -> Bool[Array, "queries keys"]:
    causal = np.arange(start, stop)[:, None] >= np.arange(stop)
    return (segments[start:stop, None] == segments[:stop]) & causal


@jax.custom_vjp
def _blocked(q, k, v, segment_ids):
    """Block of queries by block: skips the keys after each block.

    The backward pass recomputes the weights from their log-sum instead of storing them
    (as FlashAttention, arXiv 2205.14135).
    """
    return _blocked_fwd(q, k, v, segment_ids)[0]


def _blocked_fwd(q, k, v, segment_ids):
    heads_first = jnp.moveaxis(q, 1, 3), k.swapaxes(1, 2), v.swapaxes(1, 2)
    arrays = (*heads_first, segment_ids)
    out, log_sums = _map_rows(_forward_row, arrays)
    return jnp.moveaxis(out, 3, 1), (*arrays, out, log_sums)


def _blocked_bwd(residuals, cotangent):
    q, k, v = residuals[:3]
    cotangent = jnp.moveaxis(cotangent, 1, 3).astype(q.dtype)
    dq, dk, dv = _map_rows(_backward_row, (*residuals, cotangent))
    dq, dk, dv = (dx.astype(x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return jnp.moveaxis(dq, 3, 1), dk.swapaxes(1, 2), dv.swapaxes(1, 2), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _map_rows(function, arrays):
    """`function` over the rows of the batch, as many at once as `_BLOCK_SCORES` allows.

    A loop over single rows took up to twice the time.
    """
    batch, *heads, length, _ = arrays[0].shape
    scores = math.prod(heads) * _BLOCK_QUERIES_HALF * length
    rows = max(1, min(batch, _BLOCK_SCORES // scores))
    return jax.lax.map(lambda row: function(*row), arrays, batch_size=rows)


def _forward_row(q, k, v, segments):
    """One row of the batch, from q [kv_heads, group, length, head_dim].

    Returns:
      The attended values in the layout of q, and log-sums [kv_heads, group, length].
    """
    dot = functools.partial(contract, dtype=str(q.dtype))
    outs, log_sums = [], []
    for start, stop in _blocks(q.shape[2], str(q.dtype)):
        scores = dot("kgqd,ksd->kgqs", q[:, :, start:stop], k[:, :stop])
        scores = jnp.where(_visible(segments, start, stop), scores, _MASKED)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = dot("kgqs,ksd->kgqd", weights, v[:, :stop]) / total
        outs.append(out.astype(q.dtype))
        log_sums.append((highest + jnp.log(total))[..., 0])
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_sums, axis=2)


def _backward_row(q, k, v, segments, out, log_sums, cotangent):
    """Gradients of one row, in float32, with the weights recomputed block by block.

    Scores are transposed, [kv_heads, keys, group, queries], so that the sums over
    queries are matmuls without transposes.
    """
    dtype = str(q.dtype)
    dot = functools.partial(contract, dtype=dtype)
    dq = []
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    # Row sums of weights * d_weights, by the identity of FlashAttention, section 3.
    shift = (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(axis=-1)
    for start, stop in _blocks(q.shape[2], dtype):
        q_block, d_out = q[:, :, start:stop], cotangent[:, :, start:stop]
        of_queries = (slice(None), None, slice(None), slice(start, stop))
        scores = dot("ksd,kgqd->ksgq", k[:, :stop], q_block)
        weights = jnp.exp(scores - log_sums[of_queries])
        visible = _visible(segments, start, stop).T[:, None]
        weights = jnp.where(visible, weights, 0.0)
        d_weights = dot("ksd,kgqd->ksgq", v[:, :stop], d_out)
        d_scores = (weights * (d_weights - shift[of_queries])).astype(dtype)
        dq.append(dot("ksgq,ksd->kgqd", d_scores, k[:, :stop]))
        dk = dk.at[:, :stop].add(dot("ksgq,kgqd->ksd", d_scores, q_block))
        weights = weights.astype(dtype)
        dv = dv.at[:, :stop].add(dot("ksgq,kgqd->ksd", weights, d_out))
    return jnp.concatenate(dq, axis=2), dk, dv
