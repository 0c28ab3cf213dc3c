"""The rendered images as arrays, read by the package's reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

import racm3_jax
from racm3_jax.types import Document


@dataclasses.dataclass(frozen=True, eq=False)
class Drawings:
    """All images of the data set, in the order of their files.

    Attributes:
      documents: with captions and metadata.
      images: their images.
      thing: label of each.
      icon_set: of each.
      split: "train" or "held_out".
    """

    documents: Sequence[Document]
    images: UInt8[np.ndarray, "n size size 3"]
    thing: np.ndarray
    icon_set: np.ndarray
    split: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Drawings:
        """The columns of documents that `fetch.py` wrote."""
        documents = list(documents)
        return cls(
            documents,
            np.stack([document.images[0] for document in documents]),
            *(
                np.array([str(document.metadata[key]) for document in documents])
                for key in ("thing", "icon_set", "split")
            ),
        )


def read_drawings(folder: Path) -> Drawings:
    """What `fetch.py --out=folder` wrote.

    Raises:
      ValueError: there are no files.
    """
    if not any(folder.glob("*.tar")):
        raise ValueError(
            f"{folder} has no drawings: python experiments/emojiworld/fetch.py "
            f"--out={folder}"
        )
    return Drawings.of(racm3_jax.read_documents(f"webdataset:{folder}/*.tar"))
