"""Image to text, by the paper's masked prompt or with the caption last.

masked   <eod> documents <eod> Photo of <mask:0> <break> image <eod> <mask:0> ...
last     <eod> documents <eod> image <break> Photo of ...
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import text_grammar
from racm3_jax.generation.requests import Image, Prompt, Task, check_image
from racm3_jax.generation.rerank import rank_documents
from racm3_jax.sequences.layout import beginning_prompt, caption_prompt
from racm3_jax.types import Segment

CaptionPrompt = Literal["masked", "last"]
CAPTION_PROMPTS: tuple[CaptionPrompt, ...] = ("masked", "last")


def make_task(
    engine: Engine,
    images: Sequence[Image],
    max_caption_length: int,
    prefix: str,
    prompt: CaptionPrompt,
    num_kept: int | None,
) -> Task:
    """A caption begins with `prefix` and continues with what is sampled.

    `num_kept` re-ranks the documents and keeps so many (see `rerank.rank_documents`).
    """
    if prompt not in CAPTION_PROMPTS:
        raise ValueError(
            f"caption_prompt is {prompt!r}; allowed: "
            + ", ".join(map(repr, CAPTION_PROMPTS))
        )
    images = [check_image(image) for image in images]
    vocab, size = engine.tokenizer.vocab, engine.tokenizer.image.image_size
    ends = (vocab.eoss,) if prompt == "masked" else (vocab.eod,)
    grammar = text_grammar(vocab, max_caption_length, ends=ends)
    pixels = np.stack([resize_image(image, size) for image in images])
    tokens = vocab.image_tokens(engine.tokenizer.image.encode(pixels))
    start = engine.tokenizer.encode_text(prefix) if prefix else np.zeros(0, np.int32)
    break_ = np.array([vocab.break_], np.int32)

    def write(image):
        if prompt == "masked":
            return lambda documents: caption_prompt(documents, image, vocab, start)
        known = np.concatenate([image, break_, start])
        return lambda documents: beginning_prompt(documents, known, vocab)

    def read(row, drawn):
        text = decode_text(engine, start, drawn)
        return Segment(text=text), Segment(image=images[row])

    choose = None
    if num_kept is not None:
        choose = functools.partial(rank_documents, engine, tokens, num=num_kept)
    return Task(
        "caption",
        texts=[prefix] * len(images),
        queries=images,
        prompts=[Prompt(write(image)) for image in tokens],
        grammar=grammar,
        max_new_tokens=max_caption_length + 1,
        read=read,
        choose=choose,
    )


def decode_text(
    engine: Engine,
    before: Int32[np.ndarray, " before"],
    drawn: Int32[np.ndarray, " new"],
    after: Int32[np.ndarray, " after"] | Sequence[int] = (),
) -> str:
    """Sampled text between what was around it, without control tokens."""
    kept = drawn[engine.tokenizer.vocab.is_text(drawn)]
    ids = np.concatenate([before, kept, np.asarray(after, np.int32)])
    return engine.tokenizer.text.decode(ids.astype(np.int32))
