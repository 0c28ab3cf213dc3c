"""CLIP (arXiv 2103.00020) in Flax: two Transformer towers into one embedding space.

    image [b h w 3] -> patches -> ViT, class token --+
                                                     +--> d_embed, unit length outside
    text  [b length] -> causal Transformer, <end> ---+

The parameter tree follows the public checkpoints layer by layer (`vision` and `text`, each
with `layers_0`, ... and `attention/{query,key,value,out}`, `mlp/{up,down}`), so that porting
is renaming and transposing. Patches are cut by a reshape and one matrix product: the kernel
is the convolution's `[patch, patch, 3, width]`, flattened in that order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Int32, Shaped

from racm3_jax.limits import check_choices
from racm3_jax.retrieval.clip_layers import ACTIVATIONS, Layer, dense, norm, normal
from racm3_jax.sharding import current_platform, multiplies_bfloat16

# NumPy's arrays or JAX's.
ArrayT = TypeVar("ArrayT", Array, np.ndarray)

# Per channel, for pixels in 0..1, as in OpenAI's `preprocess`.
OPENAI_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# The inverse temperature starts at 1 / 0.07 (CLIP, section 2.5).
INITIAL_LOG_SCALE = float(np.log(1 / 0.07))


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers. The defaults are those of the shipped one.

    Attributes:
      vocab_size: of the text tower, including `<start>` and `<end>`, the two highest
        ids.
      image_size: side of the images, in pixels.
      patch_size: side of a patch, in pixels; divides `image_size`.
      context_length: tokens of a text, including `<start>` and `<end>`.
      d_embed: dimensions of the shared space.
      aligned_dims: texts and images are compared with each other by this many first
        numbers of an embedding; the others find documents by what only their texts, or
        only their images, have (see `CLIPLossConfig`). 0 is all.
      activation: "quick_gelu" for OpenAI's weights, "gelu" for most others.
      image_mean: subtracted from pixels of 0..1, by channel.
      image_std: divisor of the difference, by channel.
      compute_dtype: of all matmuls except the last; "auto" is bfloat16 on accelerators,
        where float32 takes twice the memory and several times as long, and float32 on a
        CPU, except in training (`for_training`). Not a property of the weights, and not
        stored with them.
    """

    vocab_size: int
    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    context_length: int = 40
    d_embed: int = 128
    aligned_dims: int = 0
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    image_mean: tuple[float, float, float] = OPENAI_IMAGE_MEAN
    image_std: tuple[float, float, float] = OPENAI_IMAGE_STD
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        # JSON has lists; the config must be hashable, as a key of compiled functions.
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"clip.image_size {self.image_size} is not a multiple of "
                f"clip.patch_size {self.patch_size}"
            )
        for tower in ("vision", "text"):
            width = getattr(self, f"{tower}_width")
            heads = getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(
                    f"clip.{tower}_width {width} is not a multiple of "
                    f"clip.{tower}_heads {heads}"
                )
        if not 0 <= self.aligned_dims < self.d_embed:
            raise ValueError(
                f"clip.aligned_dims must be in 0..{self.d_embed - 1}, below clip.d_embed "
                f"(0 is all); got {self.aligned_dims}"
            )
        dtypes = ("auto", "bfloat16", "float32")
        check_choices(
            self, "clip", activation=sorted(ACTIVATIONS), compute_dtype=dtypes
        )
        if self.vocab_size < 3 or self.context_length < 3:
            raise ValueError(
                "clip.vocab_size and clip.context_length must be >= 3 (a token between "
                f"<start> and <end>); got {self.vocab_size} and {self.context_length}"
            )

    def of_weights(self) -> dict[str, Any]:
        """The fields stored with the weights and covered by their fingerprint."""
        fields = dataclasses.asdict(self)
        del fields["compute_dtype"]
        if not self.aligned_dims:  # as in weights from before it
            del fields["aligned_dims"]
        return fields

    @property
    def dtype(self) -> str:
        """`compute_dtype` with "auto" resolved for the current platform."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "float32" if current_platform() == "cpu" else "bfloat16"

    def for_training(self) -> CLIPConfig:
        """With "auto" resolved for a training: bfloat16 also on a CPU that has it."""
        if self.compute_dtype == "auto" and multiplies_bfloat16():
            return dataclasses.replace(self, compute_dtype="bfloat16")
        return self

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def start(self) -> int:
        """The first token of every text."""
        return self.vocab_size - 2

    @property
    def end(self) -> int:
        """The last token of every text; its output is the text's embedding."""
        return self.vocab_size - 1


class CLIP(nn.Module):
    """Both towers. Outputs are *not* normalised, as in the reference implementations."""

    config: CLIPConfig

    def setup(self) -> None:
        self.vision = VisionTower(self.config)
        self.text = TextTower(self.config)
        self.logit_scale: Any = self.param(
            "logit_scale",
            nn.with_logical_partitioning(
                nn.initializers.constant(INITIAL_LOG_SCALE), ()
            ),
            (),
        )

    def encode_image(
        self,
        images: Float[Array, "batch height width 3"],
        kept_patches: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch d_embed"]:
        """Embeds images from `normalise_images`.

        Args:
          images: normalised pixels.
          kept_patches: row-major indices of the patches to use; None means all.
        """
        patches = cut_patches(images, self.config.patch_size)
        return self.encode_patches(patches, kept_patches)

    def encode_patches(
        self,
        patches: Float[Array, "batch patches values"],
        kept_patches: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch d_embed"]:
        """Like `encode_image`, for patches from `cut_patches`."""
        return self.vision(patches, kept_patches)

    def encode_text(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch d_embed"]:
        """Embeds token rows from `CLIPTokenizer`; length <= `context_length`."""
        return self.text(tokens)

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        tokens: Int[Array, "batch length"],
    ) -> tuple[
        Float[Array, "batch d_embed"], Float[Array, "batch d_embed"], Float[Array, ""]
    ]:
        """Returns (image embeddings, text embeddings, log of the inverse temperature)."""
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale


class VisionTower(nn.Module):
    """ViT with a class token, LayerNorm before and after its layers (CLIP, 2.4)."""

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "batch patches values"],
        kept_patches: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch d_embed"]:
        config, width = self.config, self.config.vision_width
        scale = width**-0.5
        x = dense(
            width,
            ("patch", "embed"),
            scale,
            "patch_embedding",
            config.dtype,
            use_bias=False,
        )(patches)
        class_embedding = self.param(
            "class_embedding", normal(scale, ("embed",)), (width,)
        )
        positions = self.param(
            "position_embedding",
            normal(scale, ("position", "embed")),
            (1 + config.num_patches, width),
        )
        x = x + positions[1:]
        if kept_patches is not None:
            x = jnp.take_along_axis(x, kept_patches[:, :, None], axis=1)
        first = jnp.broadcast_to(class_embedding + positions[0], (len(x), 1, width))
        x = norm("pre_norm")(jnp.concatenate([first, x], axis=1))
        for i in range(config.vision_layers):
            layer = Layer(
                config.vision_heads,
                config.vision_layers,
                config.activation,
                config.dtype,
                name=f"layers_{i}",
            )
            # Only the class token of the last layer is used.
            is_last = i == config.vision_layers - 1
            x = layer(x, num_read=1 if is_last else None)
        x = norm("post_norm")(x[:, 0])
        return dense(
            config.d_embed,
            ("embed", None),
            scale,
            "projection",
            "float32",  # embeddings are compared
            use_bias=False,
        )(x)


class TextTower(nn.Module):
    """Causal Transformer; the output is at `<end>`, the highest id (CLIP, 2.4)."""

    config: CLIPConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch d_embed"]:
        config, width = self.config, self.config.text_width
        length = tokens.shape[1]
        if length > config.context_length:
            raise ValueError(
                f"a text of {length} tokens is longer than clip.context_length "
                f"{config.context_length}"
            )
        embedding = self.param(
            "token_embedding",
            normal(0.02, ("vocab", "embed")),
            (config.vocab_size, width),
        )
        positions = self.param(
            "position_embedding",
            normal(0.01, ("position", "embed")),
            (config.context_length, width),
        )
        x = jnp.take(embedding, tokens, axis=0) + positions[:length]
        may_attend = jnp.tril(jnp.ones((length, length), bool))
        for i in range(config.text_layers):
            x = Layer(
                config.text_heads,
                config.text_layers,
                config.activation,
                config.dtype,
                name=f"layers_{i}",
            )(x, may_attend)
        # argmax finds the first <end>; tokens after it do not affect its output
        # (causal).
        end = jnp.argmax(tokens, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = norm("final_norm")(x)
        return dense(
            config.d_embed,
            ("embed", None),
            width**-0.5,
            "projection",
            "float32",  # embeddings are compared
            use_bias=False,
        )(x)


def check_scale(factor: float, aligned_dims: int) -> None:
    """Checks a factor of the aligned part.

    Raises:
      ValueError: it is not above 0, or there is no aligned part to scale.
    """
    if factor != 1 and not aligned_dims:
        raise ValueError(
            f"config.aligned_scale is {factor}, but config.clip.aligned_dims is 0, so "
            "there is no part to scale: set it, or leave the scale at 1"
        )
    if not 0 < factor < float("inf"):
        raise ValueError(f"config.aligned_scale must be above 0; got {factor}")


def scale_aligned(params: Any, config: CLIPConfig, factor: float) -> Any:
    """Weights whose embeddings have the aligned part times `factor`, before they are
    normalised: it then weighs less, or more, where whole embeddings are compared.

    Args:
      params: of both towers.
      config: with `aligned_dims`.
      factor: above 0.

    Raises:
      ValueError: see `check_scale`.
    """
    check_scale(factor, config.aligned_dims)

    def scale(path: tuple[Any, ...], leaf: Any) -> Any:
        # tower, layer, tensor
        if len(path) < 2 or path[1].key != "projection":
            return leaf
        columns = np.ones(config.d_embed, np.float32)
        columns[: config.aligned_dims] = factor
        return leaf * columns

    return jax.tree_util.tree_map_with_path(scale, params)


def cut_patches(
    images: Shaped[ArrayT, "batch height width 3"], patch_size: int
) -> Shaped[ArrayT, "batch patches values"]:
    """Cuts images into flattened patches, both in row-major order.

    A 4×4 image of one channel and patches of 2×2:

        a b | c d
        e f | g h      [[a b e f], [c d g h],
        ----+----  ->   [i j m n], [k l o p]]
        i j | k l
        m n | o p
    """
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.swapaxes(2, 3).reshape(
        batch, rows * columns, patch_size * patch_size * channels
    )


def normalise_images(
    images: Int[Array, "*batch values"], config: CLIPConfig
) -> Float[Array, "*batch values"]:
    """Pixels 0..255 -> inputs of the vision tower.

    The last axis is the RGB of one pixel, or of all pixels of a patch.
    """
    repeats = images.shape[-1] // 3
    mean = jnp.tile(jnp.asarray(config.image_mean, jnp.float32), repeats)
    std = jnp.tile(jnp.asarray(config.image_std, jnp.float32), repeats)
    return (images.astype(jnp.float32) / 255 - mean) / std


def count_kept_patches(num_patches: int, drop: float) -> int:
    """Number of patches kept when a fraction `drop` is dropped; at least one."""
    return max(1, num_patches - round(drop * num_patches))


def init_params(config: CLIPConfig, key: Array) -> Any:
    """Initial parameters with their logical axis names (unbox with `nn.unbox`)."""
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    tokens = jnp.full((1, config.context_length), config.end, jnp.int32)
    return CLIP(config).init(key, images, tokens)["params"]


class TextEncoder(Protocol):
    """The interface of a text tokenizer for `CLIPTokenizer` (`tokenizers.bpe`)."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; all ids are below it."""
        ...

    def encode_batch(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> Sequence[Any]:
        """One array of ids per text, truncated to `max_length`."""
        ...


class CLIPTokenizer:
    """Texts -> padded token rows: `<start> text <end> 0 0 ...`.

    `<start>` and `<end>` are the two ids above the text tokenizer's: no text can
    produce them. Texts that are too long are truncated before `<end>`.
    """

    def __init__(self, text: TextEncoder, context_length: int) -> None:
        """Wraps a text tokenizer.

        Args:
          text: a text tokenizer with ids `0 .. text.vocab_size - 1`.
          context_length: length of the rows, >= 3.
        """
        if context_length < 3:
            raise ValueError(f"context_length must be >= 3; got {context_length}")
        self.text = text
        self.context_length = context_length

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size + 2

    def encode_batch(
        self,
        texts: Sequence[str],
        drop: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> Int32[np.ndarray, "texts context_length"]:
        """Encodes texts, dropping a fraction `drop` of the tokens.

        At least one token of a text is kept. `rng` is needed if `drop` > 0.
        """
        start, end = self.vocab_size - 2, self.vocab_size - 1
        rows = np.zeros((len(texts), self.context_length), np.int32)
        heads = self.text.encode_batch(list(texts), self.context_length - 2)
        for row, encoded in zip(rows, heads, strict=True):
            ids = np.asarray(encoded, np.int32)
            if drop > 0:
                ids = drop_tokens(ids, drop, rng)
            row[0] = start
            row[1 : 1 + len(ids)] = ids
            row[1 + len(ids)] = end
        return rows


def drop_tokens(
    ids: Int32[np.ndarray, " length"], drop: float, rng: np.random.Generator | None
) -> Int32[np.ndarray, " kept"]:
    """Drops a fraction of the tokens, in order: `a b c d e` -> `a c d e` (at 0.2).

    The number is `round(drop * length)`, so that the fraction is the same for every
    text, but at least one token is kept.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1); got {drop}")
    if rng is None:
        raise ValueError("drop > 0 needs an rng; pass np.random.default_rng(seed)")
    num_kept = max(1, len(ids) - round(drop * len(ids)))
    kept = rng.permutation(len(ids))[:num_kept]
    return ids[np.sort(kept)]
