"""Distractors among the retrieved documents, in any order, so that a model must read.

    retrieved       a  a'      b  b'      c           best first
    distractors     a  b'      b  b'      c           the last one from another example
    shuffled        b' a       b  b'      c

If the best document always comes first and is nearly always right, a small model learns
to copy the first document without reading names or images. RA-CM3 does not do this: it
retrieves from 150 million documents, and so gets wrong ones anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from racm3_jax.sequences.pipeline_config import PipelineConfig
from racm3_jax.types import TokenizedDocument

Documents = tuple[TokenizedDocument, ...]


def mix_documents(
    retrieved: Sequence[Documents],
    mains: Sequence[TokenizedDocument],
    config: PipelineConfig,
    rngs: Iterable[np.random.Generator],
) -> tuple[list[Documents], list[tuple[int, ...]]]:
    """The documents of each example, with distractors, in the configured order.

    Examples with fewer than two documents are unchanged: a wrong document alone would
    teach the model to ignore documents.

    Args:
      retrieved: per example of a batch, best first; distractors come from other
        examples.
      mains: the examples' main documents, which are never their own distractors.
      config: `distractor_probability` and `document_order`.
      rngs: one per example; not used if nothing is to be mixed.

    Returns:
      The documents, and the relevance rank of each, 0 is best; distractors are last.
    """
    ranks = [tuple(range(len(documents))) for documents in retrieved]
    if not config.distractor_probability and config.document_order == "relevance":
        return list(retrieved), ranks
    mixed = []
    for i, (documents, main, rng) in enumerate(
        zip(retrieved, mains, rngs, strict=True)
    ):
        if len(documents) > 1 and rng.random() < config.distractor_probability:
            known = {main.id, *(document.id for document in documents)}
            others = [
                other
                for j, found in enumerate(retrieved)
                if j != i
                for other in found
                if other.id not in known
            ]
            if others:
                chosen = others[rng.integers(len(others))]
                documents = (*documents[:-1], chosen)
        if config.document_order == "shuffled":
            ranks[i] = tuple(rng.permutation(len(documents)).tolist())
            documents = tuple(documents[j] for j in ranks[i])
        mixed.append(documents)
    return mixed, ranks
