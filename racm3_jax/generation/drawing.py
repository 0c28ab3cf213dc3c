"""Text to image, with any documents in front (RA-CM3, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import image_grammar
from racm3_jax.generation.requests import Request, mean_log_probs
from racm3_jax.generation.rerank import check_rank_by, find_nearest, score_pictures
from racm3_jax.generation.sample import OnProgress
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.sequences.layout import text_to_image_prompt
from racm3_jax.types import GenerationOutput, Retrieved, Segment

_UNDRAWN = 127  # grey


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses prompts that say nothing."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(
                f"the prompt is empty ({prompt!r}): say what to draw, for example "
                "'the flag of Velmoria on the moon'"
            )


def make_drawing_request(
    engine: Engine, prompt: str, retrieved: Retrieved, seed: int
) -> Request:
    """`... <eod> text <break>`, and with the text masked for guidance."""
    vocab = engine.tokenizer.vocab
    text = engine.tokenizer.encode_text(prompt)
    mask = np.array([vocab.sentinel(0)], np.int32)
    return Request(
        retrieved,
        lambda documents: text_to_image_prompt(documents, text, vocab),
        lambda documents: text_to_image_prompt(documents, mask, vocab),
        seed,
    )


def draw(
    engine: Engine,
    prompts: Sequence[str],
    retrieved: Sequence[Retrieved],
    seeds: Sequence[int],
    config: SamplingConfig,
    num_samples: int,
    rank_by: str,
    on_progress: OnProgress | None = None,
    task: str = "text_to_image",
) -> list[GenerationOutput]:
    """Draws every prompt behind its documents; `config` may leave the length open."""
    check_rank_by(rank_by, engine, retrieved)
    vocab = engine.tokenizer.vocab
    config = dataclasses.replace(
        config, max_new_tokens=vocab.image_length, fixed_length=True
    )
    requests = [
        make_drawing_request(engine, *parts)
        for parts in zip(prompts, retrieved, seeds, strict=True)
    ]
    samples = engine.sample_requests(
        requests,
        image_grammar(vocab),
        config,
        num_samples,
        ids=vocab.image_range,
        writes_images=True,
        on_progress=on_progress,
    )
    images = decode_images(engine, samples.tokens)
    scores = score_pictures(
        engine, rank_by, prompts, retrieved, images, mean_log_probs(samples)
    )
    return [
        engine.output(
            task,
            [(Segment(text=prompts[i]), Segment(image=x)) for x in images[i]],
            scores[i],
            request,
            prompts[i],
            find_nearest(samples.tokens[i], request.retrieved, vocab),
            samples.count_drafts(i),
        )
        for i, request in enumerate(requests)
    ]


def decode_images(
    engine: Engine, tokens: Int32[np.ndarray, "prompts samples codes"]
) -> UInt8[np.ndarray, "prompts samples height width 3"]:
    """Image ids -> pixels."""
    codes = engine.tokenizer.vocab.image_codes(tokens)
    images = engine.tokenizer.image.decode(codes.reshape(-1, codes.shape[-1]))
    return images.reshape(*tokens.shape[:2], *images.shape[1:])


def preview_images(
    engine: Engine, tokens: Int32[np.ndarray, "prompts samples drawn"]
) -> UInt8[np.ndarray, "prompts samples height width 3"]:
    """Pictures of the ids so far; missing ones repeat the last, and are greyed.

    Missing are those behind the last one, and those that are -1.
    """
    vocab = engine.tokenizer.vocab
    length = vocab.image_length
    missing = np.full((*tokens.shape[:-1], length - tokens.shape[-1]), -1)
    tokens = np.concatenate([tokens, missing], axis=-1)
    drawn = tokens >= 0
    last = np.maximum.accumulate(np.where(drawn, np.arange(length), 0), axis=-1)
    repeated = np.take_along_axis(tokens, last, axis=-1)
    images = decode_images(engine, np.maximum(repeated, vocab.image_range.start))
    side = round(length**0.5)
    if side * side != length:
        return images
    cell = images.shape[3] // side
    shown = drawn.reshape(*drawn.shape[:-1], side, side)
    shown = shown.repeat(cell, axis=-2).repeat(cell, axis=-1)[..., None]
    return np.where(shown, images, np.uint8(_UNDRAWN))
