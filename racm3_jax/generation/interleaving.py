"""Free generation: texts and images, in any order, after given texts and images.

<eod> documents <eod> text <break> image <break>  text <break> image ... <eod>
                      `------- given ---------'  `------- sampled ----------'
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import interleaved_grammar
from racm3_jax.generation.requests import Image, Prompt, Task
from racm3_jax.sequences.layout import beginning_prompt, document_tokens
from racm3_jax.types import Document, Segment


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


def make_task(
    engine: Engine,
    parts: Sequence[str | Image],
    max_segments: int,
    max_text_length: int,
) -> Task:
    """Text and images after the given ones, as the model chooses.

    The query is the first text, or else the first image.
    """
    segments = read_parts(parts)
    vocab = engine.tokenizer.vocab
    given = np.zeros(0, np.int32)
    if segments:
        (document,) = engine.tokenized([Document("given", segments)])
        break_ = np.array([vocab.break_], np.int32)
        given = np.concatenate([document_tokens(document, vocab), break_])
    texts = [part for part in parts if isinstance(part, str)]
    return Task(
        "generate",
        texts=[" ".join(texts)],
        queries=[*texts, *parts, ""][:1],
        prompts=[Prompt(lambda documents: beginning_prompt(documents, given, vocab))],
        grammar=interleaved_grammar(vocab, max_text_length, max_segments),
        max_new_tokens=max_segments * (max(max_text_length, vocab.image_length) + 1),
        exact=True,
        writes_images=True,
        read=lambda _, tokens: (*segments, *split_segments(engine, tokens)),
        facts={"given_segments": len(segments)},
    )


def split_segments(
    engine: Engine, tokens: Int32[np.ndarray, " new"]
) -> tuple[Segment, ...]:
    """Sampled tokens -> texts and images."""
    vocab = engine.tokenizer.vocab
    kept = tokens[~np.isin(tokens, (vocab.pad, vocab.eod))]
    document = engine.tokenizer.split_tokens(kept)
    return engine.tokenizer.decode(document).segments
