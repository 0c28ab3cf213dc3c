"""The VQGAN loss: reconstruction, edges, codebook, patch discriminator.

One backward pass serves both networks. The discriminator's term has `stop_gradient` on
the reconstruction, the VQGAN's adversarial term on the discriminator weights, so the
sum has the correct gradient for each network and one optimizer can update both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import Array, Float, Int, UInt8

from racm3_jax.limits import check_range
from racm3_jax.tokenizers.codebook import fit_codebook
from racm3_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from racm3_jax.tokenizers.vqgan_layers import Conv, GroupNorm

Metrics = dict[str, tuple[Array, Array]]
VQGANLossFn = Callable[
    [Any, Mapping[str, Array], Array, Array], tuple[Float[Array, ""], Metrics]
]


@dataclasses.dataclass(frozen=True)
class VQGANLossConfig:
    """Weights of the terms; a weight of 0 skips the term.

    Attributes:
      l1_weight: absolute pixel error, pixels in [-1, 1].
      l2_weight: squared pixel error (what PSNR measures).
      edge_weight: absolute error of neighbouring pixels' differences, at full and half
        size: a perceptual term that costs next to nothing and keeps borders sharp.
      codebook_weight: moves codes towards latents.
      commitment_weight: moves latents towards codes (0.25 in arXiv 1711.00937).
      entropy_weight: keeps all codes in use (arXiv 2310.05737, section 3).
      codebook_decay: EMA decay of codes as means of their latents (0.99 in arXiv
        1711.00937, A.1), instead of the codebook loss; 0 trains them by gradient.
      revive_below: with a decay, a code used less often than this fraction of the mean
        moves to a latent of the batch; 0: never.
      adversarial_weight: patch discriminator (arXiv 2012.09841); 0: none.
      adversarial_start: first step of the discriminator and its term.
      discriminator_channels: width of the discriminator's first layer.
      discriminator_layers: strided layers; a patch is 2^layers pixels or more.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    edge_weight: float = 0.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    codebook_decay: float = 0.0
    revive_below: float = 0.05
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    discriminator_channels: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        names = (field.name for field in dataclasses.fields(self))
        check_range(self, "vqgan_loss", *names, low=0)
        for name in ("codebook_decay", "revive_below"):
            if getattr(self, name) >= 1:
                raise ValueError(
                    f"vqgan_loss.{name} must be below 1; got {getattr(self, name)}"
                )


class Discriminator(nn.Module):
    """Scores patches of an image: above 0 real, below 0 reconstructed."""

    channels: int = 64
    num_layers: int = 3

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b rows columns 1"]:
        x = images
        for i in range(self.num_layers):
            features = self.channels * min(2**i, 8)
            x = Conv(features, size=4, stride=2, name=f"conv_{i}")(x)
            if i > 0:
                # GroupNorm instead of pix2pix's BatchNorm: no state, no leak in a
                # batch.
                x = GroupNorm(min(8, features), name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Conv(1, size=3, name="conv_out")(x)


def init_vqgan(
    config: VQGANConfig, loss: VQGANLossConfig, key: Array
) -> dict[str, Any]:
    """Initial parameters, boxed with their logical axis names.

    Returns:
      {"vqgan": ...}; if the adversarial weight is not 0, "discriminator"; and with a
      codebook decay "codebook_means", the running counts and sums of codes' latents.

    Raises:
      ValueError: a codebook decay with a quantizer without a learned codebook.
    """
    if loss.codebook_decay and config.quantizer not in ("euclidean", "cosine"):
        raise ValueError(
            f"vqgan_loss.codebook_decay={loss.codebook_decay} moves a codebook's codes, "
            f"but vqgan.quantizer is {config.quantizer!r}: set it to 0"
        )
    vqgan_key, discriminator_key = jax.random.split(key)
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    params = {"vqgan": VQGAN(config).init(vqgan_key, images)["params"]}
    if loss.adversarial_weight:
        discriminator = _build_discriminator(loss)
        variables = discriminator.init(discriminator_key, images)
        params["discriminator"] = variables["params"]
    if loss.codebook_decay:
        params["codebook_means"] = start_means(config, params["vqgan"]["codebook"])
    return params


def init_vqgan_from_images(
    config: VQGANConfig,
    loss: VQGANLossConfig,
    key: Array,
    images: UInt8[np.ndarray, "n h w 3"],
) -> dict[str, Any]:
    """Initial parameters, unboxed, with the codebook from k-means of latents."""
    # One program; `init` alone would compile and dispatch each operation.
    params = meta.unbox(jax.jit(functools.partial(init_vqgan, config, loss))(key))

    @jax.jit
    def encode(params: Any, images: Any) -> Any:
        pixels = normalize_images(images)
        return VQGAN(config).apply({"params": params}, pixels, method=VQGAN.encode)

    blocks = [images[i : i + 100] for i in range(0, len(images), 100)]
    latents = np.concatenate(
        [np.asarray(encode(params["vqgan"], block)) for block in blocks]
    )
    params["vqgan"]["codebook"] = jnp.asarray(
        fit_codebook(latents.reshape(-1, config.d_code), config.num_codes)
    )
    if loss.codebook_decay:
        codebook = params["vqgan"]["codebook"]
        params["codebook_means"] = start_means(config, jnp.array(codebook, copy=True))
    return params


def vqgan_loss(config: VQGANConfig, loss: VQGANLossConfig) -> VQGANLossFn:
    """Builds the training loss.

    Args:
      config: shape of the network.
      loss: weights of the terms.

    Returns:
      `loss_fn(params, batch, key, step) -> (loss, metrics)`. With a codebook decay, the
      gradient of `ASSIGNED` parameters is what a step subtracts from them, see
      `training.step.make_train_step`. `params` as `init_vqgan`
      returns them (unboxed); `batch["images"]` is uint8[b, h, w, 3] or floats in
      [-1, 1]; metrics are (sum, weight) pairs.
    """
    # `apply` is typed for any module; Any says that this one returns a triple.
    model: Any = VQGAN(config)

    def loss_fn(params, batch, key, step):
        images = normalize_images(batch["images"])
        recon, codes, quantized = model.apply(
            {"params": params["vqgan"]},
            images,
            deterministic=config.dropout == 0,
            rngs={"dropout": key} if config.dropout else None,
        )
        terms = {
            "l1": (loss.l1_weight, jnp.abs(recon - images).mean()),
            "l2": (loss.l2_weight, jnp.square(recon - images).mean()),
            "codebook": (loss.codebook_weight, quantized.codebook_loss),
            "commitment": (loss.commitment_weight, quantized.commitment_loss),
            "entropy": (loss.entropy_weight, quantized.entropy_loss),
        }
        if loss.edge_weight:
            terms["edge"] = (loss.edge_weight, _edge_loss(recon, images))
        if loss.adversarial_weight:
            terms |= adversarial_terms(
                loss, params["discriminator"], recon, images, step
            )
        total = sum(
            (weight * value for weight, value in terms.values()), start=jnp.zeros(())
        )
        means = {name: value for name, (_, value) in terms.items()}
        means |= {"loss": total, "psnr": jnp.mean(_psnr(recon, images))}
        means |= _codebook_metrics(codes, config.num_codes)
        if loss.codebook_decay:
            moved, counts = _move_codes(loss, params, quantized, key)
            total += moved
            means |= counts
        num_images = jnp.asarray(images.shape[0], jnp.float32)
        metrics = {n: (v * num_images, num_images) for n, v in means.items()}
        return total, jax.lax.stop_gradient(metrics)

    return loss_fn


# Parameters that are set by their "gradient" (running means), without the optimizer.
ASSIGNED = ("vqgan/codebook", "codebook_means")
# Initial count of a revived code, as a fraction of the mean.
_REVIVED_COUNT = 0.2


def start_means(config: VQGANConfig, codebook: Any) -> dict[str, Any]:
    """Initial counts (1 is the mean) and sums of a codebook, boxed or not."""
    return {"counts": jnp.ones(config.num_codes), "sums": codebook}


def _move_codes(
    loss: VQGANLossConfig, params: Any, quantized: Any, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Moves codes to the running means of their latents, unused ones to latents.

    Returns:
      0 whose gradient is the old minus the new parameters, and the numbers of used and
      of revived codes.
    """
    stop = jax.lax.stop_gradient
    old = stop({"codebook": params["vqgan"]["codebook"], **params["codebook_means"]})
    num_codes, d_code = old["codebook"].shape
    latents = stop(quantized.latents).reshape(-1, d_code)
    codes = quantized.codes.reshape(-1)
    # Counts are relative to the mean count of a code, independent of the batch size.
    share = num_codes / len(codes)
    counts = jnp.zeros(num_codes).at[codes].add(share)
    sums = jnp.zeros_like(old["sums"]).at[codes].add(share * latents)
    keep = loss.codebook_decay
    counts = keep * old["counts"] + (1 - keep) * counts
    sums = keep * old["sums"] + (1 - keep) * sums
    is_dead = counts < loss.revive_below
    places = jax.random.randint(key, (num_codes,), 0, len(latents))
    counts = jnp.where(is_dead, _REVIVED_COUNT, counts)
    sums = jnp.where(is_dead[:, None], _REVIVED_COUNT * latents[places], sums)
    new = {"codebook": sums / counts[:, None], "counts": counts, "sums": sums}
    live = {"codebook": params["vqgan"]["codebook"], **params["codebook_means"]}
    zero = sum(
        (((live[name] - old[name]) * (old[name] - new[name])).sum() for name in new),
        start=jnp.zeros(()),
    )
    return zero, {
        "codes_in_use": 1.0 - is_dead.mean(),
        "codes_revived": is_dead.sum().astype(jnp.float32),
    }


def normalize_images(images: Array) -> Float[Array, "b h w 3"]:
    """uint8 pixels to [-1, 1]; floats pass through."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images


def _edge_loss(recon: Array, images: Array) -> Float[Array, ""]:
    """Mean absolute error of horizontal and vertical differences, at two sizes."""
    error, total = recon - images, jnp.zeros(())
    for _ in range(2):
        total += jnp.abs(jnp.diff(error, axis=1)).mean()
        total += jnp.abs(jnp.diff(error, axis=2)).mean()
        error = nn.avg_pool(error, (2, 2), strides=(2, 2))
    return total


def adversarial_terms(
    loss: VQGANLossConfig, params: Any, recon: Array, images: Array, step: Array
) -> dict[str, tuple[Array, Array]]:
    """Hinge losses of both networks, with weight 0 before the start step.

    The step gates the weights, not the computation: XLA's CPU backend is some 50 times
    slower at a convolution's gradient inside a `lax.cond`.
    """
    discriminator: Any = _build_discriminator(loss)
    stop = jax.lax.stop_gradient
    real = discriminator.apply({"params": params}, images)
    fake = discriminator.apply({"params": params}, stop(recon))
    fooled = discriminator.apply({"params": stop(params)}, recon)
    own = (nn.relu(1.0 - real).mean() + nn.relu(1.0 + fake).mean()) / 2
    started = (jnp.asarray(step) >= loss.adversarial_start).astype(jnp.float32)
    return {
        "discriminator": (started, own),
        "adversarial": (started * loss.adversarial_weight, -fooled.mean()),
    }


def _build_discriminator(loss: VQGANLossConfig) -> Discriminator:
    return Discriminator(loss.discriminator_channels, loss.discriminator_layers)


def _psnr(recon: Array, images: Array) -> Float[Array, " b"]:
    """PSNR in decibels of each image; the range is 2, clipped."""
    error = jnp.square(jnp.clip(recon, -1.0, 1.0) - images).mean((1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def _codebook_metrics(
    codes: Int[Array, "b length"], num_codes: int
) -> dict[str, Array]:
    """Fraction of the codebook used by this batch, and the perplexity of its codes."""
    counts = jnp.zeros((num_codes,)).at[codes.reshape(-1)].add(1.0)
    p = counts / codes.size
    return {
        "codebook_usage": (counts > 0).mean(),
        "codebook_perplexity": jnp.exp(-(p * jnp.log(p + 1e-10)).sum()),
    }
