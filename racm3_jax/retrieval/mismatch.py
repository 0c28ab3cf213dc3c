"""Checks on a sample whether an embedder suits a memory's documents.

A suitable embedder aligns texts with images, or at least has the words of the captions
in its vocabulary. If neither holds, a search for "a duck" finds trucks.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.alignment import Alignment, measure_alignment
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.mixed import MixedTokenizer

_NUM_SAMPLED = 256
# Below it, a text is hardly nearer to its own image than to another one (chance is
# 0.5).
MIN_FIT = 0.75
# A text tower trained on such captions has most of their words in its vocabulary.
_MAX_TOKENS_PER_WORD = 2.0
# Fewer pairs are not meaningful.
_MIN_PAIRS = 8


def explain_mismatch(
    memory: Memory, tokenizer: MixedTokenizer, embedder: DocumentEmbedder | None
) -> str:
    """What is wrong and which command fixes it; "" if the embedder is suitable.

    An embedder that separates texts and images by design is judged by whether the
    captions' words are in its vocabulary.

    Args:
      memory: the memory of the documents.
      tokenizer: the `MixedTokenizer` of the memory.
      embedder: that embedded them; None if only its embeddings are known.
    """
    rows = _sample(memory)
    if len(rows) < _MIN_PAIRS:
        return ""
    found = measure_rows(memory, rows, embedder)
    if found.preference >= MIN_FIT:
        return ""
    reason = (
        f"captions of this memory are nearer to their own image than to another one in "
        f"{found.preference:.0%} of {len(rows)} samples (50% is chance)"
    )
    if embedder is not None:
        aligns = embedder.alignment is not None and embedder.alignment.may_rank
        words = _tokens_per_word(memory, rows, tokenizer, embedder)
        if not aligns and words <= _MAX_TOKENS_PER_WORD:
            return ""
        reason += f", and their words take {words:.1f} tokens each in the encoder"
    return (
        f"the encoder does not suit these documents: {reason}, so text queries may "
        "return anything. Train one on them (racm3 fit --source=…), or convert a "
        "public CLIP (racm3 convert clip SRC OUT) and build the memory again with "
        "--embedder=OUT; racm3 memory search --words=… finds captions by their words"
    )


def measure_rows(
    memory: Memory, rows: Int64[np.ndarray, " n"], embedder: DocumentEmbedder | None
) -> Alignment:
    """The alignment of the stored text and image embeddings of these rows."""
    texts = np.asarray(memory.text_embeddings[rows], np.float32)
    images = np.asarray(memory.image_embeddings[rows], np.float32)
    if embedder is not None:
        texts, images = embedder.align(texts), embedder.align(images)
    return measure_alignment(texts, images)


def _sample(memory: Memory) -> Int64[np.ndarray, " n"]:
    """Rows with a text and an image, spread over the memory, without repeated texts."""
    rows = memory.allowed_ids()
    rows = rows[memory.is_multimodal[rows]]
    places = np.linspace(0, len(rows) - 1, min(len(rows), _NUM_SAMPLED)).astype(int)
    rows = rows[np.unique(places)]
    texts = np.asarray(memory.text_embeddings[rows])
    return np.sort(rows[np.unique(texts, axis=0, return_index=True)[1]])


def _tokens_per_word(
    memory: Memory,
    rows: Int64[np.ndarray, " n"],
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
) -> float:
    texts = [tokenizer.decode_text(document) for document in memory.documents(rows)]
    num_words = sum(len(text.split()) for text in texts)
    num_tokens = sum(len(embedder.text_tokenizer.encode(text)) for text in texts)
    return num_tokens / max(1, num_words)
