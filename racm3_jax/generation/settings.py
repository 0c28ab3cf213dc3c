"""How tokens are sampled: the settings that every task takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

from racm3_jax.generation.drafts import DRAFT_MODES, DraftMode

# How samples that are images are ranked; see `Generator`.
RankBy = Literal["auto", "clip", "document", "likelihood"]
RANKINGS: tuple[RankBy, ...] = get_args(RankBy)
# How a region is asked for; see `infilling`.
RegionPrompt = Literal["masked", "in_place"]
REGION_PROMPTS: tuple[RegionPrompt, ...] = get_args(RegionPrompt)


class SamplingSettings(TypedDict, total=False):
    """The sampling settings of a call, as keywords; `SamplingConfig` explains them."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    guidance: float
    contrastive_k: int
    contrastive_alpha: float
    guide_documents: bool
    draft: DraftMode


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled.

    Guidance and contrastive decoding read the prompt twice: once as it is, and once
    "unconditionally", with its text replaced by the mask. Use one of them, not both.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_p: fraction of the probability mass that is kept (nucleus); 1 keeps everything.
      top_k: how many tokens are kept; 0 keeps everything.
      max_new_tokens: the most tokens sampled for a row (fewer where the model's
        max_length leaves less room and `fixed_length` is False).
      fixed_length: True when the grammar always emits `max_new_tokens` tokens (images):
        the loop then has a constant trip count and never checks whether all are done.
      guidance: weight of classifier-free guidance; 1 is none, at no cost.
      contrastive_k: the k of CD-K; 0 is none.
      contrastive_alpha: tokens below this fraction of the k-th largest probability are
        dropped.
      guide_documents: False keeps the retrieved documents in the unconditional prompt,
        so that only the text is amplified (CM3Leon); True drops them as well.
      draft: where guesses of an image's next codes come from, so that one pass gives
        several (see `drafts`): "table", "jacobi", "off", or "auto" for what is fastest.
        It does not change the images.
      min_p: drops tokens below this fraction of the largest probability (min-p sampling,
        arXiv 2407.01082); 0 keeps everything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    fixed_length: bool = False
    guidance: float = 1.0
    contrastive_k: int = 0
    contrastive_alpha: float = 0.6
    guide_documents: bool = False
    draft: DraftMode = "auto"
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be a number >= 0 (0 is greedy); got "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1 (1 keeps everything); got "
                f"{self.top_p}"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k must be >= 0 (0 keeps everything); got {self.top_k}"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p must be from 0 to 1 (0 keeps everything); got {self.min_p}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {self.max_new_tokens}")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(
                f"guidance must be a number >= 0 (1 is none); got {self.guidance}"
            )
        if self.contrastive_k < 0:
            raise ValueError(
                f"contrastive_k must be >= 0 (0 is none); got {self.contrastive_k}"
            )
        if not 0 < self.contrastive_alpha <= 1:
            raise ValueError(
                "contrastive_alpha must be above 0 and at most 1; got "
                f"{self.contrastive_alpha}"
            )
        if self.draft not in DRAFT_MODES:
            raise ValueError(
                f"draft is {self.draft!r}; allowed: "
                + ", ".join(map(repr, DRAFT_MODES))
            )
        if self.contrastive_k and self.guidance != 1:
            raise ValueError(
                f"guidance {self.guidance} and contrastive_k {self.contrastive_k} both "
                "compare with the unconditional prompt: use one of them"
            )

    @property
    def needs_unconditional(self) -> bool:
        """Whether a second prompt, without the text, is read as well."""
        return self.guidance != 1 or self.contrastive_k > 0


@dataclasses.dataclass(frozen=True)
class CaptionDefaults:
    """What a folder of weights may say about captions: `Engine.defaults["caption"]`.

    Attributes:
      num_candidates: documents that are re-ranked; 0 keeps the retriever's.
      temperature, guidance, guide_documents: see `SamplingConfig`.
      image_first: documents are shown with their images in front of their texts.
    """

    num_candidates: int = 0
    temperature: float = 1.0
    guidance: float = 1.0
    guide_documents: bool = False
    image_first: bool = False

    def __post_init__(self) -> None:
        if self.num_candidates < 0:
            raise ValueError(f"num_candidates must be >= 0; got {self.num_candidates}")
        SamplingConfig(temperature=self.temperature, guidance=self.guidance)


@dataclasses.dataclass(frozen=True)
class ImageDefaults:
    """What a folder of weights may say about images: `Engine.defaults["image"]`.

    Attributes:
      temperature, top_p: see `SamplingConfig`.
      region_prompt: how a region is asked for (see `infilling`).
      rank_by: by what samples are ranked; "auto" depends on the CLIP's alignment.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    region_prompt: RegionPrompt = "masked"
    rank_by: RankBy = "auto"

    def __post_init__(self) -> None:
        SamplingConfig(temperature=self.temperature, top_p=self.top_p)
        if self.region_prompt not in REGION_PROMPTS:
            raise ValueError(
                f"region_prompt is {self.region_prompt!r}; allowed: "
                + ", ".join(map(repr, REGION_PROMPTS))
            )
        if self.rank_by not in RANKINGS:
            raise ValueError(
                f"rank_by is {self.rank_by!r}; allowed: "
                + ", ".join(map(repr, RANKINGS))
            )


def make_config(
    settings: SamplingSettings, measured: Mapping[str, Any] | None = None
) -> SamplingConfig:
    """The settings of a call, top_p 0.9 unless given; each task sets the length.

    `measured` are those of the weights, for what the call leaves open.
    """
    open_ = {"top_p": 0.9} | {
        name: value
        for name, value in (measured or {}).items()
        if name in SamplingSettings.__annotations__
    }
    return SamplingConfig(**{**open_, **settings})
