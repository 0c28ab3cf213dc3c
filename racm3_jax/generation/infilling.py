"""Regions of images and spans of texts drawn anew.

    masked    <eod> documents <eod> text <break> i1 <mask:0> i4 <eod> <mask:0> ... <eoss>
    in_place  <eod> documents <eod> text <break> i1 ...

"masked" is the CM3 infill prompt, which shows what stands behind the region as well;
"in_place" goes on with the image where the region begins, in the order in which images
are drawn. Both keep every code outside the region. Editing is the same with one chosen
document in front (RA-CM3, section 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.captioning import decode_text
from racm3_jax.generation.drawing import decode_images
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.grammar import image_grammar, text_grammar
from racm3_jax.generation.regions import (
    Region,
    Span,
    fill_spans,
    find_cells,
    find_spans,
    place_spans,
    plan_spans,
)
from racm3_jax.generation.requests import Image, Request, mean_log_probs
from racm3_jax.generation.rerank import check_rank_by, find_nearest, score_pictures
from racm3_jax.generation.sample import OnProgress
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.sequences.layout import beginning_prompt, infill_prompt
from racm3_jax.types import GenerationOutput, Retrieved, Segment

TEXT_MARKER = "<mask>"
RegionPrompt = Literal["masked", "in_place"]
REGION_PROMPTS: tuple[RegionPrompt, ...] = get_args(RegionPrompt)


class Hole(NamedTuple):
    """An image with a region that is to be drawn.

    Attributes:
      tokens: ids of the whole image; those in the hole are not read by the model.
      cells: True in the region.
      spans: ranges that cover it.
    """

    tokens: Int32[np.ndarray, " codes"]
    cells: np.ndarray
    spans: list[Span]


def cut_holes(
    engine: Engine,
    images: Sequence[Image],
    regions: Sequence[Region],
    max_spans: int,
    region_prompt: RegionPrompt,
) -> list[Hole]:
    """Tokenizes the images and finds the codes that the regions touch.

    Raises:
      ValueError: another number of regions, one that no code lies in, or a prompt that
        does not exist or takes no spans.
    """
    if region_prompt not in REGION_PROMPTS:
        raise ValueError(
            f"region_prompt is {region_prompt!r}; allowed: "
            + ", ".join(map(repr, REGION_PROMPTS))
        )
    if region_prompt == "in_place" and max_spans != 1:
        raise ValueError(
            f"max_spans is {max_spans}, but region_prompt='in_place' draws one span: use "
            "1, or region_prompt='masked'"
        )
    if len(images) != len(regions):
        raise ValueError(
            f"{len(images)} images need as many regions; got {len(regions)}"
        )
    image, vocab = engine.tokenizer.image, engine.tokenizer.vocab
    pixels = np.stack([resize_image(x, image.image_size) for x in images])
    tokens = vocab.image_tokens(image.encode(pixels))
    holes = []
    for ids, region, picture in zip(tokens, regions, images, strict=True):
        cells = find_cells(
            region, picture.shape[:2], image.image_size, vocab.image_length
        )
        holes.append(
            Hole(ids, cells, find_spans(cells, min(max_spans, vocab.num_sentinels)))
        )
    return holes


def hide_region(engine: Engine, image: Image, hole: Hole) -> Image:
    """The image as a query: the mean colour of the rest stands in the region."""
    size = engine.tokenizer.image.image_size
    pixels = resize_image(image, size)
    side = round(len(hole.cells) ** 0.5)
    cell = size // side
    hidden = hole.cells.reshape(side, side).repeat(cell, 0).repeat(cell, 1)
    if hidden.all():
        return np.full_like(pixels, 127)
    mean = pixels[~hidden].mean(0).astype(np.uint8)
    return np.where(hidden[..., None], mean, pixels)


def make_region_request(
    engine: Engine,
    hole: Hole,
    prompt: str,
    retrieved: Retrieved,
    seed: int,
    region_prompt: RegionPrompt,
    guide_documents: bool,
) -> Request:
    """The image with its hole, after its text if there is one.

    Guidance leaves out the text; without one, it can only leave out the documents.
    """
    vocab = engine.tokenizer.vocab

    def write_behind(text):
        before = np.append(text, vocab.break_) if len(text) else text
        tokens = np.concatenate([before, hole.tokens]).astype(np.int32)
        spans = [(len(before) + a, len(before) + b) for a, b in hole.spans]
        if region_prompt == "in_place":
            known = tokens[: spans[0][0]]
            return lambda documents: beginning_prompt(documents, known, vocab)
        return lambda documents: infill_prompt(documents, tokens, spans, vocab)

    plan = plan_spans(hole.tokens, hole.cells, hole.spans, vocab)
    known = np.where(hole.cells, -1, vocab.image_codes(hole.tokens)).astype(np.int32)
    written = {"cells": place_spans(hole.spans), "known": known}

    def place(drawn):
        """The image so far; what is not drawn yet is as planned."""
        planned = np.tile(plan, (len(drawn), 1))
        planned[:, : drawn.shape[1]] = drawn[:, : len(plan)]
        return fill_spans(hole.tokens, hole.spans, planned)

    if not prompt:
        write = write_behind(np.zeros(0, np.int32))
        plain = write if guide_documents else None
        return Request(retrieved, write, plain, seed, plan, place, **written)

    # The mask of the text comes after those of the region, which keep their names.
    name = 0 if region_prompt == "in_place" else len(hole.spans)

    def write_plain(documents):
        mask = np.array([vocab.sentinel(name)], np.int32)
        return write_behind(mask)(documents)

    text = engine.tokenizer.encode_text(prompt)
    write = write_behind(text)
    return Request(retrieved, write, write_plain, seed, plan, place, **written)


def infill_regions(
    engine: Engine,
    holes: Sequence[Hole],
    prompts: Sequence[str],
    retrieved: Sequence[Retrieved],
    seeds: Sequence[int],
    config: SamplingConfig,
    num_samples: int,
    rank_by: str,
    task: str,
    region_prompt: RegionPrompt,
    on_progress: OnProgress | None = None,
) -> list[GenerationOutput]:
    """Draws the holes; every code outside them stays as it was."""
    check_rank_by(rank_by, engine, retrieved)
    vocab = engine.tokenizer.vocab
    requests = [
        make_region_request(engine, *parts, region_prompt, config.guide_documents)
        for parts in zip(holes, prompts, retrieved, seeds, strict=True)
    ]
    longest = max(len(r.forced) for r in requests if r.forced is not None)
    samples = engine.sample_requests(
        requests,
        image_grammar(vocab, longest),
        dataclasses.replace(config, max_new_tokens=longest),
        num_samples,
        exact=True,
        ids=vocab.image_range,
        writes_images=True,
        on_progress=on_progress,
    )
    filled = np.stack(
        [
            fill_spans(hole.tokens, hole.spans, drawn)
            for hole, drawn in zip(holes, samples.tokens, strict=True)
        ]
    )
    images = decode_images(engine, filled)
    scores = score_pictures(
        engine, rank_by, prompts, retrieved, images, mean_log_probs(samples)
    )
    outputs = []
    for i, request in enumerate(requests):
        text = (Segment(text=prompts[i]),) if prompts[i] else ()
        hole = holes[i]
        kept = (filled[i] == hole.tokens)[:, ~hole.cells]
        facts = [
            fact
            | {
                "codes_drawn": int(hole.cells.sum()),
                "codes_outside": kept.shape[1],
                "codes_outside_kept": int(same.sum()),
            }
            for fact, same in zip(
                find_nearest(filled[i], request.retrieved, vocab), kept, strict=True
            )
        ]
        outputs.append(
            engine.output(
                task,
                [(*text, Segment(image=x)) for x in images[i]],
                scores[i],
                request,
                prompts[i],
                facts,
                samples.count_drafts(i),
            )
        )
    return outputs


def split_text(text: str) -> tuple[str, str]:
    """What stands before and after the marker.

    Raises:
      ValueError: the marker does not stand there exactly once.
    """
    if text.count(TEXT_MARKER) != 1:
        raise ValueError(
            f"a text to fill in holds {TEXT_MARKER} exactly once, as in 'the flag of "
            f"{TEXT_MARKER} on the moon'; got {text!r}"
        )
    before, after = text.split(TEXT_MARKER)
    return before, after


def infill_text(
    engine: Engine,
    text: str,
    image: Image | None,
    retrieved: Retrieved,
    seed: int,
    config: SamplingConfig,
    num_samples: int,
    max_span_length: int,
) -> GenerationOutput:
    """Writes what stands at the marker, beside an image if there is one."""
    vocab = engine.tokenizer.vocab
    before, after = (
        engine.tokenizer.encode_text(part) if part else np.zeros(0, np.int32)
        for part in split_text(text)
    )
    pieces = [before, after]
    if image is not None:
        pieces += [[vocab.break_], engine.tokenizer.encode_image(image)]
    tokens = np.concatenate(pieces).astype(np.int32)
    hole = [(len(before), len(before))]
    request = Request(
        retrieved,
        lambda documents: infill_prompt(documents, tokens, hole, vocab),
        None,
        seed,
    )
    config = dataclasses.replace(config, max_new_tokens=max_span_length + 1)
    grammar = text_grammar(vocab, max_span_length)
    samples = engine.sample_requests([request], grammar, config, num_samples)
    picture = () if image is None else (Segment(image=image),)
    return engine.output(
        "infill_text",
        [
            (Segment(text=decode_text(engine, before, drawn, after)), *picture)
            for drawn in samples.tokens[0]
        ],
        mean_log_probs(samples)[0],
        request,
        text,
    )
