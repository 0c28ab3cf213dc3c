"""Keyword search in captions (BM25), for users.

Training and generation do not use it: they search by embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64


def search_bm25(
    texts: Sequence[str], words: str, k: int
) -> tuple[Int64[np.ndarray, " found"], Float32[np.ndarray, " found"]]:
    """The texts with the best BM25 scores, best first.

    Args:
      texts: of every document.
      words: the query; case-insensitive.
      k: maximum number of results; texts without any of the words are excluded.

    Returns:
      Indices of `texts`, and their scores.
    """
    import bm25s

    tokenize: Any = bm25s.tokenize
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    # Stop words are kept: captions are short, and in any script.
    split = tokenize(list(texts), stopwords=[], show_progress=False)
    asked = tokenize([words], stopwords=[], show_progress=False)
    if not split.vocab or not asked.vocab:
        return nothing
    ranking = bm25s.BM25()
    ranking.index(split, show_progress=False)
    query = [word for word in asked.vocab if word in split.vocab]
    if not query:
        return nothing
    scores = np.asarray(ranking.get_scores(query), np.float32)
    order = np.argsort(-scores, kind="stable")[:k]
    order = order[scores[order] > 0]
    return order.astype(np.int64), scores[order]
