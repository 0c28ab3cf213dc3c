"""How well a CLIP aligns texts and images: measured once, stored with its weights.

    row i of the texts belongs to row i of the images

    recall@1      is a text's own image nearer to it than all others?  (and vice versa)
    preference    is it nearer than one other? Mean over all others; chance is 0.5.
                  Independent of the number of pairs.

A CLIP that was trained to separate texts and images would rank generated samples by
noise: `may_rank` says whether it is good enough for ranking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Int64

# Samples for one prompt are more similar than images of different documents, so a CLIP
# for ranking must tell the latter apart nearly always.
MIN_PREFERENCE = 0.9
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Measured alignment.

    Attributes:
      num_pairs: number of text-image pairs; recall@1 by chance is 1 / num_pairs.
      text_to_image: recall@1 of images by their texts.
      image_to_text: recall@1 of texts by their images.
      preference: how often a text prefers its own image over another one.
      own_similarity: mean inner product of a text and its own image.
      other_similarity: of a text and another document's image.
    """

    num_pairs: int
    text_to_image: float
    image_to_text: float
    preference: float
    own_similarity: float
    other_similarity: float

    @property
    def chance(self) -> float:
        """Recall@1 by chance."""
        return 1 / self.num_pairs

    @property
    def may_rank(self) -> bool:
        """Whether samples may be ranked by their similarity to the prompt."""
        return self.preference >= MIN_PREFERENCE

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | None) -> Self | None:
        """None if nothing was measured.

        Raises:
          ValueError: other fields than those of a measurement.
        """
        if not fields:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(
                f"alignment has the fields {sorted(fields)}; expected {sorted(names)}: "
                "measure the CLIP again"
            )
        return cls(**fields)


def compute_ranks(
    queries: Float32[np.ndarray, "pairs d_embed"],
    candidates: Float32[np.ndarray, "pairs d_embed"],
) -> Int64[np.ndarray, " pairs"]:
    """Number of other candidates at least as near as a query's own; 0 is best."""
    ranks = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ candidates.T
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        ranks.append((scores >= own[:, None]).sum(1) - 1)
    return np.concatenate(ranks).astype(np.int64)


def measure_alignment(
    texts: Float32[np.ndarray, "pairs d_embed"],
    images: Float32[np.ndarray, "pairs d_embed"],
) -> Alignment:
    """Measures the alignment of unit rows, row i with row i.

    Raises:
      ValueError: fewer than two pairs, or other shapes.
    """
    if len(texts) < 2 or texts.shape != images.shape:
        raise ValueError(
            "alignment needs at least two texts and as many images; got "
            f"{list(texts.shape)} and {list(images.shape)}"
        )
    num_pairs = len(texts)
    by_text, by_image = compute_ranks(texts, images), compute_ranks(images, texts)
    own = np.einsum("nd,nd->n", texts, images).astype(np.float64)
    total = float(texts.sum(0, dtype=np.float64) @ images.sum(0, dtype=np.float64))
    return Alignment(
        num_pairs=num_pairs,
        text_to_image=float((by_text == 0).mean()),
        image_to_text=float((by_image == 0).mean()),
        preference=float(1 - by_text.mean() / (num_pairs - 1)),
        own_similarity=float(own.mean()),
        other_similarity=(total - float(own.sum())) / (num_pairs * (num_pairs - 1)),
    )
