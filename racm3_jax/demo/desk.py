"""What one visitor sees and has chosen. Values only: every change makes a new one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

from racm3_jax.types import Document, GenerationOutput, TokenizedDocument

NUM_EARLIER = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A document that the model is given, or could be.

    Attributes:
      tokens: what the model reads.
      shown: the same as text and pixels.
      row: of the memory; -1 for the visitor's own documents.
      score: inner product with the query; NaN for the visitor's own documents.
      pinned: stays when something else is searched for.
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
    """An image that was generated before, and from what."""

    image: UInt8[np.ndarray, "height width 3"]
    prompt: str
    seed: int
    ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Desk:
    """The documents in front of one visitor.

    Attributes:
      prompt: what was searched for.
      num_documents: how many are wanted; found ones fill up what is not chosen by hand.
      given: own documents first, then pinned and found ones: the order the model reads.
      dropped: ids that are not to be given.
    """

    prompt: str = ""
    num_documents: int = 2
    given: tuple[Given, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A drawing on its way.

    Attributes:
      desk: the documents that it is drawn from; none before they are known.
      images: as far as they are drawn, grey where they are not.
      share: fraction that is generated, 0 to 1.
      output: the result, when it is done.
    """

    desk: Desk
    images: list[UInt8[np.ndarray, "height width 3"]]
    share: float = 0.0
    output: GenerationOutput | None = None


def remember(earlier: tuple[Earlier, ...], stage: Stage) -> tuple[Earlier, ...]:
    """With the best image of the last call in front; the oldest go."""
    if stage.output is None:
        return earlier
    ids = tuple(g.id for g in stage.desk.given)
    output = stage.output
    new = Earlier(output.images[0], output.prompt, output.seed, ids)
    return (new, *earlier)[:NUM_EARLIER]
