"""From queries to documents: one index search per batch, then the strategy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int

from racm3_jax.index.contract import empty_neighbours
from racm3_jax.memory.filters import NEAR_SIMILARITY
from racm3_jax.memory.format import hash_name, is_of_training
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval import strategy as strategy_lib
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import (
    Document,
    Modality,
    Neighbours,
    Retrieved,
    TokenizedDocument,
)

_NUM_LOOKED_AT = 64
# Set in every hash that was read.
_READ = np.uint64(1 << 63)
_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.float32))


class Retriever:
    """Retrieves documents of a memory by a strategy. Thread-safe.

    Args:
      memory: the documents.
      strategy: how documents are chosen.

    Raises:
      ValueError: no document of the memory has a key of `strategy.exclude_keys`.
    """

    def __init__(self, memory: Memory, strategy: StrategyConfig | None = None):
        self.memory = memory
        self.strategy = strategy or StrategyConfig()
        if self.strategy.parsed_exclude_keys:
            self._check_keys(self.strategy.parsed_exclude_keys)
            # Hashes of the rows' key values, read when a row is a candidate; 0: unread.
            self._key_hashes = np.zeros(len(memory), np.uint64)

    def _check_keys(self, keys: Sequence[str]) -> None:
        """Samples documents from the whole memory."""
        rows = np.unique(
            np.linspace(0, len(self.memory) - 1, _NUM_LOOKED_AT, dtype=int)
        )
        there: set[str] = set().union(*self.memory.metadata(rows))
        for key in keys:
            if key not in there:
                known = ", ".join(sorted(there)) or "none"
                raise ValueError(
                    f"strategy.exclude_keys names {key!r}, which the metadata of the "
                    f"memory at {self.memory.path} do not have; they have: {known}"
                )

    def retrieve(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        nums: Int[np.ndarray, " queries"],
        mains: Sequence[TokenizedDocument | None],
    ) -> list[Retrieved]:
        """The documents for each query, best first.

        Args:
          queries: unit rows.
          nums: number of documents per query, may be 0. Fewer are returned if the
            strategy drops all other candidates.
          mains: the main document of each query, which is never returned, nor any that
            the strategy excludes for it; None if there is none.

        Raises:
          ValueError: the lengths differ, or a number is negative or larger than the
            number of allowed documents in the memory.
        """
        nums = np.asarray(nums, np.int64)
        if not len(queries) == len(nums) == len(mains):
            raise ValueError(
                "queries, nums and mains go together; got "
                f"{len(queries)}, {len(nums)} and {len(mains)} of them"
            )
        self._check_nums(nums)
        chosen: list[tuple[np.ndarray, np.ndarray]] = [_NOTHING] * len(nums)
        asking = np.flatnonzero(nums)
        config = self.strategy

        def take(places: np.ndarray, found: Neighbours) -> np.ndarray:
            numbers = asking[places]
            for number, taken in zip(
                numbers, self._select(found, nums, numbers, mains), strict=True
            ):
                chosen[number] = taken
            return np.asarray([len(chosen[n][0]) >= nums[n] for n in numbers], bool)

        if config.ranking == "relevance":
            # Denied rows take slots of the search, but do not count as candidates.
            denied = len(self.memory) - self.memory.num_allowed
            self.memory.search_until(
                queries[asking],
                take,
                config.num_candidates + min(config.num_candidates, denied),
                config.max_candidates + denied,
            )
        else:
            places = np.arange(len(asking))
            for width in (config.num_candidates, config.max_candidates):
                done = take(places, self._sample(queries[asking[places]], width))
                places = places[~done]
        return self._read(chosen)

    def usual_score(self, modality: Modality) -> float:
        """See `Memory.usual_score`; NaN if the strategy takes random documents."""
        if self.strategy.ranking != "relevance":
            return float("nan")
        return self.memory.usual_score(modality)

    def _check_nums(self, nums: Int[np.ndarray, " queries"]) -> None:
        if not len(nums):
            return
        allowed = self.memory.num_allowed
        if nums.min() < 0 or nums.max() > allowed:
            wrong = nums.min() if nums.min() < 0 else nums.max()
            raise ValueError(
                f"cannot retrieve {wrong} documents: the memory at {self.memory.path} "
                f"has {allowed}, so num_retrieved must be in 0..{allowed}"
            )

    def _select(
        self,
        found: Neighbours,
        nums: Int[np.ndarray, " queries"],
        asking: Int[np.ndarray, " asking"],
        mains: Sequence[TokenizedDocument | None],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and scores selected for each unfinished query from its candidates."""
        config, memory = self.strategy, self.memory
        # Unfilled slots point to row 0; they are excluded.
        rows = np.maximum(found.ids, 0)
        excluded = ~found.valid
        if config.require_multimodal:
            excluded |= ~memory.is_multimodal[rows]
        excluded |= self._find_copies(rows, [mains[i] for i in asking])
        compares = config.max_similarity < 1
        chosen = []
        for j, i in enumerate(asking):
            main = mains[i]
            if main is not None:
                excluded[j] |= strategy_lib.find_self_and_same_source(
                    memory.id_hashes[rows[j]],
                    memory.source_hashes[rows[j]],
                    hash_name(main.id),
                    hash_name(main.source),
                    drop_same_source=config.drop_same_source,
                )
                excluded[j] |= self._find_equal_keys(rows[j], main)
                excluded[j] |= self._find_held_out(rows[j], main)
            taken = strategy_lib.select(
                found.scores[j],
                memory.embeddings[rows[j]] if nums[i] > 1 and compares else None,
                num=int(nums[i]),
                excluded=excluded[j],
                max_similarity=config.max_similarity,
            )
            chosen.append((rows[j][taken], found.scores[j][taken]))
        return chosen

    def _sample(
        self, queries: Float32[np.ndarray, "asking d_embed"], width: int
    ) -> Neighbours:
        """Allowed rows sampled uniformly for each query, in random order."""
        allowed = self.memory.allowed_ids()
        width = min(width, len(allowed))
        found = empty_neighbours(len(queries), width)
        for j, query in enumerate(queries):
            rows = strategy_lib.sample_candidates(allowed, width, query)
            found.ids[j, : len(rows)] = rows
            found.scores[j, : len(rows)] = self.memory.embeddings[rows] @ query
            found.valid[j, : len(rows)] = True
        return found

    def _find_equal_keys(
        self, rows: Int[np.ndarray, " k"], main: TokenizedDocument
    ) -> Bool[np.ndarray, " k"] | np.bool_:
        """True if a candidate agrees with the main document in all `exclude_keys`."""
        keys = self.strategy.parsed_exclude_keys
        name = strategy_lib.join_key_values(main.metadata, keys)
        if not name:
            return np.False_
        unread = np.unique(rows[self._key_hashes[rows] == 0])
        if len(unread):
            names = [
                hash_name(strategy_lib.join_key_values(facts, keys))
                for facts in self.memory.metadata(unread)
            ]
            self._key_hashes[unread] = np.array(names, np.uint64) | _READ
        return self._key_hashes[rows] == (np.uint64(hash_name(name)) | _READ)

    def _find_held_out(
        self, rows: Int[np.ndarray, " k"], main: TokenizedDocument
    ) -> Bool[np.ndarray, " k"] | np.bool_:
        """True if the main document is of training and a candidate is held out."""
        splits = self.memory.split_hashes
        if splits is None or main.metadata.get("split") != "train":
            return np.False_
        return ~is_of_training(splits[rows])

    def _find_copies(
        self,
        rows: Int[np.ndarray, "asking k"],
        mains: Sequence[TokenizedDocument | None],
    ) -> Bool[np.ndarray, "asking k"]:
        """True if a candidate is an exact or near duplicate of the main document.

        Only for memories with content hashes.
        """
        memory = self.memory
        copies = np.zeros(rows.shape, bool)
        if memory.content_hashes is None or memory.image_hashes is None:
            return copies
        own = memory.find(["" if main is None else main.id for main in mains])
        asking = np.flatnonzero(own >= 0)
        own, rows = own[asking, None], rows[asking]
        images = memory.image_hashes[own]
        near = (memory.image_hashes[rows] == images) & (images > 0)
        queries, places = np.nonzero(near)
        if len(queries):
            similarities = np.einsum(
                "pd,pd->p",
                memory.image_embeddings[own[queries, 0]],
                memory.image_embeddings[rows[queries, places]],
            )
            near[queries, places] = similarities >= NEAR_SIMILARITY
        copies[asking] = near | (
            memory.content_hashes[rows] == memory.content_hashes[own]
        )
        return copies

    def _read(self, chosen: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Retrieved]:
        """Reads the records of the whole batch at once."""
        documents = iter(
            self.memory.documents(
                np.concatenate([_NOTHING[0], *(c[0] for c in chosen)])
            )
        )
        return [
            Retrieved(
                rows,
                scores,
                tuple(
                    strategy_lib.keep_modality(next(documents), self.strategy.given)
                    for _ in rows
                ),
            )
            for rows, scores in chosen
        ]


class OwnExcluded:
    """A retriever that knows which document each query of a call was made from.

    For evaluations of documents that are in the memory themselves.

    Args:
      retriever: searches.
      mains: of the queries, in their order.
    """

    def __init__(
        self, retriever: Retriever, mains: Sequence[TokenizedDocument]
    ) -> None:
        self._retriever, self._mains = retriever, list(mains)
        self.memory, self.strategy = retriever.memory, retriever.strategy

    def usual_score(self, modality: Modality) -> float:
        """See `Retriever.usual_score`."""
        return self._retriever.usual_score(modality)

    def retrieve(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        nums: Int[np.ndarray, " queries"],
        mains: Sequence[TokenizedDocument | None],
    ) -> list[Retrieved]:
        """As `Retriever.retrieve`, for the documents given at the start."""
        if len(queries) != len(self._mains):
            raise ValueError(
                f"{len(self._mains)} queries were announced; got {len(queries)}"
            )
        return self._retriever.retrieve(queries, nums, self._mains)


def as_main(document: Document) -> TokenizedDocument:
    """Which document a query is made from, without its tokens."""
    return TokenizedDocument(document.id, (), document.source, document.metadata)
