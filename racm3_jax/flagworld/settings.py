"""The settings of both suites: the keys of `settings` in files of `configs/eval`."""

from __future__ import annotations

import dataclasses

from racm3_jax.generation.classification import CLASSIFY_BY, ClassifyBy
from racm3_jax.generation.settings import REGION_PROMPTS, RegionPrompt


@dataclasses.dataclass(frozen=True)
class FlagworldSettings:
    """How the suite flagworld samples.

    Attributes:
      num_retrieved: documents before each prompt (2 in the paper).
      temperature, top_p: of text to image.
      guidance: of text to image with retrieval, against generation without the documents
        and the text; 1 is none.
      caption_temperature: of the captions; 0 is greedy.
      caption_guidance: of the captions with retrieval, against captions without the
        documents; 1 is none.
      caption_candidates: documents retrieved for a caption, of which the `num_retrieved`
        after which the image is most likely are kept; 0 keeps the retriever's order.
      num_reading: questions with one right and one wrong document, in both orders (see
        `reading`); at most the held-out nations.
      seed: of all sampling.
    """

    num_retrieved: int = 2
    temperature: float = 1.0
    top_p: float = 0.9
    guidance: float = 1.0
    caption_temperature: float = 0.0
    caption_guidance: float = 1.0
    caption_candidates: int = 0
    num_reading: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How the suite flagworld_tasks samples.

    Attributes:
      num_items: how many test documents; 0 is all.
      num_retrieved: documents before each prompt (2 in the paper).
      temperature, top_p: of all generated images.
      max_spans: of infilling and editing (see `generation.regions`).
      region_prompts: to compare in infilling and editing (see `generation.infilling`).
      guidance: weights to compare, besides 1; the documents are in both streams.
      document_guidance: the same, but without documents in the second stream; tasks with
        documents are run without guidance and with the last of these weights.
      num_samples: of re-ranking.
      shots: numbers of examples per label.
      classify_by: whose likelihood is compared (see `generation.classification`).
      shots_per_pass: examples per label in one context; passes are averaged.
      seed: of all sampling and of the choice of nations.
    """

    num_items: int = 0
    num_retrieved: int = 2
    temperature: float = 1.0
    top_p: float = 0.9
    max_spans: int = 1
    region_prompts: tuple[RegionPrompt, ...] = REGION_PROMPTS
    guidance: tuple[float, ...] = (2.0,)
    document_guidance: tuple[float, ...] = (2.0,)
    num_samples: int = 4
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    classify_by: tuple[ClassifyBy, ...] = CLASSIFY_BY
    shots_per_pass: int = 1
    seed: int = 0
