"""The data types shared by all modules: documents, neighbours, examples, batches.

Everything here is NumPy only. `tokens` are vocabulary ids; `codes` are indices into the
image tokenizer's codebook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

Modality = Literal["text", "image"]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One part of a document: either a piece of text or one image.

    Attributes:
      text: the characters, or None when the segment is an image.
      image: RGB pixels 0..255, or None when the segment is text.
    """

    text: str | None = None
    image: UInt8[np.ndarray, "height width 3"] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise ValueError(
                "a Segment holds either text or an image; got "
                + ("neither" if self.text is None else "both")
            )
        if self.image is not None and (
            self.image.ndim != 3
            or self.image.shape[-1] != 3
            or self.image.dtype != np.uint8
        ):
            raise ValueError(
                "an image segment is uint8[height, width, 3]; got "
                f"{self.image.dtype}{list(self.image.shape)}"
            )

    @property
    def modality(self) -> Modality:
        return "text" if self.text is not None else "image"


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """An ordered list of text and image segments.

    Attributes:
      id: unique name of the document, kept by tokenization and retrieval.
      segments: at least one; a caption-image pair is the common case.
      source: where it came from (a URL, a page, an album); documents with an equal,
        non-empty source never retrieve each other.
      metadata: JSON-serialisable (licence, split, scores, ...).
    """

    id: str
    segments: tuple[Segment, ...]
    source: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"document {self.id!r} has no segments")

    @property
    def text(self) -> str:
        """All text segments, joined by one space."""
        return " ".join(s.text for s in self.segments if s.text is not None)

    @property
    def images(self) -> list[UInt8[np.ndarray, "height width 3"]]:
        return [s.image for s in self.segments if s.image is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedSegment:
    """A segment as tokens, without control tokens around it."""

    modality: Modality
    tokens: Int32[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A `Document` as tokens; `sequences` adds control tokens."""

    id: str
    segments: tuple[TokenizedSegment, ...]
    source: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(s.modality for s in self.segments)


class Neighbours(NamedTuple):
    """Search results of an index, best first.

    Unfilled slots have id -1, score -inf and valid False.
    """

    ids: Int64[np.ndarray, "queries k"]
    scores: Float32[np.ndarray, "queries k"]
    valid: Bool[np.ndarray, "queries k"]


# Fraction of a memory's usual score below which a query finds nothing similar.
FAR_BELOW = 0.8


class Retrieved(NamedTuple):
    """The documents retrieved for one query, best first.

    Attributes:
      ids: rows of the memory.
      scores: inner product of the query with each document's embedding.
      documents: the documents themselves, in the same order.
      usual_score: the score that the best document reaches for nearly every ordinary
        query of this memory; NaN if unknown, as for hand-picked documents.
    """

    ids: Int64[np.ndarray, " k"]
    scores: Float32[np.ndarray, " k"]
    documents: tuple[TokenizedDocument, ...]
    usual_score: float = float("nan")


class Example(NamedTuple):
    """One training sequence before the shift: retrieved documents, then the main one.

    Attributes:
      tokens: vocabulary ids.
      weights: loss weight of each token *as a target*: 1 on the main document, alpha on
        retrieved ones, 0 on sentinels.
      is_main: True on the tokens of the main document and of its moved spans.
      cuts: half-open ranges of `tokens`, images of retrieved documents, that packing may
        shorten at their end, in this order. Each is followed by one more token.
    """

    tokens: Int32[np.ndarray, " length"]
    weights: Float32[np.ndarray, " length"]
    is_main: Bool[np.ndarray, " length"]
    cuts: Int64[np.ndarray, "images 2"] = np.zeros((0, 2), np.int64)


class Batch(NamedTuple):
    """Packed rows, already shifted by one: `targets[i]` follows `inputs[i]`.

    Attributes:
      inputs: tokens; `<pad>` where the row is empty.
      targets: the next token in the same example.
      loss_weights: weight of each target; 0 on padding.
      segment_ids: 1, 2, ... number the examples of a row; 0 is padding.
      positions: 0, 1, ... from the start of each example.
      is_main: True where the target belongs to the main document.
    """

    inputs: Int32[np.ndarray, "batch length"]
    targets: Int32[np.ndarray, "batch length"]
    loss_weights: Float32[np.ndarray, "batch length"]
    segment_ids: Int32[np.ndarray, "batch length"]
    positions: Int32[np.ndarray, "batch length"]
    is_main: Bool[np.ndarray, "batch length"]


class DraftCounts(NamedTuple):
    """Statistics of speculative decoding of image codes (several per forward pass).

    Attributes:
      source: "table", "jacobi" or "off".
      window: maximum number of tokens per pass.
      passes: forward passes of the model, mean over the samples.
      acceptance: fraction of accepted guesses; None if none was tested.
    """

    source: str
    window: int
    passes: float
    acceptance: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationOutput:
    """Result of a task of `Generator`; lists have one entry per sample, best first.

    Attributes:
      documents: the generated documents (prompt and generated segments).
      scores: the ranking score of each sample (meaning depends on the task: CLIP
        similarity for images, mean log-likelihood in nats for text).
      retrieved: the documents in the context, shared by all samples.
      prompt: the prompt as text.
      seed: reproduces the samples.
      drafts: statistics of speculative decoding; None if no image was generated.
      settings: of the sampling, as they were used: defaults are filled in.
    """

    documents: list[Document]
    scores: Float32[np.ndarray, " samples"]
    retrieved: Retrieved
    prompt: str
    seed: int
    drafts: DraftCounts | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> list[UInt8[np.ndarray, "height width 3"]]:
        """The last image of each sample that has one."""
        return [d.images[-1] for d in self.documents if d.images]

    @property
    def texts(self) -> list[str]:
        return [d.text for d in self.documents]

    @property
    def note(self) -> str:
        """A warning if the retrieved documents match poorly; else ""."""
        scores = self.retrieved.scores[np.isfinite(self.retrieved.scores)]
        usual = self.retrieved.usual_score
        if not len(scores) or not scores.max() < FAR_BELOW * usual:
            return ""
        return (
            f"the memory seems to hold nothing like this: its best document scores "
            f"{scores.max():.2f}, usual scores are {usual:.2f} or more; the result "
            "shows something else"
        )
