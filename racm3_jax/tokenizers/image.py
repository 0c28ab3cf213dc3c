"""The image tokenizer: images to codes and back, with a trained VQGAN."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Int32, UInt8

from racm3_jax import sharding
from racm3_jax.checkpoints import build_config, load_weights, save_weights
from racm3_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import normalize_images

KIND = "vqgan"


class ImageTokenizer:
    """A frozen VQGAN; compiled once per direction, for any number of images.

    Attributes:
      config: shape of the network.
      params: unboxed parameters of `VQGAN`, replicated on all devices.
      batch_size: images per device at a time; the last batch is padded.
      mesh: devices over which images are split; None is JAX's default device.
    """

    def __init__(
        self,
        config: VQGANConfig,
        params: Mapping[str, Any],
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ) -> None:
        """Puts the parameters on the devices.

        Args:
          config: shape of the network.
          params: of `VQGAN`, boxed or not.
          batch_size: larger batches need more memory.
          mesh: devices over which images are split; all of this process by default.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}")
        self.config = config
        self.mesh = sharding.local_mesh() if mesh is None else mesh
        self.params = sharding.put_copies(nn.meta.unbox(dict(params)), self.mesh)
        self.batch_size = batch_size
        model: Any = VQGAN(config)

        def encode(params, images):
            return model.apply(
                {"params": params}, normalize_images(images), method="encode_codes"
            )

        def decode(params, codes):
            images = model.apply({"params": params}, codes, method="decode_codes")
            pixels = jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5)
            return pixels.astype(jnp.uint8)

        each = sharding.on_each_device
        self._encode = jax.jit(lambda params, rows: each(encode, params, rows))
        self._decode = jax.jit(lambda params, rows: each(decode, params, rows))

    def on_mesh(self, mesh: Mesh) -> Self:
        """The same tokenizer on other devices; shares compiled code."""
        other = copy.copy(self)
        other.mesh, other.params = mesh, sharding.put_copies(self.params, mesh)
        return other

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def image_length(self) -> int:
        """Codes of one image."""
        return self.config.image_length

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.image_size

    def resized(self, image_size: int) -> ImageTokenizer:
        """The same weights for images of another size, with the same codebook.

        Raises:
          ValueError: the size is not a multiple of a code's size.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        return ImageTokenizer(config, self.params, self.batch_size, self.mesh)

    def encode(
        self, images: UInt8[np.ndarray, "images height width 3"]
    ) -> Int32[np.ndarray, "images length"]:
        """Encodes images to codes, row by row from the top left.

        Raises:
          ValueError: not uint8, or not `image_size` pixels high and wide.
        """
        images = np.asarray(images)
        shape = (self.image_size, self.image_size, 3)
        if images.shape[1:] != shape or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8[n, {self.image_size}, {self.image_size}, 3]; got "
                f"{images.dtype}{list(images.shape)}; see documents.images.resize_image"
            )
        empty = np.zeros((0, self.image_length), np.int32)
        return self._in_batches(self._encode, images, empty)

    def decode(
        self, codes: Int[np.ndarray, "images length"]
    ) -> UInt8[np.ndarray, "images height width 3"]:
        """Decodes codes to images.

        Raises:
          ValueError: not `image_length` codes per image, or an index outside the
            codebook.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.image_length:
            raise ValueError(
                f"codes must be int[n, {self.image_length}]; got {list(codes.shape)}"
            )
        if codes.size and not (0 <= codes.min() and codes.max() < self.num_codes):
            raise ValueError(
                f"codes lie in 0..{self.num_codes - 1}; got {codes.min()}..{codes.max()}"
            )
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return self._in_batches(self._decode, codes.astype(np.int32), empty)

    def fingerprint(self) -> str:
        """Equal for equal config and weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def save(
        self, directory: str | os.PathLike[str], *, dtype: str | None = None
    ) -> None:
        """Writes weights and config; `dtype` as in `checkpoints.save_weights`."""
        save_weights(
            directory,
            jax.device_get(self.params),
            kind=KIND,
            config=dataclasses.asdict(self.config),
            dtype=dtype,
        )

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], batch_size: int = 64
    ) -> ImageTokenizer:
        """Loads and verifies what `save` wrote.

        Raises:
          CheckpointError: missing, damaged, or not the weights of a VQGAN.
        """
        params, config, _ = load_weights(directory, KIND)
        config = build_config(VQGANConfig, config, Path(directory))
        return cls(config, params, batch_size)

    def _in_batches(
        self, compute: Callable, rows: np.ndarray, empty: np.ndarray
    ) -> np.ndarray:
        parts = sharding.map_batches(
            functools.partial(compute, self.params), [rows], self.batch_size, self.mesh
        )
        return np.concatenate([empty, *parts])


def compute_psnr(
    images: UInt8[np.ndarray, "images height width 3"],
    others: UInt8[np.ndarray, "images height width 3"],
) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair, in decibels; 100 if they are equal."""
    error = images.astype(np.float64) - others.astype(np.float64)
    mean = np.square(error).reshape(len(images), -1).mean(1)
    return 10.0 * np.log10(255.0**2 / np.maximum(mean, 255.0**2 * 1e-10))


def compute_codebook_usage(
    codes: Int[np.ndarray, "images length"], num_codes: int
) -> tuple[float, float]:
    """Fraction of the codebook that occurs in `codes`, and the codes' perplexity."""
    counts = np.bincount(np.asarray(codes).reshape(-1), minlength=num_codes)
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float((counts > 0).mean()), float(np.exp(-(p * np.log(p)).sum()))
