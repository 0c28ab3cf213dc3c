"""The documents of a suite."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from racm3_jax.types import Document


@dataclasses.dataclass(frozen=True)
class ShotPool:
    """Documents with an image and their class names, for k-shot questions."""

    documents: Sequence[Document]
    classes: Sequence[str]


def choose_documents(documents: Sequence[Document], count: int) -> list[Document]:
    """The first `count` documents by sha256 of their id; 0 is all, in the given order.

    Raises:
      ValueError: if there are fewer.
    """
    if not count:
        return list(documents)
    if not 1 <= count <= len(documents):
        raise ValueError(
            f"{count} documents are asked for, the source has {len(documents)}: set "
            f"num_items to 1..{len(documents)}, or 0 for all"
        )
    return sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).hexdigest())[
        :count
    ]


def choose_pool(documents: Sequence[Document], class_key: str) -> ShotPool | None:
    """The documents with an image and a class; None if there are none.

    Args:
      documents: to choose from.
      class_key: the metadata key of a document's class; "" for none.
    """
    kept = [d for d in documents if d.images and d.metadata.get(class_key)]
    if not kept:
        return None
    return ShotPool(kept, [str(d.metadata[class_key]) for d in kept])
