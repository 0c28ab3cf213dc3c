"""The VQGAN in Flax: images to a grid of codebook indices and back.

The architecture of taming-transformers (arXiv 2012.09841): an encoder of ResNet blocks,
a codebook, a decoder, named so that public weights map one to one:

    image ─ conv_in ─ down_0 ─ down_1 … ─ mid ─ norm_out ─ conv_out ─ quant_conv ─┐
                                                                               codebook
    image ─ conv_out ─ norm_out ─ up_0 ─ up_1 … ─ mid ─ conv_in ─ post_quant_conv ─┘

Three options are not in taming, and off by default. `stem_patch` > 1 folds pixels into
channels before `conv_in` (and back after `conv_out`), which makes small images cheap on
a CPU. The "patch" encoder encodes each of these blocks independently, so that equal
blocks have equal codes at any position, and a generator can copy them code by code. The
quantizer may compare unit vectors ("cosine", arXiv 2110.04627) or round a few bounded
numbers to a fixed grid ("fsq", arXiv 2309.15505): no codebook, no dead codes.

The "gumbel" quantizer is that of public GumbelVQ weights: a linear layer scores the codes
of each latent. Encoding takes the best one; its training-time sampling is not
implemented.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from racm3_jax.tokenizers.scalar_quantization import (
    codes_of_grid,
    grid_of_codes,
    round_to_grid,
)
from racm3_jax.tokenizers.vqgan_layers import (
    AttentionBlock,
    Conv,
    GroupNorm,
    ResBlock,
    partitioned,
    patchify,
    unpatchify,
)


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Architecture of the network; the defaults are those of taming's f8 models.

    Attributes:
      image_size: height and width of the images, in pixels.
      stem_patch: side of the pixel blocks folded into channels; 1 as in taming.
      encoder: "conv" is taming's; "patch" is linear in each block of `stem_patch` pixels.
      channels: width of the first level.
      channel_multipliers: width of each level; each level except the first halves the
        map.
      num_res_blocks: ResNet blocks per encoder level; the decoder has one more.
      attention_resolutions: map sizes at which every block is followed by attention.
      z_channels: width of the encoder's output.
      num_codes: size of the codebook.
      d_code: length of a code.
      quantizer: "euclidean" (nearest code), "cosine" (nearest direction), "fsq", or
        "gumbel" (best score of a linear layer).
      fsq_levels: steps of each number of an "fsq" latent; their product is `num_codes`,
        their count `d_code`. Empty for the other quantizers.
      norm_groups: groups of every GroupNorm.
      dropout: fraction of activations dropped in the ResNet blocks in training.
    """

    image_size: int = 256
    stem_patch: int = 1
    encoder: Literal["conv", "patch"] = "conv"
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32,)
    z_channels: int = 256
    num_codes: int = 8192
    d_code: int = 256
    quantizer: Literal["euclidean", "cosine", "fsq", "gumbel"] = "euclidean"
    fsq_levels: tuple[int, ...] = ()
    norm_groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # JSON and ConfigDict have lists; a config must be hashable.
        for name in ("channel_multipliers", "attention_resolutions", "fsq_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.image_size % self.downsampling:
            raise ValueError(
                f"vqgan.image_size must be a multiple of {self.downsampling} (stem_patch "
                f"times the halvings between levels); got {self.image_size}"
            )
        for multiplier in self.channel_multipliers:
            if (self.channels * multiplier) % self.norm_groups:
                raise ValueError(
                    "vqgan.channels times every multiplier must be a multiple of "
                    f"norm_groups={self.norm_groups}; got {self.channels * multiplier}"
                )
        if self.encoder not in ("conv", "patch"):
            raise ValueError(
                f"vqgan.encoder must be 'conv' or 'patch'; got {self.encoder!r}"
            )
        if self.encoder == "patch" and len(self.channel_multipliers) > 1:
            raise ValueError(
                "vqgan.encoder='patch' has one level: put the whole factor into "
                f"stem_patch; got channel_multipliers={self.channel_multipliers}"
            )
        if self.quantizer not in ("euclidean", "cosine", "fsq", "gumbel"):
            raise ValueError(
                "vqgan.quantizer must be 'euclidean', 'cosine', 'fsq' or 'gumbel'; got "
                f"{self.quantizer!r}"
            )
        levels = self.fsq_levels
        if self.quantizer != "fsq":
            if levels:
                raise ValueError(
                    f"vqgan.fsq_levels={levels} needs quantizer='fsq'; got "
                    f"{self.quantizer!r}"
                )
        elif not levels or min(levels) < 2:
            raise ValueError(
                f"vqgan.fsq_levels must be numbers >= 2, e.g. (8, 8, 8); got {levels}"
            )
        elif (math.prod(levels), len(levels)) != (self.num_codes, self.d_code):
            raise ValueError(
                f"vqgan.fsq_levels={levels} need num_codes={math.prod(levels)} and "
                f"d_code={len(levels)}; got {self.num_codes} and {self.d_code}"
            )

    @property
    def downsampling(self) -> int:
        """Side in pixels that a code covers."""
        return self.stem_patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.image_size // self.downsampling

    @property
    def image_length(self) -> int:
        """Codes of one image."""
        return self.grid_size**2


class Quantized(NamedTuple):
    """What the quantizer returns; the losses are means over the latents.

    Attributes:
      z_q: the chosen codes, with the gradient of `z` (straight-through).
      codes: codebook indices, row by row.
      commitment_loss: squared distance; its gradient goes to the encoder.
      codebook_loss: squared distance; its gradient goes to the codes.
      entropy_loss: mean entropy of a latent's soft choice minus the entropy of the mean
        choice, in nats: low when choices are sharp and all codes are in use.
      latents: before quantization.
    """

    z_q: Float[Array, "batch height width d_code"]
    codes: Int[Array, "batch length"]
    commitment_loss: Float[Array, ""]
    codebook_loss: Float[Array, ""]
    entropy_loss: Float[Array, ""]
    latents: Float[Array, "batch height width d_code"]


def _res_block(features: int, config: VQGANConfig, name: str) -> ResBlock:
    return ResBlock(features, config.norm_groups, config.dropout, name=name)


def _middle(x: Array, config: VQGANConfig, deterministic: bool) -> Array:
    """The blocks at the lowest resolution, the same in encoder and decoder."""
    features = x.shape[-1]
    x = _res_block(features, config, "mid_block_1")(x, deterministic)
    x = AttentionBlock(config.norm_groups, name="mid_attn_1")(x)
    return _res_block(features, config, "mid_block_2")(x, deterministic)


class Encoder(nn.Module):
    """Images to a map of `z_channels`; taming's `Encoder`."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, images: Array, deterministic: bool = True) -> Array:
        config = self.config
        x = patchify(images, config.stem_patch)
        if config.encoder == "patch":
            # Distances between patches are kept, so that k-means of latents is k-means
            # of pixels.
            return Conv(
                config.z_channels,
                size=1,
                kernel_init=nn.initializers.orthogonal(),
                name="conv_in",
            )(x)
        x = Conv(config.channels, name="conv_in")(x)
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            features = config.channels * multiplier
            for i in range(config.num_res_blocks):
                name = f"down_{level}_block_{i}"
                x = _res_block(features, config, name)(x, deterministic)
                if x.shape[1] in config.attention_resolutions:
                    x = AttentionBlock(
                        config.norm_groups, name=f"down_{level}_attn_{i}"
                    )(x)
            if level != last:
                # taming pads right and bottom only before its strided convolution.
                x = Conv(
                    features,
                    stride=2,
                    padding=(0, 1),
                    name=f"down_{level}_downsample",
                )(x)
        x = _middle(x, config, deterministic)
        x = nn.swish(GroupNorm(config.norm_groups, name="norm_out")(x))
        return Conv(config.z_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """A map of `z_channels` to images; taming's `Decoder` (levels count downwards)."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, z: Array, deterministic: bool = True) -> Array:
        config = self.config
        x = Conv(config.channels * config.channel_multipliers[-1], name="conv_in")(z)
        x = _middle(x, config, deterministic)
        for level in reversed(range(len(config.channel_multipliers))):
            features = config.channels * config.channel_multipliers[level]
            for i in range(config.num_res_blocks + 1):
                name = f"up_{level}_block_{i}"
                x = _res_block(features, config, name)(x, deterministic)
                if x.shape[1] in config.attention_resolutions:
                    x = AttentionBlock(config.norm_groups, name=f"up_{level}_attn_{i}")(
                        x
                    )
            if level != 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = Conv(features, name=f"up_{level}_upsample")(x)
        x = nn.swish(GroupNorm(config.norm_groups, name="norm_out")(x))
        x = Conv(3 * config.stem_patch**2, name="conv_out")(x)
        if config.encoder == "patch":
            # A code is nearly a patch already: the network adds information from its
            # neighbours.
            x = x + Conv(x.shape[-1], size=1, name="patch_out")(z)
        return unpatchify(x, config.stem_patch)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder; images are RGB in [-1, 1]."""

    config: VQGANConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(
            config.d_code,
            size=1,
            kernel_init=nn.initializers.orthogonal()
            if config.encoder == "patch"
            else nn.initializers.lecun_normal(),
        )
        self.post_quant_conv = Conv(config.z_channels, size=1)
        if config.quantizer != "fsq":
            init = nn.initializers.normal(config.d_code**-0.5)
            self.codebook = self.param(
                "codebook",
                partitioned(init, "codes", "conv_in"),
                (config.num_codes, config.d_code),
            )
        if config.quantizer == "gumbel":
            self.code_scores = Conv(config.num_codes, size=1)

    def __call__(
        self, images: Float[Array, "b h w 3"], deterministic: bool = True
    ) -> tuple[Float[Array, "b h w 3"], Int[Array, "b length"], Quantized]:
        """Returns the reconstruction (not clipped), its codes and the losses."""
        quantized = self.quantize(self.encode(images, deterministic))
        return self.decode(quantized.z_q, deterministic), quantized.codes, quantized

    def encode(
        self, images: Float[Array, "b h w 3"], deterministic: bool = True
    ) -> Float[Array, "b grid grid d_code"]:
        """The continuous latents, before quantization."""
        return self._comparable(self.quant_conv(self.encoder(images, deterministic)))

    def decode(
        self, z_q: Float[Array, "b grid grid d_code"], deterministic: bool = True
    ) -> Float[Array, "b h w 3"]:
        return self.decoder(self.post_quant_conv(z_q), deterministic)

    def encode_codes(self, images: Float[Array, "b h w 3"]) -> Int[Array, "b length"]:
        """Images to codebook indices, row by row from the top left."""
        z = self.encode(images)
        if self.config.quantizer == "fsq":
            codes = codes_of_grid(
                round_to_grid(z, self.config.fsq_levels), self.config.fsq_levels
            )
        else:
            codes = jnp.argmax(self._similarities(z), axis=-1)
        return codes.reshape(z.shape[0], -1).astype(jnp.int32)

    def decode_codes(self, codes: Int[Array, "b length"]) -> Float[Array, "b h w 3"]:
        """Codebook indices to images."""
        side = self.config.grid_size
        if self.config.quantizer == "fsq":
            z_q = grid_of_codes(codes, self.config.fsq_levels)
        else:
            z_q = self._comparable(self.codebook)[codes]
        return self.decode(z_q.reshape(codes.shape[0], side, side, -1))

    def quantize(
        self, z: Float[Array, "b grid grid d_code"], temperature: float = 0.05
    ) -> Quantized:
        """Replaces each latent by its nearest code.

        Args:
          z: latents from `encode`.
          temperature: of the soft choice in `entropy_loss`.
        """
        if self.config.quantizer == "fsq":
            z_q = round_to_grid(z, self.config.fsq_levels)
            codes = codes_of_grid(z_q, self.config.fsq_levels).reshape(z.shape[0], -1)
            zero = jnp.zeros(())
            return Quantized(z_q, codes, zero, zero, zero, z)
        similarities = self._similarities(z)
        codes = jnp.argmax(similarities, axis=-1)
        chosen = self._comparable(self.codebook)[codes]
        stop = jax.lax.stop_gradient
        log_p = nn.log_softmax(similarities / temperature).reshape(
            -1, self.config.num_codes
        )
        p = jnp.exp(log_p)
        mean_p = p.mean(0)
        own_entropy = -(p * log_p).sum(-1).mean()
        mean_entropy = -(mean_p * jnp.log(mean_p + 1e-10)).sum()
        return Quantized(
            z_q=z + stop(chosen - z),
            codes=codes.reshape(codes.shape[0], -1).astype(jnp.int32),
            commitment_loss=jnp.square(z - stop(chosen)).sum(-1).mean(),
            codebook_loss=jnp.square(stop(z) - chosen).sum(-1).mean(),
            entropy_loss=own_entropy - mean_entropy,
            latents=z,
        )

    def _comparable(self, x: Array) -> Array:
        """Unit length for the cosine quantizer, unchanged for the others."""
        if self.config.quantizer != "cosine":
            return x
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

    def _similarities(
        self, z: Float[Array, "b grid grid d_code"]
    ) -> Float[Array, "b grid grid codes"]:
        """Minus the squared distance to each code, up to a constant of each latent.

        For "gumbel": the scores of the codes.
        """
        if self.config.quantizer == "gumbel":
            return self.code_scores(z)
        codebook = self._comparable(self.codebook)
        return 2.0 * z @ codebook.T - jnp.square(codebook).sum(-1)
