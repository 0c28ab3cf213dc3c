"""What each document contributed to a sample: its likelihood without that document.

    bits of document i = log2 p(sample | all documents) - log2 p(sample | all but i)

Leave-one-out, teacher-forced: nothing is sampled again. The whole image is scored after
its text, as the tokenizer encodes its pixels, including what an infill kept; a caption as
it was asked for. Of two documents that say the same either is enough, so both can have few
bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from racm3_jax.generation.captioning import write_after
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.generation.requests import WritePrompt
from racm3_jax.sequences.layout import beginning_prompt
from racm3_jax.types import Document, GenerationOutput


def attribute_sample(
    engine: Engine, output: GenerationOutput, sample: int
) -> Float32[np.ndarray, " documents"]:
    """Bits of each retrieved document, in the order in which they were shown.

    Args:
      engine: that sampled it, or another whose reading is asked about.
      output: of a task that ends in an image or is a caption.
      sample: which one, 0 for the best.

    Raises:
      ValueError: no such sample, or one that is neither a captioned image nor a caption.
    """
    if not 0 <= sample < len(output.documents):
        raise ValueError(
            f"there are samples 0..{len(output.documents) - 1}; got sample {sample}"
        )
    shown = output.retrieved.documents
    if not shown:
        return np.zeros(0, np.float32)
    known, written = _split(engine, output.documents[sample], output.settings)
    contexts = [shown, *(shown[:i] + shown[i + 1 :] for i in range(len(shown)))]
    asked = [Scored(known(documents), written) for documents in contexts]
    nats = compute_log_likelihoods(engine, asked)
    return ((nats[0] - nats[1:]) / math.log(2)).astype(np.float32)


def _split(
    engine: Engine, document: Document, settings: Mapping[str, Any]
) -> tuple[WritePrompt, Int32[np.ndarray, " written"]]:
    """How the sample was asked for after documents, and its tokens."""
    vocab = engine.tokenizer.vocab
    segments = document.segments
    kinds = tuple("text" if s.text is not None else "image" for s in segments)
    (tokenized,) = engine.tokenized([document])
    tokens: list[Int32[np.ndarray, " length"]] = [s.tokens for s in tokenized.segments]
    if document.metadata.get("task") == "caption" and kinds == ("text", "image"):
        prefix, prompt = settings["prefix"], settings["caption_prompt"]
        encode = engine.tokenizer.encode_text
        start = encode(prefix) if prefix else np.zeros(0, np.int32)
        text = encode(document.text.removeprefix(prefix)) if prefix else tokens[0]
        end = vocab.eoss if prompt == "masked" else vocab.eod
        known = write_after(vocab, tokens[1], start, prompt, settings["image_first"])
        return known, np.append(text, end).astype(np.int32)
    if kinds in (("image",), ("text", "image")):
        before = [np.append(text, vocab.break_) for text in tokens[:-1]]
        start = np.concatenate([np.zeros(0, np.int32), *before]).astype(np.int32)
        return lambda documents: beginning_prompt(documents, start, vocab), tokens[-1]
    raise ValueError(
        "contributions of documents are measured for images and for captions; this "
        f"sample has the segments {', '.join(kinds)}"
    )
