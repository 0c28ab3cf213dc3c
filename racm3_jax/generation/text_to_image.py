"""Text to image, after retrieved documents (RA-CM3, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import image_grammar
from racm3_jax.generation.requests import Prompt, Task
from racm3_jax.sequences.layout import text_to_image_prompt

_NOT_SAMPLED = 127  # grey


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses empty prompts."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(
                f"the prompt is empty ({prompt!r}): describe an image, for example "
                "'the flag of Ginelia on the moon'"
            )


def make_task(
    engine: Engine, prompts: Sequence[str], name: str = "text_to_image"
) -> Task:
    """`... <eod> text <break>`, then a whole image; guidance masks the text."""
    check_prompts(prompts)
    vocab = engine.tokenizer.vocab
    mask = np.array([vocab.sentinel(0)], np.int32)

    def write(text):
        return lambda documents: text_to_image_prompt(documents, text, vocab)

    encoded = [engine.tokenizer.encode_text(prompt) for prompt in prompts]
    return Task(
        name,
        texts=prompts,
        queries=prompts,
        prompts=[Prompt(write(text), write(mask)) for text in encoded],
        grammar=image_grammar(vocab),
        max_new_tokens=vocab.image_length,
        fixed_length=True,
        writes_images=True,
    )


def preview_images(
    engine: Engine, tokens: Int32[np.ndarray, "prompts samples new"]
) -> UInt8[np.ndarray, "prompts samples height width 3"]:
    """Images of the tokens so far; missing tokens repeat the last one and are grey.

    Missing are the tokens after the last one, and those that are -1.
    """
    vocab = engine.tokenizer.vocab
    length = vocab.image_length
    missing = np.full((*tokens.shape[:-1], length - tokens.shape[-1]), -1)
    tokens = np.concatenate([tokens, missing], axis=-1)
    is_sampled = tokens >= 0
    last = np.maximum.accumulate(np.where(is_sampled, np.arange(length), 0), axis=-1)
    repeated = np.take_along_axis(tokens, last, axis=-1)
    images = engine.decode_images(np.maximum(repeated, vocab.image_range.start))
    side = round(length**0.5)
    if side * side != length:
        return images
    cell = images.shape[3] // side
    shown = is_sampled.reshape(*is_sampled.shape[:-1], side, side)
    shown = shown.repeat(cell, axis=-2).repeat(cell, axis=-1)[..., None]
    return np.where(shown, images, np.uint8(_NOT_SAMPLED))
