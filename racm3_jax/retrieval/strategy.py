"""Selects documents from the candidates: relevance, modality, diversity. NumPy only.

RA-CM3 (arXiv 2211.12561, section 3.1): go through the ranked list; keep documents with
both image and text; skip candidates too similar to the query or to a selected one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from racm3_jax.limits import check_choices, check_range
from racm3_jax.types import TokenizedDocument

Ranking = Literal["relevance", "random"]
Given = Literal["both", "text", "image"]


@dataclasses.dataclass(frozen=True)
class StrategyConfig:
    """How retrieved documents are chosen.

    Attributes:
      max_similarity: candidates whose inner product with the query, or with an already
        selected document, is above this are skipped (0.9 in the paper); >= 1 keeps all.
      num_candidates: number of candidates per query at first.
      max_candidates: if too few of them are left, four times as many are searched, up
        to this number.
      require_multimodal: keep only documents with both text and an image.
      drop_same_source: skip candidates with the main document's source.
      exclude_keys: metadata keys, "house,thing": skip candidates that agree with the main
        document in all of them. A missing key never agrees. "" skips none.
      ranking: "relevance" takes the nearest to the query; "random" is the baseline that
        samples candidates uniformly, independent of the query.
      given: which parts of the retrieved documents are in the context.
    """

    max_similarity: float = 0.9
    num_candidates: int = 32
    max_candidates: int = 512
    require_multimodal: bool = True
    drop_same_source: bool = True
    exclude_keys: str = ""
    ranking: Ranking = "relevance"
    given: Given = "both"

    def __post_init__(self) -> None:
        choices = {"ranking": get_args(Ranking), "given": get_args(Given)}
        check_choices(self, "strategy", **choices)
        if self.given != "both" and not self.require_multimodal:
            raise ValueError(
                f"strategy.given={self.given!r} needs strategy.require_multimodal=True: "
                "a document without that modality would be empty"
            )
        check_range(self, "strategy", "num_candidates", low=1)
        if self.max_candidates < self.num_candidates:
            raise ValueError(
                "strategy.max_candidates must be >= strategy.num_candidates "
                f"({self.num_candidates}); got {self.max_candidates}"
            )

    @property
    def parsed_exclude_keys(self) -> tuple[str, ...]:
        """The keys in `exclude_keys`."""
        names = (name.strip() for name in self.exclude_keys.split(","))
        return tuple(name for name in names if name)


def join_key_values(metadata: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Equal for documents that agree in all keys; "" if one is missing.

    {"thing": "owl", "house": "noto"}, (house, thing)  ->  '["noto", "owl"]'
    """
    values = [metadata.get(key) for key in keys]
    if not keys or any(value is None or value == "" for value in values):
        return ""
    return json.dumps([str(value) for value in values])


def find_self_and_same_source(
    id_hashes: UInt64[np.ndarray, " k"],
    source_hashes: UInt64[np.ndarray, " k"],
    main_id_hash: int,
    main_source_hash: int,
    *,
    drop_same_source: bool = True,
) -> Bool[np.ndarray, " k"]:
    """True if a candidate is the main document itself, or has the same source.

    Args:
      id_hashes: of the candidates' ids.
      source_hashes: of their sources; 0 if a document has none.
      main_id_hash: of the main document's id.
      main_source_hash: of its source, or 0.
      drop_same_source: False compares ids only.
    """
    own = id_hashes == np.uint64(main_id_hash)
    if drop_same_source and main_source_hash:
        own |= source_hashes == np.uint64(main_source_hash)
    return own


def select(
    scores: Float[np.ndarray, " k"],
    embeddings: Float[np.ndarray, "k d_embed"] | None,
    *,
    num: int,
    excluded: Bool[np.ndarray, " k"],
    max_similarity: float = 0.9,
) -> Int[np.ndarray, " taken"]:
    """Goes through the ranked candidates of one query and selects at most `num`.

        scores        .97   .80   .79   .60   .55
        excluded       no    no    no   yes    no
        similar to           -    [1]    -     -      (> 0.9)
        taken               [1]               [4]     (num = 2)

    Args:
      scores: inner products of the query with the candidates, best first.
      embeddings: unit rows of the candidates; None compares them only with the
        query.
      num: maximum number to select.
      excluded: True for candidates to drop: the main document itself, same source,
        denied, unfilled slot, or missing modality.
      max_similarity: see `StrategyConfig`.

    Returns:
      Positions of the selected candidates, in the order of the list.
    """
    taken: list[int] = []
    for position in np.flatnonzero(~excluded & (scores <= max_similarity)):
        if len(taken) == num:
            break
        if embeddings is not None:
            similarities = embeddings[taken] @ embeddings[position]
            if (similarities > max_similarity).any():
                continue
        taken.append(int(position))
    return np.asarray(taken, np.int64)


def sample_candidates(
    rows: Int[np.ndarray, " allowed"], num: int, query: Float[np.ndarray, " d_embed"]
) -> Int[np.ndarray, " num"]:
    """Random retrieval: `num` different rows, sampled uniformly.

    They depend only on the query's bytes, so that a resumed training samples the same
    ones again.
    """
    digest = hashlib.sha256(np.ascontiguousarray(query, np.float32).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return rows[rng.choice(len(rows), min(num, len(rows)), replace=False)]


def keep_modality(document: TokenizedDocument, given: Given) -> TokenizedDocument:
    """The document with only its texts or only its images, or all of it.

    t1 t2 <break> i1 i2,  "image"  ->  i1 i2
    """
    if given == "both":
        return document
    kept = tuple(s for s in document.segments if s.modality == given)
    return dataclasses.replace(document, segments=kept)


def sample_num_documents(rng: np.random.Generator, maximum: int) -> int:
    """K ~ Uniform{0, …, maximum}; the paper trains with maximum = 2."""
    if maximum < 0:
        raise ValueError(f"the largest number of documents must be >= 0; got {maximum}")
    return int(rng.integers(maximum + 1))
