"""Inception-v3 (arXiv 1512.00567) up to its 2048 pooled features, in Flax.

Two public weight files have the same names and shapes but were trained with different
average pooling, so the variant is part of a score:

    "fid"          pytorch-fid's port of the TensorFlow network of 2015, which all published
                   FIDs use: averages exclude the zero padding, and the last block takes a
                   maximum where the others average
    "torchvision"  torchvision's ImageNet weights: averages include the padding

Batch normalisation is folded into the convolutions when weights are converted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, UInt8

from racm3_jax.evaluation.resizing import RESIZINGS, Resizing, resize_batch

Variant = Literal["fid", "torchvision"]
VARIANTS: tuple[Variant, ...] = ("fid", "torchvision")
NUM_FEATURES = 2048
IMAGE_SIZE = 299
_NORM_EPSILON = 1e-3
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Conv(nn.Module):
    """Convolution with folded batch normalisation, then ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        padding = [(p, p) for p in self.padding]
        return nn.relu(
            nn.Conv(
                self.features, self.kernel, self.stride, padding=padding, name="conv"
            )(x)
        )


class InceptionV3(nn.Module):
    """The trunk; names of the layers are those of the public weight files.

    Attributes:
      variant: see the top of this file.
      width: divides all channel counts; 1 is the real network (tests use more).
    """

    variant: Variant = "fid"
    width: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b features"]:
        """Features of images scaled by `scale_pixels`."""
        conv, chain = self._conv, self._chain
        x = conv("Conv2d_1a_3x3", 32, 3, stride=2, same=False)(x)
        x = conv("Conv2d_2a_3x3", 32, 3, same=False)(x)
        x = _shrink(conv("Conv2d_2b_3x3", 64, 3)(x))
        x = conv("Conv2d_3b_1x1", 80, 1)(x)
        x = _shrink(conv("Conv2d_4a_3x3", 192, 3, same=False)(x))
        for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self._square(x, block, pooled)
        deep = chain(
            x, "Mixed_6a", ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3)
        )
        x = _join(
            conv("Mixed_6a.branch3x3", 384, 3, stride=2, same=False)(x),
            conv("Mixed_6a.branch3x3dbl_3", 96, 3, stride=2, same=False)(deep),
            _shrink(x),
        )
        for block, c in zip("bcde", (128, 160, 160, 192), strict=True):
            x = self._factored(x, f"Mixed_6{block}", c)
        wide = chain(x, "Mixed_7a", ("branch3x3_1", 192, 1))
        deep = chain(
            x,
            "Mixed_7a",
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
        )
        x = _join(
            conv("Mixed_7a.branch3x3_2", 320, 3, stride=2, same=False)(wide),
            conv("Mixed_7a.branch7x7x3_4", 192, 3, stride=2, same=False)(deep),
            _shrink(x),
        )
        x = self._fanned(x, "Mixed_7b", maximum=False)
        x = self._fanned(x, "Mixed_7c", maximum=self.variant == "fid")
        return x.mean((1, 2))

    def _conv(
        self, name: str, features: int, size: int | tuple[int, int], **how: Any
    ) -> Conv:
        kernel = (size, size) if isinstance(size, int) else size
        # Only the strided layers and the first ones have no padding.
        same = how.pop("same", True)
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        return Conv(features // self.width, kernel, padding=padding, name=name, **how)

    def _chain(self, x: Array, prefix: str, *layers: tuple[str, int, Any]) -> Array:
        for name, features, size in layers:
            x = self._conv(f"{prefix}.{name}", features, size)(x)
        return x

    def _pool(
        self, x: Array, prefix: str, features: int, *, maximum: bool = False
    ) -> Array:
        border: Any = [(1, 1), (1, 1)]
        if maximum:
            x = nn.max_pool(x, (3, 3), (1, 1), border)
        else:
            counted = self.variant == "torchvision"
            x = nn.avg_pool(x, (3, 3), (1, 1), border, count_include_pad=counted)
        return self._conv(f"{prefix}.branch_pool", features, 1)(x)

    def _square(self, x: Array, block: str, pooled: int) -> Array:
        """5×5 and double 3×3 branches (35×35 positions)."""
        chain = self._chain
        return _join(
            chain(x, block, ("branch1x1", 64, 1)),
            chain(x, block, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            chain(
                x,
                block,
                ("branch3x3dbl_1", 64, 1),
                ("branch3x3dbl_2", 96, 3),
                ("branch3x3dbl_3", 96, 3),
            ),
            self._pool(x, block, pooled),
        )

    def _factored(self, x: Array, block: str, c: int) -> Array:
        """7×7 branches as 1×7 and 7×1 (17×17 positions)."""
        chain, row, column = self._chain, (1, 7), (7, 1)
        double = [c, c, c, c, 192]
        sizes = [1, column, row, column, row]
        return _join(
            chain(x, block, ("branch1x1", 192, 1)),
            chain(
                x,
                block,
                ("branch7x7_1", c, 1),
                ("branch7x7_2", c, row),
                ("branch7x7_3", 192, column),
            ),
            chain(
                x,
                block,
                *((f"branch7x7dbl_{i + 1}", double[i], sizes[i]) for i in range(5)),
            ),
            self._pool(x, block, 192),
        )

    def _fanned(self, x: Array, block: str, *, maximum: bool) -> Array:
        """3×3 branches that split into 1×3 and 3×1 (8×8 positions)."""
        chain = self._chain
        wide = chain(x, block, ("branch3x3_1", 384, 1))
        deep = chain(x, block, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        return _join(
            chain(x, block, ("branch1x1", 320, 1)),
            chain(wide, block, ("branch3x3_2a", 384, (1, 3))),
            chain(wide, block, ("branch3x3_2b", 384, (3, 1))),
            chain(deep, block, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(deep, block, ("branch3x3dbl_3b", 384, (3, 1))),
            self._pool(x, block, 192, maximum=maximum),
        )


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _shrink(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def convert_weights(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Arrays by their names in pytorch-fid's or torchvision's file -> parameters.

    The classifier (`fc`) and `AuxLogits` are not used. Batch normalisation
    y = (conv(x) - mean) * weight / sqrt(variance + 0.001) + bias becomes part of the
    kernel and its bias.

    Raises:
      ValueError: a layer is missing.
    """
    names = {
        found[1]
        for name in arrays
        if (
            found := re.fullmatch(
                r"((?:Conv2d|Mixed)_\w+(?:\.\w+)?)\.conv\.weight", name
            )
        )
    }
    if len(names) != 94:
        raise ValueError(
            f"an Inception-v3 file has 94 convolutions before its classifier; got "
            f"{len(names)}: give the arrays of pytorch-fid's pt_inception or of "
            "torchvision's inception_v3 by their names"
        )
    params = {}
    for name in names:
        lacking = [
            key
            for key in ("weight", "bias", "running_mean", "running_var")
            if f"{name}.bn.{key}" not in arrays
        ]
        if lacking:
            raise ValueError(f"the weights lack {name}.bn.{lacking[0]}")
        kernel = np.asarray(arrays[f"{name}.conv.weight"], np.float64)
        weight, bias, mean, variance = (
            np.asarray(arrays[f"{name}.bn.{key}"], np.float64)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + _NORM_EPSILON)
        params[name] = {
            "conv": {
                "kernel": (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32),
                "bias": (bias - mean * scale).astype(np.float32),
            }
        }
    return params


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionFeatures:
    """Images -> features, in batches of one compiled shape.

    Attributes:
      params: of `convert_weights`.
      variant: of the network, see the top of this file.
      resizing: see `resizing`.
      batch_size: images at once; the last batch is padded.
      image_size: of the network's input; 299 in all published results.
      width: see `InceptionV3`.
    """

    params: Any
    variant: Variant = "fid"
    resizing: Resizing = "clean"
    batch_size: int = 32
    image_size: int = IMAGE_SIZE
    width: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("variant", VARIANTS), ("resizing", RESIZINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: "
                    f"{', '.join(map(repr, allowed))}"
                )

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float32[np.ndarray, "images features"]:
        """Features of images of any sizes."""
        rows = []
        for start in range(0, len(images), self.batch_size):
            some = images[start : start + self.batch_size]
            pixels = resize_batch(some, self.image_size, self.resizing)
            filling = ((0, self.batch_size - len(some)), (0, 0), (0, 0), (0, 0))
            padded = np.pad(pixels, filling)
            found = _run(self.variant, self.width, self.params, padded)
            rows.append(np.asarray(found)[: len(some)])
        if not rows:
            return np.zeros((0, NUM_FEATURES // self.width), np.float32)
        return np.concatenate(rows)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the features, for results and saved statistics."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return {
            "network": f"inception-v3 ({self.variant})",
            "weights": digest.hexdigest()[:16],
            "resizing": self.resizing,
            "image_size": self.image_size,
        }


def scale_pixels(
    pixels: Float[Array, "b h w 3"], variant: Variant
) -> Float[Array, "b h w 3"]:
    """0..255 -> [-1, 1] ("fid"), or ImageNet's normalisation ("torchvision")."""
    unit = pixels / 255
    if variant == "fid":
        return 2 * unit - 1
    return (unit - jnp.asarray(_IMAGENET_MEAN)) / jnp.asarray(_IMAGENET_STD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    variant: Variant, width: int, params: Any, pixels: Float[Array, "b h w 3"]
) -> Float[Array, "b features"]:
    model = InceptionV3(variant, width)
    features = model.apply({"params": params}, scale_pixels(pixels, variant))
    return jnp.asarray(features)
