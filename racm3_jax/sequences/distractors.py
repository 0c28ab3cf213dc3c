"""Wrong documents among the retrieved ones, in any order, so that a model must read them.

    retrieved       a  a'      b  b'      c           best first
    distractors     a  b'      b  b'      c           the last one, another example's
    shuffled        b' a       b  b'      c

When the best document always comes first and is nearly always right, a small model learns
to copy the first document and to read neither names nor pictures. Nothing of this is in
RA-CM3, which ranks 150 million documents and so has wrong ones among them anyway.
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

    Examples of fewer than two documents stay as they are: a wrong document alone would
    teach a model not to trust any.

    Args:
      retrieved: of each example of a batch, best first; distractors come from the others.
      mains: the examples' main documents, which are no distractors of their own.
      config: `distractor_probability` and `document_order`.
      rngs: one an example; not drawn from where nothing is to be mixed.

    Returns:
      The documents, and the rank of each by relevance, 0 first; distractors are last.
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
