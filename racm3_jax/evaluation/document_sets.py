"""Which documents a suite is run on, and fingerprints that say so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from racm3_jax.types import Document


@dataclasses.dataclass(frozen=True)
class ShotPool:
    """Documents with an image, and the names of their classes, for k-shot questions."""

    documents: Sequence[Document]
    classes: Sequence[str]


def choose_documents(documents: Sequence[Document], count: int) -> list[Document]:
    """The first `count` documents by sha256 of their id; 0 is all, in their order.

    Raises:
      ValueError: if there are not so many.
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
    """The documents that have an image and a class; None where none has.

    Args:
      documents: to choose from.
      class_key: the metadata that names a document's class; "" for none.
    """
    kept = [d for d in documents if d.images and d.metadata.get(class_key)]
    if not kept:
        return None
    return ShotPool(kept, [str(d.metadata[class_key]) for d in kept])


def describe_documents(documents: Sequence[Document]) -> dict[str, Any]:
    """Equal for equal texts and pixels in the same order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.source]).encode())
        for segment in document.segments:
            if segment.image is None:
                digest.update(json.dumps(segment.text).encode())
            else:
                digest.update(str(segment.image.shape).encode())
                digest.update(segment.image.tobytes())
    return {"num_items": len(documents), "fingerprint": digest.hexdigest()[:16]}


def describe_pool(pool: ShotPool) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(pool.classes)).encode())
    return describe_documents(pool.documents) | {"classes": digest.hexdigest()[:16]}
