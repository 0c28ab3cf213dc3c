"""One prompt to continue, and what is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from racm3_jax.generation.sample import OnProgress, Progress, Samples
from racm3_jax.types import Document, Retrieved, TokenizedDocument

Image = UInt8[np.ndarray, "height width 3"]
Documents = Sequence[Document | TokenizedDocument]
# Writes a prompt behind any documents: `layout` with the rest filled in.
WritePrompt = Callable[[Sequence[TokenizedDocument]], Int32[np.ndarray, " length"]]
# Ids as they are drawn -> those of the whole image.
PlaceDrawn = Callable[
    [Int32[np.ndarray, "samples drawn"]], Int32[np.ndarray, "samples codes"]
]


class Request(NamedTuple):
    """One prompt to continue.

    Attributes:
      retrieved: the documents in front of it.
      write: writes it behind documents.
      write_plain: writes the unconditional prompt of guidance, or None.
      seed: of its samples.
      forced: an id where there is no choice, -1 where one is drawn; or None.
      place: for previews, where the ids so far belong to parts of an image: all its ids,
        -1 where one is still to come; or None.
      cells: where the ids belong to parts of an image: which code of it each one is, -1
        for ids that are none; or None.
      known: with `cells`: the image's codes that are known, -1 for others.
    """

    retrieved: Retrieved
    write: WritePrompt
    write_plain: WritePrompt | None
    seed: int
    forced: Int32[np.ndarray, " new"] | None = None
    place: PlaceDrawn | None = None
    cells: Int32[np.ndarray, " new"] | None = None
    known: Int32[np.ndarray, " codes"] | None = None


def place_progress(
    on_progress: OnProgress | None, requests: Sequence[Request]
) -> OnProgress | None:
    """Reports the ids of each request where they belong in its image, if it says where."""
    if on_progress is None:
        return None

    def report(progress: Progress) -> None:
        tokens = [
            drawn if request.place is None else request.place(drawn)
            for request, drawn in zip(requests, progress.tokens, strict=True)
        ]
        on_progress(progress._replace(tokens=np.stack(tokens)))

    return report


def row_seeds(seed: int | Sequence[int], num_rows: int) -> list[int]:
    """One seed a row: `seed`, `seed + 1`, ... or the given ones."""
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(num_rows)]
    else:
        seeds = [int(value) for value in seed]
    if len(seeds) != num_rows:
        raise ValueError(f"{num_rows} prompts need as many seeds; got {len(seeds)}")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"a seed is a whole number from 0 to 2^32-1; got {value}")
    return seeds


def check_image(image: Image) -> Image:
    """The image itself, if it is RGB pixels.

    Raises:
      ValueError: says what was given and how files are read.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            "an image is uint8[height, width, 3]; got "
            f"{image.dtype}{list(image.shape)}: read files with "
            "racm3_jax.documents.images.read_image"
        )
    return image


def mean_log_probs(samples: Samples) -> Float32[np.ndarray, "batch samples"]:
    """Mean log-likelihood of the ids of each sample, in nats."""
    lengths = np.maximum(samples.lengths, 1).astype(np.float32)
    return samples.log_probs.sum(-1) / lengths


def pad_rows(
    rows: Sequence[Int32[np.ndarray, " length"]],
) -> tuple[Int32[np.ndarray, "n longest"], Int32[np.ndarray, " n"]]:
    """Rows of different lengths -> one array, zeros on the right; and the lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def prompt_each(prompts: Sequence[str] | None, num_rows: int) -> list[str]:
    """One prompt an image, without spaces around it; empty ones where there are none."""
    if prompts is None:
        return [""] * num_rows
    if len(prompts) != num_rows:
        raise ValueError(f"{num_rows} images need as many prompts; got {len(prompts)}")
    return [prompt.strip() for prompt in prompts]
