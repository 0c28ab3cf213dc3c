"""The settings of the suites: the keys of `settings` in files of `configs/eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from racm3_jax.limits import check_choices, check_range
from racm3_jax.types import Modality

COCO_VARIANTS = ("retrieval", "no_retrieval", "copy", "random")
LIKELIHOOD_VARIANTS = ("retrieval", "no_retrieval", "random", "copy", "twin")


def _check_variants(variants: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = sorted(set(variants) - set(allowed))
    if unknown or not variants:
        raise ValueError(
            f"variants {unknown or 'are missing'}; allowed: {', '.join(allowed)}"
        )


@dataclasses.dataclass(frozen=True)
class CocoSettings:
    """How the suite coco samples and computes.

    Attributes:
      task: "text_to_image" or "captioning".
      image_size: side to which real images are cropped and resampled (256 in the paper).
      variants: which of "retrieval", "no_retrieval", "copy", "random" are run.
      num_retrieved: documents before each prompt.
      num_samples: of each prompt; the best by the retrieval CLIP (images) or by
        likelihood (captions) is kept. The paper uses 10 and 32.
      temperature, top_p: of the sampling.
      prefix: begins every caption ("Photo of" in the paper).
      max_similarity: CLIP similarity above which an image of the memory counts as a
        near-duplicate of a test image and is not retrieved.
      seed: item i has the seed `seed + i`.
      chunk_size: the most items lost when the run is killed.
      num_resamples: of the bootstrap of captions and CLIPScores.
      num_distance_resamples: of the bootstrap of Fréchet distances, which are slow.
      num_sheet_rows: of the image sheet.
    """

    task: Literal["text_to_image", "captioning"]
    image_size: int = 256
    variants: tuple[str, ...] = COCO_VARIANTS
    num_retrieved: int = 2
    num_samples: int = 10
    temperature: float = 1.0
    top_p: float = 0.9
    prefix: str = ""
    max_similarity: float = 0.95
    seed: int = 0
    chunk_size: int = 64
    num_resamples: int = 1000
    num_distance_resamples: int = 20
    num_sheet_rows: int = 8

    def __post_init__(self) -> None:
        check_choices(self, "settings", task=("text_to_image", "captioning"))
        _check_variants(self.variants, COCO_VARIANTS)
        check_range(self, "settings", "chunk_size", "num_retrieved", low=1)


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """How the suite likelihood scores.

    Attributes:
      variants: which of "retrieval", "no_retrieval", "random", "copy", "twin" are run.
      num_retrieved: documents before each one.
      query: the part of a document that is the query, as in training.
      max_similarity: CLIP similarity of images above which a document of the memory counts
        as a near-duplicate of a test document and is not retrieved.
      recall_ks: the k of recall@k.
      shots: numbers of demonstrations per label; empty leaves k-shot out.
      num_ways: labels to choose from.
      num_episodes: questions of k-shot.
      seed: of random retrieval and of the questions.
      chunk_size: the most items lost when the run is killed.
      num_rows: sequences in one forward pass.
      num_resamples: of the bootstrap.
      num_sheet_rows: of the image sheet.
    """

    variants: tuple[str, ...] = LIKELIHOOD_VARIANTS
    num_retrieved: int = 2
    query: Modality = "text"
    max_similarity: float = 0.95
    recall_ks: tuple[int, ...] = (1, 5, 10)
    shots: tuple[int, ...] = (0, 1, 2)
    num_ways: int = 2
    num_episodes: int = 400
    seed: int = 0
    chunk_size: int = 64
    num_rows: int = 8
    num_resamples: int = 1000
    num_sheet_rows: int = 8

    def __post_init__(self) -> None:
        _check_variants(self.variants, LIKELIHOOD_VARIANTS)
        check_choices(self, "settings", query=("text", "image"))
        counts = ("num_retrieved", "chunk_size", "num_rows", "num_episodes")
        check_range(self, "settings", *counts, low=1)
