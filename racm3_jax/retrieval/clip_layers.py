"""The layers of both CLIP towers: pre-LayerNorm Transformer layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from racm3_jax.model.contract import contract
from racm3_jax.model.layers import activate
from racm3_jax.sharding import current_platform

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

# From this length on, a CPU computes attention faster in a loop over heads.
_HEAD_BY_HEAD_LENGTH = 128
_Heads = Float[Array, "batch n heads head_dim"]
_MayAttend = Bool[Array, "n length"] | None


class Layer(nn.Module):
    """Pre-LayerNorm attention and MLP, initialised as in OpenAI's code."""

    num_heads: int
    num_layers: int
    activation: str
    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        may_attend: _MayAttend = None,
        num_read: int | None = None,
    ) -> Float[Array, "batch read width"]:
        """Returns the first `num_read` positions; None returns all.

        All positions are attended to in any case: unused positions only skip their
        queries and MLP, five sixths of the layer.
        """
        width = x.shape[-1]
        out_std = width**-0.5 * (2 * self.num_layers) ** -0.5
        mixed = Attention(self.num_heads, out_std, self.dtype, name="attention")(
            norm("norm_1")(x), may_attend, num_read
        )
        x = _computed_once(x[:, :num_read] + mixed)
        mlp = MLP(self.activation, out_std, self.dtype, name="mlp")
        return _computed_once(x + mlp(norm("norm_2")(x)))


def _computed_once(
    x: Float[Array, "batch length width"],
) -> Float[Array, "batch length width"]:
    """A sum that the compiler must not split again.

    XLA for TPUs would add up the outputs of all earlier layers wherever the sum is
    used, and keep them until the end: 60 MB per image for ViT-L/14.
    """
    return x if current_platform() == "cpu" else jax.lax.optimization_barrier(x)


class Attention(nn.Module):
    """Plain multi-head attention; the rows are short (50 to 577 patches, 77 tokens)."""

    num_heads: int
    out_std: float
    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        may_attend: _MayAttend,
        num_read: int | None = None,
    ) -> Float[Array, "batch read width"]:
        batch, _, width = x.shape
        head_dim = width // self.num_heads

        def project(name: str, x: Float[Array, "batch n width"]) -> _Heads:
            std = width**-0.5
            y = dense(width, ("embed", "heads"), std, name, self.dtype)(x)
            return y.reshape(batch, -1, self.num_heads, head_dim)

        query = project("query", x[:, :num_read]) * head_dim**-0.5
        key, value = project("key", x), project("value", x)
        if may_attend is not None:
            may_attend = may_attend[:num_read]
        if current_platform() == "cpu" and query.shape[1] >= _HEAD_BY_HEAD_LENGTH:
            mixed = attend_head_by_head(query, key, value, may_attend)
        else:
            mixed = attend(query, key, value, may_attend)
        axes = ("heads", "embed")
        out = dense(width, axes, self.out_std, "out", self.dtype)
        return out(mixed.reshape(batch, -1, width))


def attend(query: _Heads, key: _Heads, value: _Heads, may_attend: _MayAttend) -> _Heads:
    """Softmax attention, all heads at once; queries are already scaled."""
    dtype = str(value.dtype)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = contract("bhqd,bhkd->bhqk", query, key, dtype)
    if may_attend is not None:
        scores = jnp.where(may_attend, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = contract("bhqk,bhkd->bhqd", weights, value, dtype)
    return mixed.astype(dtype).swapaxes(1, 2)


def attend_head_by_head(
    query: _Heads, key: _Heads, value: _Heads, may_attend: _MayAttend
) -> _Heads:
    """`attend` in a loop over heads, whose scores then fit in a CPU's cache.

    With ViT-L/14's 257 patches it takes a third of the time of `attend`.
    """
    batch, _, heads, head_dim = query.shape

    def one_head(parts: tuple[Array, Array, Array]) -> Array:
        q, k, v = parts
        scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32)
        if may_attend is not None:
            scores = jnp.where(may_attend, scores, jnp.finfo(scores.dtype).min)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    def split(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(batch * heads, -1, head_dim)

    mixed = jax.lax.map(one_head, (split(query), split(key), split(value)))
    return mixed.reshape(batch, heads, -1, head_dim).swapaxes(1, 2)


class MLP(nn.Module):
    """MLP with a hidden width of 4x."""

    activation: str
    out_std: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        width = x.shape[-1]
        std, dtype = (2 * width) ** -0.5, self.dtype
        y = dense(4 * width, ("embed", "mlp"), std, "up", dtype)(x)
        y = activate(ACTIVATIONS[self.activation], y)
        return dense(width, ("mlp", "embed"), self.out_std, "down", dtype)(y)


def normal(std: float, names: tuple[str | None, ...]) -> Any:
    """An initialiser that also sets the parameter's logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), names)


class Dense(nn.Module):
    """A dense layer with logical axes of its kernel; the bias has the last one.

    It computes in `dtype` and sums in float32; norm outputs and residual sums are
    float32.
    """

    features: int
    names: tuple[str | None, str | None]
    std: float
    dtype: str
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows inputs"]
    ) -> Float[Array, "*rows outputs"]:
        kernel = self.param(
            "kernel", normal(self.std, self.names), (x.shape[-1], self.features)
        )
        if self.dtype == "float32" or x.ndim < 3:
            # XLA on CPU: kernel gradients of matrices take 0.4 to 0.8 of the time.
            rows = x.reshape(-1, x.shape[-1])
            y = contract("ri,io->ro", rows, kernel, self.dtype)
            y = y.reshape(*x.shape[:-1], self.features)
        else:  # in bfloat16, those of batches take 0.2 to 0.4
            y = contract("bli,io->blo", x, kernel, self.dtype)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[1:])
            bias: Any = self.param("bias", zeros, (self.features,))
            y = y + bias
        return y.astype(self.dtype)


def dense(
    features: int,
    names: tuple[str | None, str | None],
    std: float,
    name: str,
    dtype: str,
    use_bias: bool = True,
) -> Dense:
    """`Dense` with a name."""
    return Dense(features, names, std, dtype, use_bias, name=name)


def norm(name: str) -> nn.LayerNorm:
    """CLIP's LayerNorm."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,  # the fast form is less precise; parity needs this one
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )
