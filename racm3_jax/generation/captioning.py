"""Image to text, by the paper's masked prompt or with the caption last.

masked   <eod> documents <eod> Photo of <mask:0> <break> image <eod> <mask:0> ...
last     <eod> documents <eod> image <break> Photo of ...
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import text_grammar
from racm3_jax.generation.requests import (
    Given,
    Image,
    Prompt,
    Task,
    WritePrompt,
    check_image,
)
from racm3_jax.generation.rerank import rank_documents
from racm3_jax.generation.settings import SamplingSettings
from racm3_jax.sequences.layout import (
    beginning_prompt,
    caption_prompt,
    put_images_first,
)
from racm3_jax.types import Segment
from racm3_jax.vocab import Vocab

CaptionPrompt = Literal["masked", "last"]
CAPTION_PROMPTS: tuple[CaptionPrompt, ...] = ("masked", "last")


def fill_in_defaults(
    engine: Engine,
    given: Given,
    num_samples: int,
    num_candidates: int | None,
    settings: SamplingSettings,
) -> tuple[int, SamplingSettings]:
    """What a call leaves open is as the model's weights were measured best.

    Weights say so of captions with retrieved documents only. Several samples are not
    made greedily, which would be one sample, and a call of CD-K is not guided as well.

    Args:
      engine: whose `defaults` are read.
      given: the documents of the call.
      num_samples: likewise.
      num_candidates: likewise; None leaves it open.
      settings: likewise; those that are missing are open.

    Returns:
      Candidates, at most as many as the memory holds, and settings.
    """
    own: Mapping[str, Any] = engine.defaults.get("caption", {})
    if (
        engine.retriever is None
        or given.documents is not None
        or not given.num_retrieved
    ):
        own = {}
    candidates = num_candidates or 0
    if num_candidates is None and engine.retriever is not None:
        held = engine.retriever.memory.num_allowed
        candidates = min(own.get("num_candidates", 0), held)
        if candidates <= given.num_retrieved:
            candidates = 0
    names = [] if num_samples > 1 else ["temperature"]
    if not settings.get("contrastive_k"):
        names += ["guidance", "guide_documents"]
    filled = {name: own[name] for name in names if name in own}
    return candidates, cast(SamplingSettings, filled | settings)


def write_after(
    vocab: Vocab,
    image: Int32[np.ndarray, " image_length"],
    start: Int32[np.ndarray, " start"],
    prompt: CaptionPrompt,
    image_first: bool,
) -> WritePrompt:
    """Asks for the caption of an image, which begins with `start`, after documents."""
    break_ = np.array([vocab.break_], np.int32)
    known = np.concatenate([image, break_, start]).astype(np.int32)

    def write(documents):
        if image_first:
            documents = [put_images_first(document) for document in documents]
        if prompt == "masked":
            return caption_prompt(documents, image, vocab, start)
        return beginning_prompt(documents, known, vocab)

    return write


def make_task(
    engine: Engine,
    images: Sequence[Image],
    max_caption_length: int,
    prefix: str,
    prompt: CaptionPrompt,
    num_candidates: int,
    num_kept: int,
    image_first: bool,
) -> Task:
    """A caption begins with `prefix` and continues with what is sampled.

    Of `num_candidates` documents, unless 0, `num_kept` are kept (see
    `rerank.rank_documents`). `image_first` shows them with their images in front, as the
    caption itself is asked for, to models that were trained so
    (`pipeline.image_first_probability`).
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

    def read(row, sampled):
        text = decode_text(engine, start, sampled)
        return Segment(text=text), Segment(image=images[row])

    choose = None
    if num_candidates:
        choose = functools.partial(rank_documents, engine, tokens, num=num_kept)
    return Task(
        "caption",
        texts=[prefix] * len(images),
        queries=images,
        prompts=[
            Prompt(write_after(vocab, image, start, prompt, image_first))
            for image in tokens
        ],
        grammar=grammar,
        max_new_tokens=max_caption_length + 1,
        read=read,
        choose=choose,
        settings={
            "num_candidates": num_candidates,
            "image_first": image_first,
            "caption_prompt": prompt,
            "prefix": prefix,
        },
    )


def decode_text(
    engine: Engine,
    before: Int32[np.ndarray, " before"],
    sampled: Int32[np.ndarray, " new"],
    after: Int32[np.ndarray, " after"] | Sequence[int] = (),
) -> str:
    """Sampled text between what was around it, without control tokens."""
    kept = sampled[engine.tokenizer.vocab.is_text(sampled)]
    ids = np.concatenate([before, kept, np.asarray(after, np.int32)])
    return engine.tokenizer.text.decode(ids.astype(np.int32))
