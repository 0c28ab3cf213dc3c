"""Runs the models on documents: chunks of tokens, embeddings and queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt64

from racm3_jax.progress import StageClock
from racm3_jax.types import Document, Segment, TokenizedDocument
from racm3_jax.vocab import Vocab

CHUNK_SIZE = 512


class DocumentTokenizer(Protocol):
    """The interface of `MixedTokenizer` that a build uses."""

    @property
    def vocab(self) -> Vocab:
        """Its vocabulary."""
        ...

    def fit_images(self, images: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Images of any size as it tokenises them; these it does not resize again."""
        ...

    def tokenize(self, documents: Iterable[Document]) -> Iterable[TokenizedDocument]:
        """One tokenised document for each document, in order."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal tokens."""
        ...


class Embedder(Protocol):
    """The interface of `DocumentEmbedder` that a build uses; rows are f32[n, d_embed].

    Attributes:
      config: `image_size` is the side to which images are resized, in pixels.
      d_embed: width of the rows.
    """

    config: Any
    d_embed: int

    def embed_texts(self, texts: list[str], drop: float, rng: Any) -> np.ndarray:
        """Unit rows, with a fraction `drop` of each text's tokens dropped."""
        ...

    def fit_images(self, images: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Images of any size as it embeds them; these it does not resize again."""
        ...

    def embed_images(
        self, images: Sequence[np.ndarray], drop: float, rng: Any
    ) -> np.ndarray:
        """Unit rows of images of any size; a fraction `drop` of patches is dropped."""
        ...

    def align(self, rows: np.ndarray) -> np.ndarray:
        """Unit rows by which texts are compared with images, from rows of either."""
        ...

    def embed_documents(self, documents: list[Document]) -> Sequence[np.ndarray]:
        """Text embeddings, image embeddings (zero rows if absent), documents, …."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal embeddings."""
        ...


class MemoryChunk(NamedTuple):
    """Consecutive documents, ready to be written.

    Attributes:
      documents: tokenised.
      text: unit rows; zero if a document has no text.
      image: unit rows; zero if it has no image.
      document: normalised mean of the non-zero text and image rows.
      text_queries: unit rows with query dropout, one per variant; zero if absent.
      image_queries: the same for images.
      content_hashes: of text and pixels together; None if unknown.
      image_hashes: perceptual hash of the first image; 0 without an image; None if
        unknown.
    """

    documents: Sequence[TokenizedDocument]
    text: Float[np.ndarray, "n d_embed"]
    image: Float[np.ndarray, "n d_embed"]
    document: Float[np.ndarray, "n d_embed"]
    text_queries: Float[np.ndarray, "n variants d_embed"]
    image_queries: Float[np.ndarray, "n variants d_embed"]
    content_hashes: UInt64[np.ndarray, " n"] | None = None
    image_hashes: UInt64[np.ndarray, " n"] | None = None


def make_chunk(
    documents: list[Document],
    fitted: list[Document],
    tokenizer: DocumentTokenizer,
    embedder: Embedder,
    query_drop: float,
    rngs: Sequence[np.random.Generator],
    clock: StageClock,
) -> MemoryChunk:
    """Runs the models on some documents.

    Args:
      documents: each with text or images, of any size.
      fitted: the same documents; their images are those of `embedder.fit_images`.
      tokenizer: of text and images.
      embedder: of text and images.
      query_drop: fraction of tokens or patches that training queries drop.
      rngs: one per query variant.
      clock: counts the stages.
    """
    with clock.measure("tokenizing"):
        tokenized = tokenize(documents, tokenizer)
    with clock.measure("embedding"):
        text, image, document = embedder.embed_documents(fitted)[:3]
    with clock.measure("training queries"):
        queries = embed_queries(fitted, embedder, query_drop, rngs)
    return MemoryChunk(tokenized, text, image, document, *queries)


def fit_document(document: Document, model: DocumentTokenizer | Embedder) -> Document:
    """The document with its images as the model wants them."""
    fitted = iter(model.fit_images(document.images))
    segments = (
        segment if segment.image is None else Segment(image=next(fitted))
        for segment in document.segments
    )
    return dataclasses.replace(document, segments=tuple(segments))


def tokenize(
    documents: list[Document], tokenizer: DocumentTokenizer
) -> list[TokenizedDocument]:
    """Tokenises documents.

    Raises:
      ValueError: the tokenizer returned other documents.
    """
    tokenized = list(tokenizer.tokenize(documents))
    if [t.id for t in tokenized] != [d.id for d in documents]:
        raise ValueError(
            f"the tokenizer returned {len(tokenized)} documents for the "
            f"{len(documents)} that begin with {documents[0].id!r}, or in another order"
        )
    return tokenized


def embed_queries(
    documents: Sequence[Document],
    embedder: Embedder,
    drop: float,
    rngs: Sequence[np.random.Generator],
) -> tuple[
    Float32[np.ndarray, "n variants d_embed"], Float32[np.ndarray, "n variants d_embed"]
]:
    """Text and image queries with query dropout; zero rows if absent.

    The image query of a document with several images is their normalised mean.

    Args:
      documents: each with text or images.
      embedder: computes the rows.
      drop: fraction of tokens or patches dropped.
      rngs: one per variant.
    """
    texts = [document.text for document in documents]
    with_text = np.asarray([i for i, text in enumerate(texts) if text.strip()], int)
    owners = np.asarray([i for i, d in enumerate(documents) for _ in d.images], int)
    images = [image for d in documents for image in d.images]
    shape = (len(documents), len(rngs), embedder.d_embed)
    text_queries, image_queries = np.zeros((2, *shape), np.float32)
    for variant, rng in enumerate(rngs):
        if len(with_text):
            rows = embedder.embed_texts([texts[i] for i in with_text], drop, rng)
            text_queries[with_text, variant] = rows
        if images:
            rows = embedder.embed_images(images, drop, rng)
            sums = np.zeros((len(documents), embedder.d_embed), np.float32)
            np.add.at(sums, owners, rows)
            image_queries[:, variant] = sums
    norms = np.linalg.norm(image_queries, axis=-1, keepdims=True)
    return text_queries, image_queries / np.where(norms > 0, norms, 1)
