"""Free generation: any text and images in front, any text and images after them.

<eod> documents <eod> text <break> image <break>  text <break> image ... <eod>
                      `-- what was given -----'  `-- what is written -------'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import interleaved_grammar
from racm3_jax.generation.requests import Image, Request, mean_log_probs
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.sequences.layout import document_tokens, retrieved_prefix
from racm3_jax.types import Document, GenerationOutput, Retrieved, Segment


def read_parts(parts: Sequence[str | Image]) -> tuple[Segment, ...]:
    """Texts and images as segments; neighbouring texts stay apart.

    Raises:
      ValueError: an empty text, or something that is neither.
    """
    segments = []
    for i, part in enumerate(parts):
        if isinstance(part, str) and part.strip():
            segments.append(Segment(text=part))
        elif isinstance(part, np.ndarray):
            segments.append(Segment(image=part))
        else:
            raise ValueError(
                f"part {i} is {part!r}; a part is a text that is not empty, or an image"
            )
    return tuple(segments)


def generate(
    engine: Engine,
    segments: tuple[Segment, ...],
    retrieved: Retrieved,
    seed: int,
    config: SamplingConfig,
    num_samples: int,
    max_segments: int,
    max_text_length: int,
) -> GenerationOutput:
    """Goes on after the segments, with text and images as the model chooses."""
    vocab = engine.tokenizer.vocab
    given = np.zeros(0, np.int32)
    if segments:
        (document,) = engine.tokenized([Document("given", segments)])
        given = np.append(document_tokens(document, vocab), vocab.break_)
    given = given.astype(np.int32)
    request = Request(
        retrieved,
        lambda documents: np.concatenate([retrieved_prefix(documents, vocab), given]),
        None,
        seed,
    )
    grammar = interleaved_grammar(vocab, max_text_length, max_segments)
    most = max_segments * (max(max_text_length, vocab.image_length) + 1)
    config = dataclasses.replace(config, max_new_tokens=most)
    samples = engine.sample_requests(
        [request], grammar, config, num_samples, exact=True, writes_images=True
    )
    written = [split_segments(engine, drawn) for drawn in samples.tokens[0]]
    return engine.output(
        "generate",
        [(*segments, *new) for new in written],
        mean_log_probs(samples)[0],
        request,
        " ".join(s.text for s in segments if s.text is not None),
        [{"given_segments": len(segments)} for _ in written],
        samples.count_drafts(0),
    )


def split_segments(
    engine: Engine, drawn: Int32[np.ndarray, " new"]
) -> tuple[Segment, ...]:
    """Drawn ids -> texts and images."""
    vocab = engine.tokenizer.vocab
    kept = drawn[~np.isin(drawn, (vocab.pad, vocab.eod))]
    document = engine.tokenizer.split_tokens(kept)
    return engine.tokenizer.decode(document).segments
