"""What a task gives to the runner, and the checks before anything is computed."""

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
# Writes a prompt after any documents: a function of `layout` with the rest filled in.
WritePrompt = Callable[[Sequence[TokenizedDocument]], Int32[np.ndarray, " length"]]
# Sampled tokens -> tokens of the whole image.
PlaceTokens = Callable[
    [Int32[np.ndarray, "samples new"]], Int32[np.ndarray, "samples codes"]
]


class CallOptions(NamedTuple):
    """The arguments that every task takes (see `Generator`).

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
    """Which documents are given to the rows of a call.

    Attributes:
      num_retrieved: from the memory, for each row.
      documents: hand-picked instead, shared by the rows; or None.
      own_documents: hand-picked for each row, followed by `num_retrieved` similar ones;
        or None.
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
      place: of a region of an image: the tokens so far -> the whole image, -1 where one
        is still missing; or None.
      cells: of a region: which code of the image each token is, -1 for other tokens; or
        None.
      known: with `cells`: the known codes of the image, -1 for the others.
    """

    write: WritePrompt
    write_plain: WritePrompt | None = None
    forced: Int32[np.ndarray, " new"] | None = None
    place: PlaceTokens | None = None
    cells: Int32[np.ndarray, " new"] | None = None
    known: Int32[np.ndarray, " codes"] | None = None


class Task(NamedTuple):
    """The part of a task that differs from others: the rest is `runner.run_task`.

    Attributes:
      name: of the task, in the metadata of its documents.
      texts: of each row: the `prompt` of its output, and what images are ranked by.
      queries: of each row: the text or the image that documents are retrieved for.
      prompts: of each row.
      grammar: which tokens may be sampled.
      max_new_tokens: the most tokens of a row.
      fixed_length: the grammar always emits `max_new_tokens`.
      exact: a row needs room for as many tokens as its `forced`, or `max_new_tokens`.
      writes_images: the samples contain images, whose codes are guessed according to the
        setting `draft`.
      read: (row, tokens of a sample) -> its segments; None where each sample is an image
        after the row's text.
      facts: added to the metadata of each sample.
      choose: which of the retrieved documents are shown; None shows all.
      settings: of this task only, recorded with its outputs.
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
    prompts: Sequence[Prompt], tokens: Int32[np.ndarray, "prompts samples new"]
) -> Int32[np.ndarray, "prompts samples placed"]:
    """The tokens of each prompt in their places in its image, if it has `place`."""
    placed = [
        samples if prompt.place is None else prompt.place(samples)
        for prompt, samples in zip(prompts, tokens, strict=True)
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
    """One seed per row: `seed`, `seed + 1`, ... or the given ones."""
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
      ValueError: it is not; says how to read files.
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
    """One prompt per image, without spaces around it; empty ones without prompts."""
    if prompts is None:
        return [""] * num_rows
    if len(prompts) != num_rows:
        raise ValueError(f"{num_rows} images need as many prompts; got {len(prompts)}")
    return [prompt.strip() for prompt in prompts]
