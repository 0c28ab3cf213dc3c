"""Attention with vendor kernels: cuDNN on NVIDIA GPUs, Splash on TPUs.

Both take scaled queries, `[batch, length, heads, head_dim]`, and keys and values that
may have fewer heads. Neither materialises the scores of a whole row.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from racm3_jax.sharding import BATCH_AXES, current_device_kind, current_platform

_Q = Float[Array, "batch length heads head_dim"]
_KV = Float[Array, "batch length kv_heads head_dim"]
_Segments = Int[Array, "batch length"]

# Splash's tiles: rows are padded to a multiple of the smaller one.
_SPLASH_LEAST, _SPLASH_MOST = 128, 512
_LANES = 128


# Names of NVIDIA GPUs with compute capability >= 9, for absent GPUs.
_PACKED_CUDNN_GPUS = ("h20", "h100", "h200", "h800", "gh200", "b100", "b200", "b300")


def has_packed_cudnn() -> bool:
    """Whether the current mesh's GPUs support cuDNN's packed attention (Hopper on).

    False, with a warning, if only the software does not support it.
    """
    if current_platform() != "gpu":
        return False
    kind = current_device_kind()
    local = [device for device in jax.local_devices() if device.device_kind == kind]
    if local and hasattr(local[0], "compute_capability"):
        is_hopper = float(local[0].compute_capability) >= 9.0
    else:
        is_hopper = any(name in kind.lower() for name in _PACKED_CUDNN_GPUS)
    if not is_hopper:
        return False
    try:
        cudnn = _import_packed_cudnn()
        if local:
            cudnn.check_cudnn_version()
    except (ValueError, RuntimeError) as error:
        logging.log_first_n(
            logging.WARNING,
            "attention is computed by the slower 'plain' implementation: %s",
            1,
            error,
        )
        return False
    return True


def _import_packed_cudnn() -> Any:
    """JAX's private module for cuDNN's packed attention.

    Raises:
      ValueError: this version of JAX has no such module, or another one.
    """
    try:
        cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        parameters = inspect.signature(cudnn.dot_product_attention).parameters
        known = {"q_offsets", "kv_offsets", "mask_type"} <= set(parameters)
        known = known and hasattr(cudnn.MaskType, "PADDING_CAUSAL")
    except (ImportError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"jax {jax.__version__} has no packed cuDNN attention as supported here "
            'it (that of jax 0.9 and 0.10): set config.model.attention="plain", or '
            "install such a jax"
        )
    return cudnn


def find_segments(
    segment_ids: _Segments, max_segments: int
) -> tuple[
    Int[Array, "batch slots"], Int[Array, "batch max_segments"], Int[Array, " batch"]
]:
    """Start and length of each segment, including padding.

    ```
    segment_ids  1 1 1 2 2 0      max_segments 4
    starts       0 3 5 -1 -1      one slot more than segments, as cuDNN requires
    lengths      3 2 1 -1
    counts       3                if above max_segments, some are missing
    ```
    """
    batch, length = segment_ids.shape
    index = jnp.arange(length, dtype=jnp.int32)
    is_start = jnp.concatenate(
        [jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    # Starts first, in order; other positions sort after them.
    ordered = jnp.sort(jnp.where(is_start, index, length), axis=1)
    slots = max_segments + 1
    ordered = jnp.pad(
        ordered[:, :slots],
        ((0, 0), (0, max(0, slots - length))),
        constant_values=length,
    )
    lengths = ordered[:, 1:] - ordered[:, :-1]
    starts = jnp.where(ordered < length, ordered, -1)
    starts = starts.at[:, -1].set(-1)
    lengths = jnp.where(starts[:, :-1] >= 0, lengths, -1)
    return starts, lengths, is_start.sum(axis=1)


def attend_cudnn(
    q: _Q, k: _KV, v: _KV, segment_ids: _Segments, max_segments: int
) -> _Q:
    """cuDNN's fused attention over packed rows; half precision, Hopper or newer.

    The public function of jax has no segments; this is the internal one, where every
    segment is a separate sequence. A row with more than `max_segments` segments is not
    supported: its output is NaN, which ends a training instead of letting examples
    attend to each other.

    Args:
      q: queries, scaled.
      k: keys.
      v: values.
      segment_ids: numbers the examples of each row; a segment is contiguous.
      max_segments: maximum per row, padding counted as one.

    Raises:
      ValueError: this version of JAX has no such function.
    """
    cudnn = _import_packed_cudnn()
    group = q.shape[2] // k.shape[2]
    if group > 1:  # the offsets of keys are counted in heads of the queries
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    starts, lengths, counts = find_segments(segment_ids, max_segments)
    out: Any = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=1.0,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )
    fits = (counts <= max_segments)[:, None, None, None]
    return jnp.where(fits, out, jnp.asarray(jnp.nan, out.dtype))


def _make_splash(heads: int, length: int) -> Callable[..., Any]:
    """The kernel of one row. Contains arrays of the current trace: never cache it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(b for b in (_SPLASH_MOST, 256, _SPLASH_LEAST) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=current_platform() != "tpu",
    )


def attend_splash(q: _Q, k: _KV, v: _KV, segment_ids: _Segments) -> _Q:
    """Pallas Splash attention: skips the tiles above the diagonal; any dtype.

    With a current mesh, rows and heads are split over it, as the compiler cannot split
    a kernel. On other platforms than TPUs the kernel is interpreted, which is slow: for
    tests.

    Args:
      q: queries, scaled.
      k: keys.
      v: values.
      segment_ids: numbers the examples of each row; a segment is contiguous.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return _attend_splash(q, k, v, segment_ids)
    tensor = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    batch = BATCH_AXES if len(q) % shards == 0 else None  # one prefix for all prompts
    rows = PartitionSpec(batch, None, tensor, None)
    return jax.shard_map(
        _attend_splash,
        mesh=mesh,
        in_specs=(rows, rows, rows, PartitionSpec(batch)),
        out_specs=rows,
        check_vma=False,
    )(q, k, v, segment_ids)


def _attend_splash(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, head_dim = q.shape[1], q.shape[3]
    rows = ((0, 0), (0, -length % _SPLASH_LEAST))
    lanes = (0, -head_dim % _LANES)
    padded = [jnp.pad(x, (*rows, (0, 0), lanes)).swapaxes(1, 2) for x in (q, k, v)]
    # The padding of rows is not a segment.
    ids = jnp.pad(segment_ids, rows, constant_values=-1)
    kernel = _make_splash(q.shape[2], padded[0].shape[2])
    out = jax.vmap(kernel)(*padded, splash.SegmentIds(q=ids, kv=ids))
    return out.swapaxes(1, 2)[:, :length, :, :head_dim]
