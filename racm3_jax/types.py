"""The nouns that pass between the parts: documents, neighbours, examples, batches.

Everything here is NumPy only. Ids are *vocabulary* ids (`tokens`) unless the name says
`codes`, which are indices into the image tokenizer's codebook.
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
    """One part of a document: a piece of text or one image, never both.

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
      id: unique name of the document, kept through tokenising and retrieval.
      segments: at least one; a caption-image pair is the common case.
      source: where it came from (a URL, a page, an album); documents with an equal,
        non-empty source never retrieve each other.
      metadata: JSON-serialisable facts (licence, split, scores, ...).
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
    """A segment as vocabulary ids, without any control id around it."""

    modality: Modality
    tokens: Int32[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A `Document` as token ids; control ids are added by `sequences`."""

    id: str
    segments: tuple[TokenizedSegment, ...]
    source: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(s.modality for s in self.segments)


class Neighbours(NamedTuple):
    """What an index returns, best first.

    Slots that could not be filled have id -1, score -inf and valid False.
    """

    ids: Int64[np.ndarray, "queries k"]
    scores: Float32[np.ndarray, "queries k"]
    valid: Bool[np.ndarray, "queries k"]


# Of a memory's usual score: below, a query finds nothing of its kind.
FAR_BELOW = 0.8


class Retrieved(NamedTuple):
    """The documents that one query was given, best first.

    Attributes:
      ids: rows of the memory.
      scores: inner product of the query with each document's embedding.
      documents: the documents themselves, in the same order.
      usual_score: what the best document of nearly every ordinary query of this memory
        scores at least; NaN where it is unknown, as for documents picked by hand.
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
        shorten at their end; the first ones first. Each is followed by one more token.
    """

    tokens: Int32[np.ndarray, " length"]
    weights: Float32[np.ndarray, " length"]
    is_main: Bool[np.ndarray, " length"]
    cuts: Int64[np.ndarray, "images 2"] = np.zeros((0, 2), np.int64)


class Batch(NamedTuple):
    """Packed rows, already shifted by one: `targets[i]` follows `inputs[i]`.

    Attributes:
      inputs: vocabulary ids; `<pad>` where the row is empty.
      targets: the id that follows, within the same example.
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
    """How the codes of images were guessed, so that one pass gave several.

    Attributes:
      source: "table", "jacobi" or "off".
      window: ids that a pass read at most.
      passes: of the model, the mean of the samples.
      acceptance: the fraction of guesses that were right; None where none was tested.
    """

    source: str
    window: int
    passes: float
    acceptance: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationOutput:
    """What a task of `Generator` returns; every list is one entry a sample, best first.

    Attributes:
      documents: the generated documents (prompt and generated segments).
      scores: the ranking score of each sample (meaning depends on the task: CLIP
        similarity for images, mean log-likelihood in nats for text).
      retrieved: the documents that the model was given, shared by all samples.
      prompt: what was asked, as text.
      seed: reproduces the samples.
      drafts: how the codes of images were guessed; None where none are written.
    """

    documents: list[Document]
    scores: Float32[np.ndarray, " samples"]
    retrieved: Retrieved
    prompt: str
    seed: int
    drafts: DraftCounts | None = None

    @property
    def images(self) -> list[UInt8[np.ndarray, "height width 3"]]:
        """The last image of each sample, for samples that have one."""
        return [d.images[-1] for d in self.documents if d.images]

    @property
    def texts(self) -> list[str]:
        return [d.text for d in self.documents]

    @property
    def note(self) -> str:
        """What to know about the retrieved documents; "" if they are as usual."""
        scores = self.retrieved.scores[np.isfinite(self.retrieved.scores)]
        usual = self.retrieved.usual_score
        if not len(scores) or not scores.max() < FAR_BELOW * usual:
            return ""
        return (
            f"the memory seems to hold nothing like this: its best document scores "
            f"{scores.max():.2f}, where others score {usual:.2f} or more; what was made "
            "shows something else"
        )
