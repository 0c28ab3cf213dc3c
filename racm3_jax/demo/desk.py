"""The immutable state of one visitor: documents seen and chosen."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

from racm3_jax.types import Document, GenerationOutput, TokenizedDocument

NUM_EARLIER = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A document that is, or could be, in the context.

    Attributes:
      tokens: of the document.
      shown: the decoded document.
      row: of the memory; -1 for the visitor's own documents.
      score: inner product with the query; NaN for the visitor's own documents.
      pinned: kept by later searches.
    """

    tokens: TokenizedDocument
    shown: Document
    row: int = -1
    score: float = math.nan
    pinned: bool = False

    @property
    def id(self) -> str:
        return self.tokens.id

    @property
    def is_own(self) -> bool:
        return self.row < 0

    @property
    def stays(self) -> bool:
        return self.pinned or self.is_own

    @property
    def licence(self) -> str:
        return str(self.tokens.metadata.get("licence") or "")


@dataclasses.dataclass(frozen=True, eq=False)
class Earlier:
    """An earlier generated image, with its prompt and documents."""

    image: UInt8[np.ndarray, "height width 3"]
    prompt: str
    seed: int
    ids: tuple[str, ...]
    output: GenerationOutput


@dataclasses.dataclass(frozen=True, eq=False)
class Desk:
    """The documents of one visitor.

    Attributes:
      prompt: what was searched for.
      num_documents: total number; retrieved ones are added to hand-picked ones.
      given: own documents first, then pinned and retrieved ones, in context order.
      dropped: excluded ids.
    """

    prompt: str = ""
    num_documents: int = 2
    given: tuple[Given, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A generation in progress.

    Attributes:
      desk: the documents in the context; none before retrieval.
      images: partial images, grey where not generated yet.
      share: generated fraction, 0 to 1.
      output: the final result.
    """

    desk: Desk
    images: list[UInt8[np.ndarray, "height width 3"]]
    share: float = 0.0
    output: GenerationOutput | None = None


def remember(earlier: tuple[Earlier, ...], stage: Stage) -> tuple[Earlier, ...]:
    """Prepends the best image of the last call; drops the oldest."""
    if stage.output is None:
        return earlier
    ids = tuple(g.id for g in stage.desk.given)
    output = stage.output
    new = Earlier(output.images[0], output.prompt, output.seed, ids, output)
    return (new, *earlier)[:NUM_EARLIER]
