"""Augmented images of the memory, tokenised ahead (see `documents.augmentation`).

An example samples one augmentation, or none, for all its images: what the model reads
in a document is then still what it has to generate.

    change 0    main  a b c d     retrieved  e f g h      as the memory has them
    change 2    main  d c b a     retrieved  h g f e      both mirrored, say
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32

from racm3_jax.types import TokenizedDocument


class Variants:
    """Tokens of augmented images, by document id; thread-safe.

    Args:
      tokens: of every augmentation and image.
      places: document id -> index of its first image; the others follow. Documents
        without an entry are unchanged.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, "changes images length"],
        places: Mapping[str, int],
    ) -> None:
        self._tokens = tokens
        self._places = places

    def sample(self, rng: np.random.Generator) -> int:
        """Samples the number of an augmentation, 0 for none."""
        return int(rng.integers(len(self._tokens) + 1))

    def change(self, document: TokenizedDocument, number: int) -> TokenizedDocument:
        """The document with its images augmented."""
        place = self._places.get(document.id, -1)
        if not number or place < 0:
            return document
        segments = list(document.segments)
        for i, segment in enumerate(segments):
            if segment.modality == "image":
                tokens = np.asarray(self._tokens[number - 1, place])
                segments[i] = dataclasses.replace(segment, tokens=tokens)
                place += 1
        return dataclasses.replace(document, segments=tuple(segments))
