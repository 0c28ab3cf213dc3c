"""Image to text, by the paper's masked prompt or with the caption last.

masked   <eod> documents <eod> Photo of <mask:0> <break> image <eod> <mask:0> ...
last     <eod> documents <eod> image <break> Photo of ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import text_grammar
from racm3_jax.generation.requests import Image, Request, mean_log_probs
from racm3_jax.generation.rerank import rank_documents
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.sequences.layout import caption_prompt, retrieved_prefix
from racm3_jax.types import GenerationOutput, Retrieved, Segment

CaptionPrompt = Literal["masked", "last"]
CAPTION_PROMPTS: tuple[CaptionPrompt, ...] = ("masked", "last")


def make_caption_request(
    engine: Engine,
    image_tokens: Int32[np.ndarray, " image_length"],
    prefix: Int32[np.ndarray, " prefix"],
    retrieved: Retrieved,
    seed: int,
    prompt: CaptionPrompt,
    guide_documents: bool = False,
) -> Request:
    """A caption begins with `prefix` and goes on with what is sampled.

    Its prompt has no text to leave out: guidance can only leave out the documents.
    """
    vocab = engine.tokenizer.vocab

    def masked(documents):
        return caption_prompt(documents, image_tokens, vocab, prefix)

    def last(documents):
        before = retrieved_prefix(documents, vocab)
        break_ = np.array([vocab.break_], np.int32)
        return np.concatenate([before, image_tokens, break_, prefix])

    write = masked if prompt == "masked" else last
    return Request(retrieved, write, write if guide_documents else None, seed)


def caption(
    engine: Engine,
    images: Sequence[Image],
    retrieved: Sequence[Retrieved],
    seeds: Sequence[int],
    config: SamplingConfig,
    num_samples: int,
    max_caption_length: int,
    prefix: str,
    prompt: CaptionPrompt,
    num_kept: int | None = None,
) -> list[GenerationOutput]:
    """Describes every image after its documents, the likeliest caption first.

    `num_kept` re-ranks the documents and keeps so many (see `rerank.rank_documents`).
    """
    if prompt not in CAPTION_PROMPTS:
        raise ValueError(
            f"caption_prompt is {prompt!r}; allowed: "
            + ", ".join(map(repr, CAPTION_PROMPTS))
        )
    vocab, size = engine.tokenizer.vocab, engine.tokenizer.image.image_size
    config = dataclasses.replace(config, max_new_tokens=max_caption_length + 1)
    ends = (vocab.eoss,) if prompt == "masked" else (vocab.eod,)
    grammar = text_grammar(vocab, max_caption_length, ends=ends)
    pixels = np.stack([resize_image(image, size) for image in images])
    tokens = vocab.image_tokens(engine.tokenizer.image.encode(pixels))
    if num_kept is not None:
        retrieved = rank_documents(engine, tokens, retrieved, num_kept)
    start = engine.tokenizer.encode_text(prefix) if prefix else np.zeros(0, np.int32)
    requests = [
        make_caption_request(
            engine, image_tokens, start, found, seed, prompt, config.guide_documents
        )
        for image_tokens, found, seed in zip(tokens, retrieved, seeds, strict=True)
    ]
    samples = engine.sample_requests(requests, grammar, config, num_samples)
    scores = mean_log_probs(samples)
    outputs = []
    for i, image in enumerate(images):
        texts = [decode_text(engine, start, drawn) for drawn in samples.tokens[i]]
        segments = [(Segment(text=text), Segment(image=image)) for text in texts]
        outputs.append(
            engine.output("caption", segments, scores[i], requests[i], prefix)
        )
    return outputs


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
