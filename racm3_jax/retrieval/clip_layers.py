"""What both towers of CLIP are made of: pre-LayerNorm Transformer layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Layer(nn.Module):
    """Pre-LayerNorm attention and MLP; weights start as in OpenAI's code."""

    num_heads: int
    num_layers: int
    activation: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        may_attend: Bool[Array, "length length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        width = x.shape[-1]
        out_std = width**-0.5 * (2 * self.num_layers) ** -0.5
        x = x + Attention(self.num_heads, out_std, name="attention")(
            norm("norm_1")(x), may_attend
        )
        return x + MLP(self.activation, out_std, name="mlp")(norm("norm_2")(x))


class Attention(nn.Module):
    """Plain multi-head attention; the rows are short (65 patches, 40 ids)."""

    num_heads: int
    out_std: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        may_attend: Bool[Array, "length length"] | None,
    ) -> Float[Array, "batch length width"]:
        batch, length, width = x.shape
        head_dim = width // self.num_heads
        rows = as_rows(x)

        def project(name: str) -> Float[Array, "batch length heads head_dim"]:
            y = dense(width, ("embed", "heads"), width**-0.5, name)(rows)
            return y.reshape(batch, length, self.num_heads, head_dim)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * head_dim**-0.5, key)
        if may_attend is not None:
            scores = jnp.where(may_attend, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        out = dense(width, ("heads", "embed"), self.out_std, "out")(as_rows(mixed))
        return out.reshape(x.shape)


class MLP(nn.Module):
    """Four times as wide inside."""

    activation: str
    out_std: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        width = x.shape[-1]
        y = dense(4 * width, ("embed", "mlp"), (2 * width) ** -0.5, "up")(as_rows(x))
        y = ACTIVATIONS[self.activation](y)
        y = dense(width, ("mlp", "embed"), self.out_std, "down")(y)
        return y.reshape(x.shape)


def as_rows(x: Float[Array, "batch length ..."]) -> Float[Array, "rows width"]:
    """One matrix: XLA on CPU computes a kernel's gradient 2.5 times as fast from it."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def normal(std: float, names: tuple[str | None, ...]) -> Any:
    """An initialiser that also names the parameter's logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), names)


def dense(
    features: int,
    names: tuple[str | None, str | None],
    std: float,
    name: str,
    use_bias: bool = True,
) -> nn.Dense:
    """A dense layer whose kernel has these logical axes; its bias has the last one."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=normal(std, names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, names[1:]),
        name=name,
    )


def norm(name: str) -> nn.LayerNorm:
    """CLIP's LayerNorm."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,  # the fast form cancels; parity wants the plain one
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )
