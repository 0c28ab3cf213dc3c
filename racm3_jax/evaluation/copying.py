"""Copying the top retrieved document, as a likelihood: a baseline without a model.

Each token is the one at the same position of the retrieved document with probability m,
the frequency of such matches in the test set, and any other token otherwise:

    retrieved   7 7 3 9        nats   -log m              where they agree
    document    7 1 3 9               -log (1-m)/(V-1)    elsewhere, of V tokens

m is fitted on the test set itself, separately for text and images, which favours the
baseline.
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
    """Of each document: its tokens, those equal to the retrieved one's, its images."""

    text_tokens: Int[np.ndarray, " documents"]
    text_right: Int[np.ndarray, " documents"]
    image_tokens: Int[np.ndarray, " documents"]
    image_right: Int[np.ndarray, " documents"]
    images: Int[np.ndarray, " documents"]


def count_copied(
    documents: Sequence[TokenizedDocument],
    retrieved: Sequence[Sequence[TokenizedDocument]],
) -> CopyCounts:
    """Compares each document with the first one retrieved for it, if any.

    The n-th text is compared with the n-th text, the n-th image with the n-th image; tokens
    beyond the end of the counterpart count as not copied.
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
    """The nats of every document, from the columns of `CopyCounts`."""

    def nats(modality: Modality, num_tokens: int) -> Float64[np.ndarray, " documents"]:
        right, total = counts[f"{modality}_right"], counts[f"{modality}_tokens"]
        m = right.sum() / max(1, total.sum())
        hit = -np.log(m) if m > 0 else 0.0
        miss = np.log(num_tokens - 1) - np.log1p(-m) if m < 1 else 0.0
        return right * hit + (total - right) * miss

    return ModalitySums(
        nats("text", vocab.num_text_ids),
        counts["text_tokens"],
        nats("image", vocab.num_image_codes),
        counts["image_tokens"],
        counts["images"],
    )


def read_likelihoods(columns: Mapping[str, np.ndarray], vocab: Vocab) -> Likelihoods:
    """Reads a suite's columns: `ModalitySums`, or `CopyCounts` of the copy baseline."""
    values = dict(columns)
    retrieved = values.pop("retrieved")
    is_copy = "text_right" in values
    sums = compute_copy_sums(values, vocab) if is_copy else ModalitySums(**values)
    return Likelihoods(sums, retrieved)
