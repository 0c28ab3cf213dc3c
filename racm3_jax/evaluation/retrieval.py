"""Evaluation of the retriever: recall@k; a random one; one without near-duplicates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int64

from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.index import streaming
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.alignment import compute_ranks
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.types import Document, Modality, Neighbours, Retrieved, TokenizedDocument

_BLOCK = 512


def pair_recall(
    queries: Float32[np.ndarray, "pairs d_embed"],
    candidates: Float32[np.ndarray, "pairs d_embed"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, Share]:
    """Whether a query's own candidate is among the k best (row i belongs to row i).

    Text -> image and image -> text retrieval of the literature. Candidates with the same
    score as the right one are ranked before it: a constant embedding has recall 0.
    """
    rank = compute_ranks(queries, candidates)
    return {k: compute_share((rank < k).tolist()) for k in ks}


def document_recall(
    found: Sequence[Sequence[int]], right: Sequence[Sequence[int]], k: int
) -> Share:
    """Whether one of the right rows of the memory is among the first k retrieved."""
    return compute_share(
        [
            bool(set(rows[:k]) & set(wanted))
            for rows, wanted in zip(found, right, strict=True)
        ]
    )


def chance_recall(num_rows: int, right: Sequence[Sequence[int]], k: int) -> float:
    """The expected `document_recall` of k rows sampled uniformly without replacement.

    A query with r right rows of n misses with probability C(n - r, k) / C(n, k).
    """
    num_sampled = min(k, num_rows)
    missed = [
        math.comb(num_rows - len(wanted), num_sampled)
        / math.comb(num_rows, num_sampled)
        for wanted in right
    ]
    return 1 - sum(missed) / len(missed)


def find_right(
    memory: Memory, documents: Sequence[Document], class_key: str
) -> list[list[int]]:
    """The rows of the memory that each document should find; possibly none.

    Args:
      memory: to search.
      documents: the queries.
      class_key: metadata that is equal for documents of the same class; "" for the
        document itself.
    """
    if not class_key:
        own = memory.find([document.id for document in documents])
        return [[int(row)] if row >= 0 else [] for row in own]
    allowed = memory.allowed_ids()
    rows: dict[Any, list[int]] = {}
    for row, metadata in zip(allowed, memory.metadata(allowed), strict=True):
        if class_key in metadata:
            rows.setdefault(metadata[class_key], []).append(int(row))
    return [rows.get(d.metadata.get(class_key), []) for d in documents]


def compute_recalls(
    embedded: Mapping[str, np.ndarray],
    searched: Mapping[str, Int64[np.ndarray, "documents k"]],
    right: Sequence[Sequence[int]],
    ks: Sequence[int],
    num_rows: int,
    align: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> dict[str, Share | float]:
    """Recall@k of a test set, and the recall of random retrieval, by name.

    Among the test documents (text to image, image to text), and from a test document to a
    right one in the memory; documents without a text or image, or without a right one, are
    left out.

    Args:
      embedded: `DocumentEmbeddings` of the test documents, by the names of its fields.
      searched: rows of the memory found by "text" and "image" of each document.
      right: rows of the memory that each document should find; possibly none.
      ks: numbers of rows.
      num_rows: of the memory.
      align: the part of rows by which texts are compared with images.
    """
    results: dict[str, Share | float] = {}
    both = np.flatnonzero(embedded["has_text"] & embedded["has_image"])
    for query, candidates in (("text", "image"), ("image", "text")):
        if len(both):
            name = f"recall/{query}_to_{candidates}"
            rows = (align(embedded[name][both]) for name in (query, candidates))
            shares = pair_recall(*rows, ks)
            for k, share in shares.items():
                results[f"{name}@{k}"] = share
                results[f"{name}@{k}/chance"] = min(k, len(both)) / len(both)
    for query in ("text", "image"):
        name = f"recall/{query}_to_document"
        there = np.flatnonzero(embedded[f"has_{query}"]).tolist()
        rows = [i for i in there if right[i]]
        wanted, found = [right[i] for i in rows], searched[query][rows].tolist()
        for k in ks if rows else ():
            results[f"{name}@{k}"] = document_recall(found, wanted, k)
            results[f"{name}@{k}/chance"] = chance_recall(num_rows, wanted, k)
    return results


def stack_rows(
    found: Sequence[Sequence[int]], width: int | None = None
) -> Int64[np.ndarray, "n k"]:
    """Rows of a memory; -1 where fewer documents were found.

    Args:
      found: rows for each item.
      width: k; None is the most that any item has.
    """
    width = max(map(len, found)) if width is None else width
    rows = np.full((len(found), width), -1, np.int64)
    for row, ids in zip(rows, found, strict=True):
        row[: len(ids)] = ids
    return rows


class RandomRetriever:
    """The baseline of random documents, unrelated to the query.

    They depend on the query's bytes and the seed, not on the batch.

    Args:
      memory: whose allowed documents are sampled uniformly.
      seed: of the sampling.
    """

    def __init__(self, memory: Any, seed: int = 0) -> None:
        self.memory = memory
        self._seed = seed

    def usual_score(self, modality: Modality) -> float:
        """Unknown, as there is no search."""
        del modality
        return float("nan")

    def retrieve(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        nums: Int[np.ndarray, " queries"],
        mains: Sequence[TokenizedDocument | None],
    ) -> list[Retrieved]:
        """As `Retriever.retrieve`; scores are those of the query with random documents."""
        allowed = self.memory.allowed_ids()
        results = []
        for query, num, main in zip(queries, nums, mains, strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(query).tobytes()).digest()
            entropy = int.from_bytes(digest[:8], "little")
            rng = np.random.default_rng([self._seed, entropy])
            own = -1 if main is None else int(self.memory.find([main.id])[0])
            others = allowed[allowed != own]
            rows = rng.choice(others, int(num), replace=False)
            scores = (self.memory.embeddings[rows] @ query).astype(np.float32)
            documents = tuple(self.memory.documents(rows))
            results.append(Retrieved(rows.astype(np.int64), scores, documents))
        return results


class ReducedMemory:
    """A memory without some of its documents; the files are not changed.

    Everything else is delegated to the memory. For evaluations: with near-duplicates of
    the test set in the memory, a model could copy the answer.
    """

    def __init__(self, memory: Memory, rows: Int64[np.ndarray, " removed"]) -> None:
        self._memory = memory
        self.removed = np.unique(np.asarray(rows, np.int64))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def num_allowed(self) -> int:
        return len(self.allowed_ids())

    def allowed_ids(self) -> Int64[np.ndarray, " allowed"]:
        return np.setdiff1d(self._memory.allowed_ids(), self.removed)

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int, **how: Any
    ) -> Neighbours:
        """As `Memory.search`, without the removed rows."""
        width = min(len(self), k + min(k, len(self.removed)))
        while True:
            kept = self._without_removed(self._memory.search(queries, width, **how))
            if width == len(self) or (kept.valid.sum(1) >= k).all():
                break
            width = min(len(self), 4 * width)
        ids, scores, valid = (column[:, :k] for column in kept)
        short = k - ids.shape[1]
        if short > 0:
            wide = ((0, 0), (0, short))
            ids = np.pad(ids, wide, constant_values=-1)
            scores = np.pad(scores, wide, constant_values=-np.inf)
            valid = np.pad(valid, wide)
        return Neighbours(ids, scores.astype(np.float32), valid)

    def search_until(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        take: Callable[[Int64[np.ndarray, " asking"], Neighbours], np.ndarray],
        width: int,
        max_width: int,
    ) -> None:
        """As `Memory.search_until`; `take` never sees the removed rows.

        Both widths are the caller's: in `num_allowed`, removed rows count as denied ones.
        """
        self._memory.search_until(
            queries,
            lambda asking, found: take(asking, self._without_removed(found)),
            width,
            max_width,
        )

    def _without_removed(self, found: Neighbours) -> Neighbours:
        """The same neighbours, with removed ones as empty slots at the end."""
        kept = found.valid & ~np.isin(found.ids, self.removed)
        order = np.argsort(~kept, axis=1, kind="stable")
        valid = np.take_along_axis(kept, order, 1)
        ids = np.where(valid, np.take_along_axis(found.ids, order, 1), -1)
        scores = np.where(valid, np.take_along_axis(found.scores, order, 1), -np.inf)
        return Neighbours(ids, scores.astype(np.float32), valid)


def find_near_duplicates(
    memory: Memory,
    images: Float32[np.ndarray, "images d_embed"],
    max_similarity: float = 0.95,
) -> Int64[np.ndarray, " rows"]:
    """Rows of the memory whose image is a near-duplicate of a test image.

    Args:
      memory: all of its image embeddings are compared, as an index could miss some.
      images: unit rows, by the memory's own encoder.
      max_similarity: a larger inner product is a near-duplicate.
    """
    larger = float(np.nextafter(np.float32(max_similarity), np.float32(2)))
    return streaming.find_similar(memory.image_embeddings, images, larger)[0]


def without_near_duplicates(
    retriever: Retriever,
    images: Float32[np.ndarray, "images d_embed"],
    max_similarity: float,
    seed: int,
) -> tuple[dict[str, Any], int]:
    """Retrievers that never return near-duplicates of a test set.

    Args:
      retriever: of the memory.
      images: of the test set, see `find_near_duplicates`.
      max_similarity: see `find_near_duplicates`.
      seed: of the random retriever.

    Returns:
      (the same retriever and a `RandomRetriever`, by the variants "retrieval" and
      "random"; the number of removed documents).
    """
    rows = find_near_duplicates(retriever.memory, images, max_similarity)
    memory: Any = ReducedMemory(retriever.memory, rows)
    retrievers = {
        "retrieval": Retriever(memory, retriever.strategy),
        "random": RandomRetriever(memory, seed),
    }
    return retrievers, len(rows)
