"""Infilling of image regions and text spans.

    masked    <eod> documents <eod> text <break> i1 <mask:0> i4 <eod> <mask:0> ... <eoss>
    in_place  <eod> documents <eod> text <break> i1 ...

"masked" is the CM3 infill prompt, which also shows the image after the region;
"in_place" continues the image where the region begins, in raster order. Both keep every
code outside the region. Editing is infilling after a chosen document (RA-CM3, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.captioning import decode_text
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
from racm3_jax.generation.requests import (
    Image,
    Prompt,
    Task,
    check_image,
    prompt_each,
)
from racm3_jax.generation.settings import REGION_PROMPTS, RegionPrompt
from racm3_jax.sequences.layout import beginning_prompt, infill_prompt
from racm3_jax.types import Segment

TEXT_MARKER = "<mask>"


class Hole(NamedTuple):
    """An image with a region to fill in.

    Attributes:
      tokens: of the whole image; the model does not read those in the hole.
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
      ValueError: another number of regions, a region without codes, or an unknown
        region_prompt or one that does not take `max_spans`.
    """
    if region_prompt not in REGION_PROMPTS:
        raise ValueError(
            f"region_prompt is {region_prompt!r}; allowed: "
            + ", ".join(map(repr, REGION_PROMPTS))
        )
    if region_prompt == "in_place" and max_spans != 1:
        raise ValueError(
            f"max_spans is {max_spans}, but region_prompt='in_place' fills one span: use "
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
    for row, region, shown in zip(tokens, regions, images, strict=True):
        cells = find_cells(
            region, shown.shape[:2], image.image_size, vocab.image_length
        )
        holes.append(
            Hole(row, cells, find_spans(cells, min(max_spans, vocab.num_sentinels)))
        )
    return holes


def hide_region(engine: Engine, image: Image, hole: Hole) -> Image:
    """The image as a query, its region filled with the mean colour of the rest."""
    size = engine.tokenizer.image.image_size
    pixels = resize_image(image, size)
    side = round(len(hole.cells) ** 0.5)
    cell = size // side
    hidden = hole.cells.reshape(side, side).repeat(cell, 0).repeat(cell, 1)
    if hidden.all():
        return np.full_like(pixels, 127)
    mean = pixels[~hidden].mean(0).astype(np.uint8)
    return np.where(hidden[..., None], mean, pixels)


def write_region(
    engine: Engine, hole: Hole, prompt: str, region_prompt: RegionPrompt
) -> Prompt:
    """The prompt of an image with a hole; guidance masks the text, if there is one."""
    vocab = engine.tokenizer.vocab

    def write_after(text):
        before = np.append(text, vocab.break_) if len(text) else text
        tokens = np.concatenate([before, hole.tokens]).astype(np.int32)
        spans = [(len(before) + a, len(before) + b) for a, b in hole.spans]
        if region_prompt == "in_place":
            known = tokens[: spans[0][0]]
            return lambda documents: beginning_prompt(documents, known, vocab)
        return lambda documents: infill_prompt(documents, tokens, spans, vocab)

    plan = plan_spans(hole.tokens, hole.cells, hole.spans, vocab)
    known = np.where(hole.cells, -1, vocab.image_codes(hole.tokens)).astype(np.int32)

    def place(sampled):
        """The image so far; the rest is as planned."""
        planned = np.tile(plan, (len(sampled), 1))
        planned[:, : sampled.shape[1]] = sampled[:, : len(plan)]
        return fill_spans(hole.tokens, hole.spans, planned)

    def write_plain(documents):
        # The mask of the text comes after those of the region, whose sentinels stay.
        number = 0 if region_prompt == "in_place" else len(hole.spans)
        return write_after(np.array([vocab.sentinel(number)], np.int32))(documents)

    text = engine.tokenizer.encode_text(prompt) if prompt else np.zeros(0, np.int32)
    return Prompt(
        write_after(text),
        write_plain if prompt else None,
        plan,
        place,
        place_spans(hole.spans),
        known,
    )


def make_task(
    engine: Engine,
    images: Sequence[Image],
    regions: Sequence[Region],
    prompts: Sequence[str] | None,
    max_spans: int,
    region_prompt: RegionPrompt | None,
    name: str = "infill",
) -> Task:
    """Fills in the regions; every code outside them is kept.

    The query is the prompt, or the image without the region. A `region_prompt` of None
    is the one that was measured best with the weights, if any, else "masked".
    """
    if region_prompt is not None:
        asked = region_prompt
    elif max_spans == 1:
        asked = engine.defaults.get("image", {}).get("region_prompt", "masked")
    else:
        asked = "masked"
    texts = prompt_each(prompts, len(images))
    images = [check_image(image) for image in images]
    holes = cut_holes(engine, images, regions, max_spans, asked)
    queries = [
        text or hide_region(engine, image, hole)
        for text, image, hole in zip(texts, images, holes, strict=True)
    ]
    written = [
        write_region(engine, hole, text, asked)
        for hole, text in zip(holes, texts, strict=True)
    ]
    longest = max(len(place_spans(hole.spans)) for hole in holes)
    return Task(
        name,
        texts,
        queries,
        written,
        image_grammar(engine.tokenizer.vocab, longest),
        longest,
        exact=True,
        writes_images=True,
        settings={"region_prompt": asked, "max_spans": max_spans},
    )


def split_text(text: str) -> tuple[str, str]:
    """The text before and after the marker.

    Raises:
      ValueError: the text does not contain the marker exactly once.
    """
    if text.count(TEXT_MARKER) != 1:
        raise ValueError(
            f"a text to fill in contains {TEXT_MARKER} exactly once, as in 'the flag of "
            f"{TEXT_MARKER} on the moon'; got {text!r}"
        )
    before, after = text.split(TEXT_MARKER)
    return before, after


def make_text_task(
    engine: Engine, text: str, image: Image | None, max_span_length: int
) -> Task:
    """Fills in the text at the marker, given an image if there is one.

    The query is the image, or the text without the marker.
    """
    vocab = engine.tokenizer.vocab
    around = split_text(text)
    before, after = (
        engine.tokenizer.encode_text(part) if part else np.zeros(0, np.int32)
        for part in around
    )
    pieces, image_segments = [before, after], ()
    if image is not None:
        image = check_image(image)
        pieces += [[vocab.break_], engine.tokenizer.encode_image(image)]
        image_segments = (Segment(image=image),)
    tokens = np.concatenate(pieces).astype(np.int32)
    hole = [(len(before), len(before))]
    words = " ".join(part.strip() for part in around).strip()

    def write(documents):
        return infill_prompt(documents, tokens, hole, vocab)

    def read(_, sampled):
        text_segment = Segment(text=decode_text(engine, before, sampled, after))
        return text_segment, *image_segments

    return Task(
        "infill_text",
        texts=[text],
        queries=[words if image is None else image],
        prompts=[Prompt(write)],
        grammar=text_grammar(vocab, max_span_length),
        max_new_tokens=max_span_length + 1,
        read=read,
    )
