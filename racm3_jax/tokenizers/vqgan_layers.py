"""The layers of the VQGAN and of its discriminator."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def partitioned(initializer: Callable, *names: str | None) -> Callable:
    return nn.with_logical_partitioning(initializer, names)


# Residual branches start near zero, so the initial network is nearly linear.
_SMALL = nn.initializers.variance_scaling(1e-2, "fan_in", "truncated_normal")


def patchify(
    images: Float[Array, "b h w c"], patch: int
) -> Float[Array, "b h2 w2 patch_channels"]:
    """Folds each `patch`×`patch` block of pixels into the channels of one place."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, -1)


def unpatchify(
    x: Float[Array, "b h w patch_channels"], patch: int
) -> Float[Array, "b h2 w2 c"]:
    """The inverse of `patchify`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)


class Conv(nn.Module):
    """A square convolution with a bias, in a form that is fast on XLA's CPU backend.

    Stride 1 is faster than nine shifted matmuls and im2col there, but the gradient of a
    strided convolution uses naive loops. So stride 2 is computed as the equivalent
    stride-1 convolution over 2×2 blocks folded into channels; parameters are the same.

    Attributes:
      features: channels of the output.
      size: side of the kernel; 1, 3 or 4, even if the stride is 2.
      stride: 1 or 2.
      padding: zeros before and after, along both sides of the map.
      kernel_init: of the kernel; the bias starts at zero.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.param(
            "kernel",
            partitioned(self.kernel_init, None, None, "conv_in", "conv_out"),
            (self.size, self.size, x.shape[-1], self.features),
        )
        bias = self.param(
            "bias",
            partitioned(nn.initializers.zeros_init(), "conv_out"),
            (self.features,),
        )
        if self.size == 1:
            return x @ kernel[0, 0] + bias
        if self.stride == 2:
            x, kernel = _fold_stride(x, kernel, self.padding)
            padding = (0, 0)
        else:
            padding = self.padding
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias


def _fold_stride(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c d"],
    padding: tuple[int, int],
) -> tuple[Array, Array]:
    """Input and kernel of the stride-1 convolution equivalent to a stride-2 one.

    x    a b c d | e f     kernel  0 1 2          (one row shown; 0 fills up to even)
         blocks: (a b) (c d) (e f)       (0 1) (2 0)
    """
    before, after = padding
    after += (x.shape[1] + before + after) % 2
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    size = kernel.shape[0]
    fill = size % 2
    kernel = jnp.pad(kernel, ((0, fill), (0, fill), (0, 0), (0, 0)))
    # The kernel's own blocks fold just as the pixels do: [k, k, c, d] -> d images.
    folded = patchify(kernel.transpose(3, 0, 1, 2), 2).transpose(1, 2, 3, 0)
    return patchify(x, 2), folded


class GroupNorm(nn.Module):
    """GroupNorm as one reduction and one multiply-add over the map, eps as taming's."""

    num_groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, _, _, channels = x.shape
        scale = self.param(
            "scale", partitioned(nn.initializers.ones_init(), "norm"), (channels,)
        )
        bias = self.param(
            "bias", partitioned(nn.initializers.zeros_init(), "norm"), (channels,)
        )

        def group_mean(moments):
            grouped = moments.reshape(batch, self.num_groups, -1).mean(
                -1, keepdims=True
            )
            spread = jnp.broadcast_to(
                grouped, (batch, self.num_groups, channels // self.num_groups)
            )
            return spread.reshape(batch, channels)

        mean = group_mean(x.mean((1, 2)))
        # Clipped because E[x²] - E[x]² may be slightly negative by rounding.
        variance = jnp.maximum(group_mean((x * x).mean((1, 2))) - mean**2, 0.0)
        gain = scale * jax.lax.rsqrt(variance + self.epsilon)
        shift = bias - mean * gain
        return x * gain[:, None, None, :] + shift[:, None, None, :]


class ResBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv, added to the input."""

    features: int
    norm_groups: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        h = nn.swish(GroupNorm(self.norm_groups, name="norm1")(x))
        h = Conv(self.features, name="conv1")(h)
        h = nn.swish(GroupNorm(self.norm_groups, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = Conv(self.features, kernel_init=_SMALL, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """One head of self-attention over all places of the map, added to the input."""

    norm_groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, _, _, channels = x.shape
        normed = GroupNorm(self.norm_groups, name="norm")(x)
        q, k, v = (
            Conv(channels, size=1, name=name)(normed).reshape(batch, -1, channels)
            for name in ("q", "k", "v")
        )
        weights = nn.softmax(jnp.einsum("bic,bjc->bij", q, k) * channels**-0.5)
        mixed = jnp.einsum("bij,bjc->bic", weights, v).reshape(x.shape)
        proj = Conv(channels, size=1, kernel_init=_SMALL, name="proj_out")
        return x + proj(mixed)
