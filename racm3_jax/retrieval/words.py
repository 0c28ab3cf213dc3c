"""Search by words, for people: which captions say what was asked (BM25).

Training and generation never use it: they search by embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64


def search_words(
    texts: Sequence[str], words: str, k: int
) -> tuple[Int64[np.ndarray, " found"], Float32[np.ndarray, " found"]]:
    """The texts that the words fit best, by BM25, best first.

    Args:
      texts: of every document.
      words: what to look for; case does not matter.
      k: how many at most; texts without any of the words are left out.

    Returns:
      Places in `texts`, and their scores.
    """
    import bm25s

    tokenize: Any = bm25s.tokenize
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    # Stop words stay: a caption is short, and any script may come.
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
