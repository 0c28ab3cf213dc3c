"""CLIPScore: does the image match the text, by a CLIP that did not choose it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from racm3_jax.retrieval.embedder import DocumentEmbedder

_SCALE = 2.5
PROMPT = "A photo depicts "


@dataclasses.dataclass(frozen=True, eq=False)
class CLIPScorer:
    """CLIPScore (arXiv 2104.08718): 2.5 × max(cos(image, text), 0).

    Attributes:
      embedder: the CLIP. If it also retrieved or re-ranked the images, it favours its own
        choices; the results must say so (`settings`).
      prompt: text before every caption, as in the paper.
    """

    embedder: DocumentEmbedder
    prompt: str = PROMPT

    def score(
        self,
        images: Sequence[UInt8[np.ndarray, "height width 3"]],
        texts: Sequence[str],
    ) -> Float32[np.ndarray, " pairs"]:
        """The score of each image with its text.

        Raises:
          ValueError: if there are not as many texts as images.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"every image needs its text; got {len(images)} images and "
                f"{len(texts)} texts"
            )
        if not len(images):
            return np.zeros(0, np.float32)
        found = self.embedder.embed_texts([self.prompt + text for text in texts])
        return score_embeddings(
            self.embedder.align(embed_any_size(self.embedder, images)),
            self.embedder.align(found),
        )

    def settings(self, retrieval: DocumentEmbedder | None) -> dict[str, Any]:
        """The settings of the scores, for results.

        Args:
          retrieval: the model that retrieves and re-ranks, or None without one.
        """
        own = self.embedder.fingerprint()
        return {
            "clip": own,
            "prompt": self.prompt,
            "is_retrieval_model": retrieval is not None
            and retrieval.fingerprint() == own,
        }


def score_embeddings(
    images: Float32[np.ndarray, "pairs d_embed"],
    texts: Float32[np.ndarray, "pairs d_embed"],
) -> Float32[np.ndarray, " pairs"]:
    """CLIPScore of unit rows."""
    return _SCALE * np.maximum((images * texts).sum(1), 0)


def embed_any_size(
    embedder: DocumentEmbedder, images: Sequence[UInt8[np.ndarray, "height width 3"]]
) -> Float32[np.ndarray, "images d_embed"]:
    """Embeds images of any sizes; also the features of CLIP-FID."""
    return embedder.embed_images(list(images))


@dataclasses.dataclass(frozen=True, eq=False)
class CLIPFeatures:
    """CLIP's image embeddings as the features of a Fréchet distance (CLIP-FID).

    Source: arXiv 2203.06026. It depends on content, where FID depends on texture.
    """

    embedder: DocumentEmbedder

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float32[np.ndarray, "images d_embed"]:
        return embed_any_size(self.embedder, images)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the features."""
        return {"network": "clip", "weights": self.embedder.fingerprint()}
