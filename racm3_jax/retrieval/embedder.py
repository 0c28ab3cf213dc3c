"""Embeds documents, texts and images as unit vectors with a trained CLIP.

    text part  = normalise(embedding of its text)              E_Q and E_M of RA-CM3
    image part = normalise(mean of its images' embeddings)     (arXiv 2211.12561, 3.1)
    document   = normalise(text part + image part)

A query is a text or image embedding; its score for a document is the inner product.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int, UInt8

from racm3_jax import checkpoints, sharding
from racm3_jax.retrieval.alignment import Alignment, measure_alignment
from racm3_jax.retrieval.clip import (
    CLIP,
    CLIPConfig,
    CLIPTokenizer,
    count_kept_patches,
    cut_patches,
    normalise_images,
)
from racm3_jax.retrieval.clip_images import fit_image
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.types import Document

KIND = "clip"
TOKENIZER_NAME = "tokenizer.json"

# Text rows are cut to a multiple of this length: few compiled shapes, little padding.
_LENGTH_BUCKET = 8


class DocumentEmbeddings(NamedTuple):
    """Unit rows; zero rows for a modality that a document lacks.

    Attributes:
      text: embedding of all the document's text.
      image: normalised mean over its images.
      document: normalised mean of the non-zero ones; this is what an index holds.
      has_text: True if there is text.
      has_image: True if there is an image.
    """

    text: Float32[np.ndarray, "documents d_embed"]
    image: Float32[np.ndarray, "documents d_embed"]
    document: Float32[np.ndarray, "documents d_embed"]
    has_text: Bool[np.ndarray, " documents"]
    has_image: Bool[np.ndarray, " documents"]


class DocumentEmbedder:
    """A frozen CLIP with its tokenizer; compiled once per batch shape.

    Attributes:
      config: sizes of the towers.
      params: their (unboxed) parameters, replicated on all devices.
      tokenizer: texts -> token rows.
      batch_size: rows per device at a time; the last batch is padded.
      alignment: of texts with images, if measured; stored with the weights.
      mesh: devices over which rows are split; None is JAX's default device.
    """

    def __init__(
        self,
        config: CLIPConfig,
        params: Mapping[str, Any],
        tokenizer: TextTokenizer,
        batch_size: int = 128,
        alignment: Alignment | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Puts the parameters on the devices.

        Args:
          config: sizes of the towers.
          params: with the shapes of `clip.init_params`, unboxed.
          tokenizer: the text tokenizer of the text tower's training.
          batch_size: larger batches need more memory.
          alignment: measured for these weights.
          mesh: devices over which rows are split; all of this process by default.

        Raises:
          ValueError: the text tower has another vocabulary.
        """
        self.config = config
        self.mesh = sharding.local_mesh() if mesh is None else mesh
        self.params = sharding.put_copies(params, self.mesh)
        self.text_tokenizer = tokenizer
        self.tokenizer = CLIPTokenizer(tokenizer, config.context_length)
        self.batch_size = batch_size
        self.alignment = alignment
        if self.tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"clip.vocab_size is {config.vocab_size}, but the text tokenizer has "
                f"{tokenizer.vocab_size} ids and <start> and <end> make "
                f"{self.tokenizer.vocab_size}; use the tokenizer of the CLIP's training"
            )

    def on_mesh(self, mesh: Mesh) -> Self:
        """The same embedder on other devices."""
        other = copy.copy(self)
        other.mesh, other.params = mesh, sharding.put_copies(self.params, mesh)
        return other

    @property
    def d_embed(self) -> int:
        return self.config.d_embed

    def embed_texts(
        self,
        texts: Sequence[str],
        drop: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> Float32[np.ndarray, "texts d_embed"]:
        """Embeds texts, dropping a fraction `drop` of the tokens of each.

        Args:
          texts: any strings, truncated to `config.context_length` tokens.
          drop: fraction of tokens to drop (query dropout), in [0, 1).
          rng: randomness of the dropout; needed if `drop` > 0.
        """
        tokens = self.tokenizer.encode_batch(texts, drop, rng)
        length = 1 + int((tokens == self.config.end).argmax(axis=1).max(initial=0))
        length = -(-length // _LENGTH_BUCKET) * _LENGTH_BUCKET
        return self._embed(encode_texts, tokens[:, :length])

    def embed_images(
        self,
        images: UInt8[np.ndarray, "images height width 3"]
        | Sequence[UInt8[np.ndarray, "height width 3"]],
        drop: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> Float32[np.ndarray, "images d_embed"]:
        """Embeds images, dropping a fraction `drop` of the patches of each.

        Args:
          images: pixels 0..255, as one array or a list with any sizes; images of
            another size than the tower's are resized by `clip_images.fit_image`.
          drop: fraction of patches to drop (query dropout), in [0, 1).
          rng: randomness of the dropout; needed if `drop` > 0.

        Raises:
          ValueError: not uint8[height, width, 3] each.
        """
        images = self.fit_images(images)
        kept = _sample_kept_patches(len(images), self.config.num_patches, drop, rng)
        # On the host: an accelerator pads an axis of three colours to its lanes, a TPU
        # to 128 of them.
        patches = cut_patches(images, self.config.patch_size)
        if kept is None:
            return self._embed(encode_patches, patches)
        return self._embed(encode_patches, patches, kept)

    def fit_images(
        self,
        images: UInt8[np.ndarray, "images height width 3"]
        | Sequence[UInt8[np.ndarray, "height width 3"]],
    ) -> UInt8[np.ndarray, "images size size 3"]:
        """Images of any size at the size of the tower, as `embed_images` does first.

        Raises:
          ValueError: not uint8[height, width, 3] each.
        """
        return _fit_images(images, self.config.image_size)

    def align(
        self, rows: Float32[np.ndarray, "rows d_embed"]
    ) -> Float32[np.ndarray, "rows aligned"]:
        """Unit rows of the numbers by which a text is compared with an image."""
        dims = self.config.aligned_dims
        return _normalise(rows[:, :dims]) if dims else rows

    def embed_documents(self, documents: Sequence[Document]) -> DocumentEmbeddings:
        """Embeds the text, the images and the whole of each document."""
        texts = [document.text for document in documents]
        has_text = np.array([bool(text.strip()) for text in texts], bool)
        with_text = np.flatnonzero(has_text)
        text = np.zeros((len(documents), self.d_embed), np.float32)
        text[with_text] = self.embed_texts([texts[i] for i in with_text])

        owners = np.array([i for i, d in enumerate(documents) for _ in d.images], int)
        image = np.zeros_like(text)
        images = [image for document in documents for image in document.images]
        np.add.at(image, owners, self.embed_images(images))
        image = _normalise(image)
        has_image = np.bincount(owners, minlength=len(documents)) > 0
        return DocumentEmbeddings(
            text, image, _normalise(text + image), has_text, has_image
        )

    def fingerprint(self) -> str:
        """Equal for embedders with equal embeddings."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        fields = self.config.of_weights()
        digest.update(json.dumps(fields, sort_keys=True).encode())
        digest.update(self.text_tokenizer.fingerprint().encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Writes weights, config and text tokenizer into a folder of their own.

        Args:
          directory: created if missing; replaces another CLIP.
          dtype: "float16" halves the file. The loaded embedder then differs slightly
            from this one, also in its fingerprint: build memories with the loaded one.

        Raises:
          FileExistsError: `directory` holds something else.
        """
        with checkpoints.weights_folder(directory, KIND) as folder:
            checkpoints.write_weights(
                folder,
                jax.device_get(self.params),
                kind=KIND,
                config=self.config.of_weights(),
                extra={}
                if self.alignment is None
                else {"alignment": self.alignment.to_json()},
                dtype=dtype,
            )
            self.text_tokenizer.save(folder / TOKENIZER_NAME)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        batch_size: int = 128,
        compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> DocumentEmbedder:
        """Loads an embedder from `save`.

        Args:
          directory: written by `save`.
          batch_size: larger batches need more memory.
          compute_dtype: see `CLIPConfig`.

        Raises:
          CheckpointError: a missing or damaged directory, or another kind of model.
        """
        directory = Path(directory)
        params, fields, extra = checkpoints.load_weights(directory, KIND)
        tokenizer = TextTokenizer.load(directory / TOKENIZER_NAME)
        config = checkpoints.build_config(CLIPConfig, fields, directory)
        config = dataclasses.replace(config, compute_dtype=compute_dtype)
        alignment = Alignment.from_json(extra.get("alignment"))
        return cls(config, params, tokenizer, batch_size, alignment)

    def measure(self, documents: Sequence[Document]) -> Alignment:
        """Measures the alignment of texts with images of documents; stored by `save`.

        Args:
          documents: each with a text and an image, not seen in training.

        Raises:
          ValueError: fewer than two of them.
        """
        found = self.embed_documents(documents)
        both = found.has_text & found.has_image
        self.alignment = measure_alignment(
            self.align(found.text[both]), self.align(found.image[both])
        )
        return self.alignment

    def _embed(
        self, encode: Callable[..., Array], *columns: np.ndarray
    ) -> Float32[np.ndarray, "rows d_embed"]:
        parts = sharding.map_batches(
            lambda *rows: encode(self.config, self.params, *rows),
            columns,
            self.batch_size,
            self.mesh,
        )
        return np.concatenate([np.zeros((0, self.d_embed), np.float32), *parts])


@functools.partial(jax.jit, static_argnums=0)
def encode_texts(
    config: CLIPConfig, params: Any, tokens: Int[Array, "batch length"]
) -> Float32[Array, "batch d_embed"]:
    """Unit embeddings of tokenized texts; see `sharding.on_each_device`."""
    model: Any = CLIP(config)

    def encode(params: Any, tokens: Array) -> Array:
        found = model.apply({"params": params}, tokens, method=CLIP.encode_text)
        return _normalise_on_device(found)

    return sharding.on_each_device(encode, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def encode_patches(
    config: CLIPConfig,
    params: Any,
    patches: UInt8[Array, "batch patches values"],
    kept_patches: Int[Array, "batch kept"] | None = None,
) -> Float32[Array, "batch d_embed"]:
    """Unit embeddings of images with pixels 0..255, cut by `clip.cut_patches`.

    Args:
      config: sizes of the towers.
      params: of the towers.
      patches: of the images.
      kept_patches: row-major indices of the patches to use; None means all.
    """
    model: Any = CLIP(config)

    def encode(params: Any, patches: Array, kept: Array | None = None) -> Array:
        pixels = normalise_images(patches, config)
        found = model.apply(
            {"params": params}, pixels, kept, method=CLIP.encode_patches
        )
        return _normalise_on_device(found)

    rows = (patches,) if kept_patches is None else (patches, kept_patches)
    return sharding.on_each_device(encode, params, *rows)


def _normalise_on_device(
    x: Float32[Array, "rows d_embed"],
) -> Float32[Array, "rows d_embed"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _normalise(
    rows: Float32[np.ndarray, "rows d_embed"],
) -> Float32[np.ndarray, "rows d_embed"]:
    """Unit rows; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _fit_images(images: Any, size: int) -> UInt8[np.ndarray, "images size size 3"]:
    """One array of square images, from one array or a list with any sizes.

    Raises:
      ValueError: not 8-bit RGB.
    """
    one_array = isinstance(images, np.ndarray)
    for image in images[:1] if one_array else images:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            found = images if one_array else image
            raise ValueError(
                "images must be uint8[images, height, width, 3], or a list of "
                f"uint8[height, width, 3]; got {found.dtype}{list(found.shape)}"
            )
    if not len(images):
        return np.zeros((0, size, size, 3), np.uint8)
    if one_array and images.shape[1:3] == (size, size):
        return images
    return np.stack([fit_image(image, size) for image in images])


def _sample_kept_patches(
    num_images: int, num_patches: int, drop: float, rng: np.random.Generator | None
) -> Int[np.ndarray, "images kept"] | None:
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1); got {drop}")
    if drop == 0:
        return None
    if rng is None:
        raise ValueError("drop > 0 needs an rng; pass np.random.default_rng(seed)")
    order = rng.random((num_images, num_patches)).argsort(axis=1)
    return np.sort(order[:, : count_kept_patches(num_patches, drop)], axis=1)
