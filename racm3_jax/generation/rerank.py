"""Which sample is best, which document explains an image, what is too close to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.generation.settings import RANKINGS, RankBy
from racm3_jax.sequences.layout import beginning_prompt
from racm3_jax.types import Retrieved, TokenizedDocument
from racm3_jax.vocab import Vocab

if TYPE_CHECKING:
    from racm3_jax.generation.engine import Engine

# Fraction of codes equal to those of a retrieved image, position by position, from which a
# generated image is called a near copy. Two images of the same scene share far fewer.
NEAR_COPY = 0.9


def check_rank_by(rank_by: str, engine: Engine, retrieved: Sequence[Retrieved]) -> None:
    """Refuses other rankings, and likeness to documents that are not there."""
    if rank_by not in RANKINGS:
        raise ValueError(
            f"rank_by is {rank_by!r}; allowed: {', '.join(map(repr, RANKINGS))}"
        )
    if rank_by == "document" and (
        engine.embedder is None or any(_first_picture(r) is None for r in retrieved)
    ):
        raise ValueError(
            "rank_by='document' compares with the picture of the first document, with "
            "CLIP: retrieve or give one that has a picture, or use another rank_by"
        )


def choose_ranking(engine: Engine) -> RankBy:
    """The ranking that was measured best with the weights, if they say one.

    Else "clip" where the CLIP was measured to align texts with images, else "likelihood".
    The paper ranks by CLIP. A CLIP whose alignment is poor, or was never measured, would
    order samples by noise; see `retrieval.alignment`.
    """
    measured = engine.defaults.get("image", {}).get("rank_by", "auto")
    if measured != "auto":
        return measured
    embedder = engine.embedder
    alignment = None if embedder is None else embedder.alignment
    return "clip" if alignment is not None and alignment.may_rank else "likelihood"


def score_pictures(
    engine: Engine,
    rank_by: str,
    prompts: Sequence[str],
    retrieved: Sequence[Retrieved],
    images: UInt8[np.ndarray, "prompts samples height width 3"],
    log_probs: Float32[np.ndarray, "prompts samples"],
) -> Float32[np.ndarray, "prompts samples"]:
    """What samples are ranked by.

    Args:
      engine: whose embedder compares.
      rank_by: "clip" is the paper's (section 4), "document" the likeness to the picture
        of the first document, "likelihood" is `log_probs`, "auto" see `choose_ranking`.
      prompts: of the rows; "clip" needs all of them.
      retrieved: the documents of the rows.
      images: what was generated.
      log_probs: mean log-likelihoods of the generated tokens.
    """
    embedder = engine.embedder
    if rank_by == "auto":
        rank_by = choose_ranking(engine)
    if embedder is None or rank_by == "likelihood":
        return log_probs
    if rank_by == "clip":
        if not all(prompts):
            return log_probs
        queries = embedder.align(embedder.embed_texts(list(prompts)))
    else:
        firsts = [_first_picture(r) for r in retrieved]
        whole = [engine.tokenizer.decode(d) for d in firsts if d is not None]
        queries = embedder.embed_images([d.images[0] for d in whole])
    rows, samples = images.shape[:2]
    embeddings = embedder.embed_images(images.reshape(-1, *images.shape[2:]))
    if rank_by == "clip":
        embeddings = embedder.align(embeddings)
    return np.einsum("nd,nsd->ns", queries, embeddings.reshape(rows, samples, -1))


def _first_picture(retrieved: Retrieved) -> TokenizedDocument | None:
    """The first document, if it has a picture."""
    for document in retrieved.documents[:1]:
        if any(segment.modality == "image" for segment in document.segments):
            return document
    return None


def check_candidates(
    num_candidates: int, num_retrieved: int, documents: Sequence[Any] | None
) -> None:
    """Refuses numbers of candidates that cannot be, or would do nothing."""
    if not num_candidates:
        return
    if num_candidates < max(1, num_retrieved):
        raise ValueError(
            f"num_candidates is {num_candidates}, of which num_retrieved="
            f"{num_retrieved} are kept: ask for at least as many, or 0 for no re-ranking"
        )
    if documents is not None or num_retrieved < 1:
        raise ValueError(
            "num_candidates re-ranks what is retrieved; nothing is, with documents=[...] "
            "or num_retrieved=0"
        )


def rank_documents(
    engine: Engine,
    images: Int32[np.ndarray, "images image_length"],
    candidates: Sequence[Retrieved],
    num: int,
) -> list[Retrieved]:
    """Of each image's candidates the `num` after which the image is likeliest.

    The generator itself judges what helps it, as in-context RALM re-ranks
    (arXiv 2302.00083, section 5): one forward pass a candidate.

    Args:
      engine: whose model reads.
      images: their tokens.
      candidates: of each image, as retrieved.
      num: how many to keep, the likeliest first.
    """
    vocab = engine.tokenizer.vocab
    # An image whose caption is left out: as captioning asks (`layout.caption_prompt`).
    known = np.array([vocab.sentinel(0), vocab.break_], np.int32)
    asked = [
        Scored(beginning_prompt([document], known, vocab), image)
        for image, found in zip(images, candidates, strict=True)
        for document in found.documents
    ]
    if not asked:
        return list(candidates)
    scores = compute_log_likelihoods(engine, asked)
    ends = np.cumsum([len(found.documents) for found in candidates])[:-1]
    kept = []
    for found, likelihoods in zip(candidates, np.split(scores, ends), strict=True):
        order = np.argsort(-likelihoods, kind="stable")[:num]
        documents = tuple(found.documents[i] for i in order)
        kept.append(
            found._replace(
                ids=found.ids[order], scores=found.scores[order], documents=documents
            )
        )
    return kept


def find_nearest(
    tokens: Int[np.ndarray, "samples image_length"], retrieved: Retrieved, vocab: Vocab
) -> list[dict[str, Any]]:
    """How close each generated image is to the closest retrieved one.

    Returns:
      For each sample `{"nearest": {"id", "equal_codes"}, "near_copy"}`; empty when no
      retrieved document has an image.
    """
    images = [
        (document.id, segment.tokens)
        for document in retrieved.documents
        for segment in document.segments
        if segment.modality == "image" and len(segment.tokens) == vocab.image_length
    ]
    if not images:
        return [{} for _ in tokens]
    shares = np.stack([(tokens == other).mean(-1) for _, other in images], axis=1)
    closest = shares.argmax(1)
    return [
        {
            "nearest": {"id": images[i][0], "equal_codes": round(float(row[i]), 4)},
            "near_copy": bool(row[i] >= NEAR_COPY),
        }
        for row, i in zip(shares, closest, strict=True)
    ]
