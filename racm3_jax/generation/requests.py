"""What a task asks of the runner, and what is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from racm3_jax.generation.grammar import Grammar
from racm3_jax.generation.sample import OnProgress, Progress, Samples
from racm3_jax.generation.settings import RankBy, SamplingSettings
from racm3_jax.types import Document, Retrieved, Segment, TokenizedDocument

Image = UInt8[np.ndarray, "height width 3"]
Documents = Sequence[Document | TokenizedDocument]
# Writes a prompt after any documents: `layout` with the rest filled in.
WritePrompt = Callable[[Sequence[TokenizedDocument]], Int32[np.ndarray, " length"]]
# Tokens as they are sampled -> those of the whole image.
PlaceDrawn = Callable[
    [Int32[np.ndarray, "samples drawn"]], Int32[np.ndarray, "samples codes"]
]


class Asked(NamedTuple):
    """What is asked of every task (see `Generator`).

    Attributes:
      num_samples: of each row.
      seed: of the first row, or one of each.
      settings: how tokens are sampled.
      rank_by: how samples that are images are ranked.
      on_progress: see `sample`.
    """

    num_samples: int
    seed: int | Sequence[int]
    settings: SamplingSettings
    rank_by: RankBy = "likelihood"
    on_progress: OnProgress | None = None


class Given(NamedTuple):
    """Which documents the rows of a call are given.

    Attributes:
      num_retrieved: from the memory, for each row.
      documents: hand-picked instead, shared by the rows; or None.
      own_documents: hand-picked of each row, before `num_retrieved` like them; or None.
      noun: what errors call one of those.
      count_name: what errors call `num_retrieved`.
    """

    num_retrieved: int
    documents: Documents | None = None
    own_documents: Sequence[Documents] | None = None
    noun: str = "document"
    count_name: str = "num_retrieved"


class Prompt(NamedTuple):
    """One prompt to continue.

    Attributes:
      write: writes it after documents.
      write_plain: writes the unconditional prompt of guidance; None where there is no
        text to leave out: guidance can then only leave out the documents.
      forced: a token where there is no choice, -1 where one is sampled; or None.
      place: where the tokens belong to a region of an image: those so far -> the whole
        image, -1 where one is still to come; or None.
      cells: where the tokens belong to a region: which code of the image each one is, -1
        for tokens that are none; or None.
      known: with `cells`: the image's codes that are known, -1 for others.
    """

    write: WritePrompt
    write_plain: WritePrompt | None = None
    forced: Int32[np.ndarray, " new"] | None = None
    place: PlaceDrawn | None = None
    cells: Int32[np.ndarray, " new"] | None = None
    known: Int32[np.ndarray, " codes"] | None = None


class Task(NamedTuple):
    """What a task does that others do not: the rest is `runner.run_task`.

    Attributes:
      name: of the task, in the metadata of its documents.
      texts: of each row: the `prompt` of its output, and what images are ranked by.
      queries: of each row: the text or the image that documents are retrieved for.
      prompts: of each row.
      grammar: what may be sampled.
      max_new_tokens: the most tokens of a row.
      fixed_length: the grammar always emits `max_new_tokens`.
      exact: a row needs room for as many tokens as its `forced`, or `max_new_tokens`.
      writes_images: codes of images may come, which are then guessed as the setting
        `draft` says.
      read: (row, tokens of a sample) -> its segments; None where each sample is an image
        after the row's text.
      facts: added to the metadata of each sample.
      choose: which of the retrieved documents are shown; None shows all.
      settings: of this task alone, for the record of its outputs.
    """

    name: str
    texts: Sequence[str]
    queries: Sequence[str | Image]
    prompts: Sequence[Prompt]
    grammar: Grammar
    max_new_tokens: int
    fixed_length: bool = False
    exact: bool = False
    writes_images: bool = False
    read: Callable[[int, Int32[np.ndarray, " new"]], tuple[Segment, ...]] | None = None
    facts: Mapping[str, Any] = {}
    choose: Callable[[list[Retrieved]], list[Retrieved]] | None = None
    settings: Mapping[str, Any] = {}


def place_tokens(
    prompts: Sequence[Prompt], tokens: Int32[np.ndarray, "prompts samples drawn"]
) -> Int32[np.ndarray, "prompts samples placed"]:
    """The tokens of each prompt where they belong in its image, if it says where."""
    placed = [
        drawn if prompt.place is None else prompt.place(drawn)
        for prompt, drawn in zip(prompts, tokens, strict=True)
    ]
    return np.stack(placed)


def place_progress(
    on_progress: OnProgress | None, prompts: Sequence[Prompt]
) -> OnProgress | None:
    """Reports regions as whole images (see `Prompt.place`)."""
    if on_progress is None:
        return None

    def report(progress: Progress) -> None:
        on_progress(progress._replace(tokens=place_tokens(prompts, progress.tokens)))

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
    """Mean log-likelihood of the tokens of each sample, in nats."""
    lengths = np.maximum(samples.lengths, 1).astype(np.float32)
    return samples.log_probs.sum(-1) / lengths


def pad_rows(
    rows: Sequence[Int32[np.ndarray, " _"]],
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
