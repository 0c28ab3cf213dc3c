"""Copying the top retrieved document, as a likelihood: the baseline that needs no model.

Each token is the one at the same place of the retrieved document with the share m
with which that is so in the test set, and any other token alike:

    retrieved   7 7 3 9        nats   -log m              where they agree
    document    7 1 3 9               -log (1-m)/(V-1)    elsewhere, of V tokens

m is fitted on the test set itself, for text and images apart, in the baseline's favour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from racm3_jax.evaluation.perplexity import Likelihoods, ModalitySums
from racm3_jax.types import Modality, TokenizedDocument
from racm3_jax.vocab import Vocab

_MODALITIES: tuple[Modality, ...] = ("text", "image")


class CopyCounts(NamedTuple):
    """Of each document: its tokens, those that are in the retrieved one too, its images."""

    text_tokens: Int[np.ndarray, " documents"]
    text_right: Int[np.ndarray, " documents"]
    image_tokens: Int[np.ndarray, " documents"]
    image_right: Int[np.ndarray, " documents"]
    images: Int[np.ndarray, " documents"]


def count_copied(
    documents: Sequence[TokenizedDocument],
    retrieved: Sequence[Sequence[TokenizedDocument]],
) -> CopyCounts:
    """Compares each document with the first one that was retrieved for it, if any.

    The n-th text is compared with the n-th text, the n-th image with the n-th image; what
    is longer than its counterpart counts as not copied.
    """
    rows = []
    for document, found in zip(documents, retrieved, strict=True):
        row: list[int] = []
        for modality in _MODALITIES:
            own = _tokens(document, modality)
            theirs = _tokens(found[0], modality) if found else []
            same = [
                (a[: len(b)] == b[: len(a)]).sum()
                for a, b in zip(own, theirs, strict=False)
            ]
            row += [sum(map(len, own)), int(sum(same))]
        rows.append([*row, len(_tokens(document, "image"))])
    return CopyCounts(*np.array(rows, np.int64).reshape(-1, 5).T)


def _tokens(document: TokenizedDocument, modality: Modality) -> list[np.ndarray]:
    return [s.tokens for s in document.segments if s.modality == modality]


def compute_copy_sums(
    counts: Mapping[str, Int[np.ndarray, " documents"]], vocab: Vocab
) -> ModalitySums:
    """The nats of every document, from `CopyCounts` by the names of its columns."""

    def nats(modality: Modality, num_ids: int) -> Float64[np.ndarray, " documents"]:
        right, total = counts[f"{modality}_right"], counts[f"{modality}_tokens"]
        share = right.sum() / max(1, total.sum())
        hit = -np.log(share) if share > 0 else 0.0
        miss = np.log(num_ids - 1) - np.log1p(-share) if share < 1 else 0.0
        return right * hit + (total - right) * miss

    return ModalitySums(
        nats("text", vocab.num_text_ids),
        counts["text_tokens"],
        nats("image", vocab.num_image_codes),
        counts["image_tokens"],
        counts["images"],
    )


def read_likelihoods(columns: Mapping[str, np.ndarray], vocab: Vocab) -> Likelihoods:
    """Of the columns that a suite keeps: `ModalitySums`, or `CopyCounts` of a copy."""
    values = dict(columns)
    retrieved = values.pop("retrieved")
    is_copy = "text_right" in values
    sums = compute_copy_sums(values, vocab) if is_copy else ModalitySums(**values)
    return Likelihoods(sums, retrieved)
