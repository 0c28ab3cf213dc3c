"""Which sample is best, and which is too close to what was retrieved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Int, UInt8

from racm3_jax.types import Retrieved
from racm3_jax.vocab import Vocab

if TYPE_CHECKING:
    from racm3_jax.retrieval.embedder import DocumentEmbedder

RankBy = Literal["clip", "likelihood"]
RANKINGS: tuple[RankBy, ...] = ("clip", "likelihood")
# Share of codes equal to those of a retrieved image, place by place, from which a drawing
# is called a near copy. Two drawings of the same scene share far fewer.
NEAR_COPY = 0.9


def check_rank_by(rank_by: str) -> None:
    """Refuses other rankings."""
    if rank_by not in RANKINGS:
        raise ValueError(
            f"rank_by is {rank_by!r}; allowed: {', '.join(map(repr, RANKINGS))}"
        )


def score_by_clip(
    embedder: DocumentEmbedder,
    queries: Float32[np.ndarray, "prompts d_embed"],
    images: UInt8[np.ndarray, "prompts samples height width 3"],
) -> Float32[np.ndarray, "prompts samples"]:
    """Similarity of each prompt with its images, as the paper ranks (section 4)."""
    prompts, samples = images.shape[:2]
    embeddings = embedder.embed_images(images.reshape(-1, *images.shape[2:]))
    return np.einsum("nd,nsd->ns", queries, embeddings.reshape(prompts, samples, -1))


def find_nearest(
    tokens: Int[np.ndarray, "samples image_length"], retrieved: Retrieved, vocab: Vocab
) -> list[dict[str, Any]]:
    """How close each drawn image is to the closest retrieved one.

    Returns:
      For each sample `{"nearest": {"id", "equal_codes"}, "near_copy"}`; empty when no
      retrieved document has an image.
    """
    images = [
        (document.id, segment.tokens)
        for document in retrieved.documents
        for segment in document.segments
        if segment.modality == "image" and len(segment.tokens) == vocab.image_length
    ]
    if not images:
        return [{} for _ in tokens]
    shares = np.stack([(tokens == other).mean(-1) for _, other in images], axis=1)
    closest = shares.argmax(1)
    return [
        {
            "nearest": {"id": images[i][0], "equal_codes": round(float(row[i]), 4)},
            "near_copy": bool(row[i] >= NEAR_COPY),
        }
        for row, i in zip(shares, closest, strict=True)
    ]
