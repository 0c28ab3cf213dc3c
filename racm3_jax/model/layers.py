"""The parts of a block: norms, projections, feed-forward, rotary positions.

Every parameter has logical axis names; `sharding` maps them to the mesh. Activations
between sublayers are float32; the matmuls inside run in the compute dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from racm3_jax.model.attention import attend_to_cache, attention
from racm3_jax.model.cache import LayerCache
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.contract import contract, multiply_panels, panel_shape
from racm3_jax.model.quantization import SCALE

PRODUCT = "product"

_Hidden = Float[Array, "batch length d_model"]
# Cosines and sines of the rotary angles, or None with learned positions.
Rotary = (
    tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]] | None
)


def partitioned(initializer: Any, *axes: str) -> Any:
    """An initializer that sets the logical axis names of its parameter."""
    return nn.with_logical_partitioning(initializer, axes)


def as_product(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Marks a matmul's result, in the dtype in which `remat="dots"` saves it.

    By name, because remat policies do not see inside the custom gradient of `contract`.
    """
    return checkpoint_name(x, PRODUCT)


def activate(
    function: Callable[[Array], Array], x: Float[Array, " *shape"]
) -> Float[Array, " *shape"]:
    """An elementwise function in float32, whose gradient keeps only `x`.

    In bfloat16, XLA's CPU back end rounds after every operation: exact GELU and its
    gradient took four times as long (2,432 x 768 on one core: 44 and 4 ms).
    """

    def compute(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    return jax.checkpoint(compute)(x) if x.dtype != jnp.float32 else function(x)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (no mean, no bias), over the last axis; float32.

    Attributes:
      kind: "layernorm" or "rmsnorm".
      epsilon: added to the variance.
      axes: logical names of the normalised axis and of preceding axes with their
        own parameters.
    """

    kind: str
    epsilon: float
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
        """Normalises `x` to unit scale, then applies the learned one."""
        shape = x.shape[x.ndim - len(self.axes) :]
        scale = self.param(
            "scale", partitioned(nn.initializers.ones, *self.axes), shape
        )
        x = x.astype(jnp.float32)
        if self.kind == "rmsnorm":
            variance = jnp.mean(x * x, axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(variance + self.epsilon) * scale
        bias = self.param("bias", partitioned(nn.initializers.zeros, *self.axes), shape)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


class Linear(nn.Module):
    """A linear layer with a kernel of any rank, plus a bias.

    Initial weights are normal with variance `gain**2 / fan_in`, biases zero.

    Attributes:
      spec: the einsum of input and kernel.
      shape: of the kernel.
      num_inputs: leading axes of the kernel that are summed over.
      axes: logical names of the kernel's axes.
      use_bias: whether there is a bias over the output axes.
      dtype: of the product.
      gain: of the initial weights.
      outputs_first: the kernel is in panels, see `ModelConfig`.
    """

    spec: str
    shape: tuple[int, ...]
    num_inputs: int
    axes: tuple[str, ...]
    use_bias: bool
    dtype: str
    gain: float = 1.0
    outputs_first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, " *in"]) -> Float[Array, " *out"]:
        """Returns float32, whatever the compute dtype."""
        fan_in = 1
        for size in self.shape[: self.num_inputs]:
            fan_in *= size
        normal = nn.initializers.normal(self.gain * fan_in**-0.5)
        shape, axes = self.shape, self.axes
        outputs = shape[self.num_inputs :]
        if self.outputs_first:
            shape = panel_shape(shape, self.num_inputs)
            axes = (axes[self.num_inputs], axes[0], "panel")
        kernel = self.param("kernel", partitioned(normal, *axes), shape)
        steps = self.has_variable("params", SCALE)  # 8 bits, for decoding only
        kernel = kernel.astype(self.dtype) if steps else kernel
        if self.outputs_first:
            rows = x.shape[: x.ndim - self.num_inputs]
            y = multiply_panels(x.reshape(*rows, -1), kernel, self.dtype)
            y = y.reshape(*rows, *outputs)
        else:
            y = contract(self.spec, x, kernel, self.dtype)
        if steps:
            y = y * self.get_variable("params", SCALE).reshape(outputs)
        if not self.use_bias:
            return y
        zeros = partitioned(nn.initializers.zeros, *self.axes[self.num_inputs :])
        return y + self.param("bias", zeros, outputs)


def make_rotary(config: ModelConfig, positions: Int[Array, "batch length"]) -> Rotary:
    """Angles of RoPE (arXiv 2104.09864), or None without RoPE."""
    if config.position != "rope":
        return None
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotary: Rotary
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs `(x[i], x[i + head_dim/2])`: the half-split order."""
    if rotary is None:
        return x
    cos, sin = (angle[:, :, None, :] for angle in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class Attention(nn.Module):
    """Self-attention with its projections; over a row, or over a cache."""

    config: ModelConfig

    def setup(self) -> None:
        """Defines the projections and, for Chameleon, the norms of q and k."""
        c = self.config

        def project(heads: int, axis: str) -> Linear:
            return Linear(
                "bld,dhk->blhk",
                (c.d_model, heads, c.head_dim),
                1,
                ("embed", axis, "head_dim"),
                c.use_bias,
                c.dtype,
                outputs_first=c.outputs_first,
            )

        self.query = project(c.num_heads, "heads")
        self.key = project(c.kv_heads, "kv_heads")
        self.value = project(c.kv_heads, "kv_heads")
        self.out = Linear(
            "blhk,hkd->bld",
            (c.num_heads, c.head_dim, c.d_model),
            2,
            ("heads", "head_dim", "embed"),
            c.use_bias,
            c.dtype,
            gain=(2 * c.num_layers) ** -0.5,
            outputs_first=c.outputs_first,
        )
        if c.qk_norm:
            # One scale per head, as in the public weights: LayerNorm, not RMSNorm.
            self.query_norm = Norm("layernorm", c.norm_epsilon, ("heads", "head_dim"))
            self.key_norm = Norm("layernorm", c.norm_epsilon, ("kv_heads", "head_dim"))

    def _project(self, x: _Hidden, rotary: Rotary) -> tuple[Array, Array, Array]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm:  # its gradient needs its inputs
            q, k = self.query_norm(as_product(q)), self.key_norm(as_product(k))
        dtype = self.config.dtype
        q, k = rotate(q, rotary).astype(dtype), rotate(k, rotary).astype(dtype)
        if not self.config.qk_norm:
            q, k = as_product(q), as_product(k)
        return q, k, as_product(v.astype(dtype))

    def __call__(
        self, x: _Hidden, rotary: Rotary, segment_ids: Int[Array, "batch length"]
    ) -> tuple[_Hidden, LayerCache]:
        """Attends within the segments of a row; also returns its keys and values."""
        q, k, v = self._project(x, rotary)
        c = self.config
        y = attention(q, k, v, segment_ids, c.attention, c.max_segments)
        y = as_product(self.out(y))
        return y, LayerCache.of(k, v)

    def extend(
        self,
        x: _Hidden,
        rotary: Rotary,
        cache: LayerCache,
        positions: Int[Array, "batch length"],
        write_at: Int[Array, "batch length"],
        prefix: tuple[LayerCache, Int[Array, " batch"]] | None = None,
    ) -> tuple[_Hidden, LayerCache]:
        """Writes the new keys and values, then attends to the cache up to each token.

        `positions` count a row's own tokens; `prefix` is the shared prefix, and how
        much of it each row attends to.
        """
        q, k, v = self._project(x, rotary)
        cache = cache.write(LayerCache.of(k, v), write_at)
        shared = None if prefix is None else (prefix[0].k, prefix[0].v, prefix[1])
        attended = attend_to_cache(q, cache.k, cache.v, positions, shared)
        return self.out(attended), cache


class FeedForward(nn.Module):
    """Two matrices around ReLU or GELU, or SwiGLU (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: _Hidden) -> _Hidden:
        """Maps every token independently."""
        c = self.config

        def widen(name: str) -> Array:
            shape, axes = (c.d_model, c.d_ff), ("embed", "mlp")
            linear = Linear(
                "bld,df->blf",
                shape,
                1,
                axes,
                c.use_bias,
                c.dtype,
                outputs_first=c.outputs_first,
                name=name,
            )
            # Saved for the backward pass: half the memory in the compute dtype.
            return as_product(linear(x).astype(c.dtype))

        if c.activation == "swiglu":
            hidden = activate(nn.silu, widen("gate")) * widen("up")
        elif c.activation == "gelu":
            hidden = activate(
                functools.partial(nn.gelu, approximate=False), widen("up")
            )
        else:
            hidden = nn.relu(widen("up"))
        return Linear(
            "blf,fd->bld",
            (c.d_ff, c.d_model),
            1,
            ("mlp", "embed"),
            c.use_bias,
            c.dtype,
            gain=(2 * c.num_layers) ** -0.5,
            outputs_first=c.outputs_first,
            name="down",
        )(hidden)


class Block(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each added to the stream."""

    config: ModelConfig

    def setup(self) -> None:
        """Defines both sublayers and their norms."""
        c = self.config
        self.attention_norm = Norm(c.norm, c.norm_epsilon)
        self.attention = Attention(c)
        self.feed_forward_norm = Norm(c.norm, c.norm_epsilon)
        self.feed_forward = FeedForward(c)
        self.dropout = nn.Dropout(c.dropout)

    def _finish(self, x: _Hidden, update: _Hidden) -> _Hidden:
        x = x + self._drop(update)
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: _Hidden) -> _Hidden:
        return self.dropout(x, deterministic=not self.has_rng("dropout"))

    def __call__(
        self, x: _Hidden, rotary: Rotary, segment_ids: Int[Array, "batch length"]
    ) -> tuple[_Hidden, None]:
        """A whole row, for training; returns a pair for `nn.scan`."""
        return self.prefill(x, rotary, segment_ids)[0], None

    def prefill(
        self, x: _Hidden, rotary: Rotary, segment_ids: Int[Array, "batch length"]
    ) -> tuple[_Hidden, LayerCache]:
        """A whole row, with keys and values for decoding."""
        update, cache = self.attention(self.attention_norm(x), rotary, segment_ids)
        return self._finish(x, update), cache

    def extend(
        self,
        x: _Hidden,
        rotary: Rotary,
        cache: LayerCache,
        positions: Int[Array, "batch length"],
        write_at: Int[Array, "batch length"],
        prefix: tuple[LayerCache, Int[Array, " batch"]] | None = None,
    ) -> tuple[_Hidden, LayerCache]:
        """New tokens of a row whose earlier ones are cached."""
        update, cache = self.attention.extend(
            self.attention_norm(x), rotary, cache, positions, write_at, prefix
        )
        return self._finish(x, update), cache
