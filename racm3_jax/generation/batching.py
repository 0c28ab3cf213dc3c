"""Prompts of any number and length -> samples, in chunks of equal shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int32, Int64

from racm3_jax import sharding
from racm3_jax.generation.drafts import Drafts
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.requests import Prompt, Task, pad_rows, place_progress
from racm3_jax.generation.sample import OnProgress, Samples, Unconditional, sample
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.sequences.layout import retrieved_prefix
from racm3_jax.types import Retrieved, TokenizedDocument


def sample_prompts(
    engine: Engine,
    task: Task,
    retrieved: Sequence[Retrieved],
    seeds: Sequence[int],
    config: SamplingConfig,
    num_samples: int,
    on_progress: OnProgress | None = None,
) -> Samples:
    """Samples all prompts in equal chunks, so that one compiled program serves them.

    Args:
      engine: whose model samples.
      task: with at least one prompt; it sets the number of tokens and the grammar.
      retrieved: the documents before each prompt.
      seeds: of each prompt's samples.
      config: how to sample; the lengths are the task's.
      num_samples: of each prompt.
      on_progress: see `sample`; each chunk counts separately. Regions of images are
        reported as whole images (see `Prompt.place`).
    """
    config = dataclasses.replace(
        config, max_new_tokens=task.max_new_tokens, fixed_length=task.fixed_length
    )
    vocab, prompts = engine.tokenizer.vocab, task.prompts
    new = [task.max_new_tokens if p.forced is None else len(p.forced) for p in prompts]
    needed = new if task.exact or task.fixed_length else [1] * len(prompts)
    shown = [found.documents for found in retrieved]
    tokens, lengths = pad_rows(
        [_write(engine, *row) for row in zip(prompts, shown, needed, strict=True)]
    )
    prefixes = np.array([len(retrieved_prefix(x, vocab)) for x in shown], np.int32)
    # A prompt may consist of its documents only; its last token is not of the prefix.
    prefixes = np.minimum(prefixes, lengths - 1)
    second, streams = None, 1
    if config.needs_unconditional:
        second, streams = _unconditional(prompts, shown, prefixes, config), 2
    forced = _fill_rows([p.forced for p in prompts], max(new))
    copies = 1 if engine.mesh is None else sharding.count_row_shards(engine.mesh)
    chunk = copies * max(1, engine.max_rows // (num_samples * streams))
    drafts = None
    if task.writes_images:
        num_rows = min(chunk, len(prompts)) * num_samples * streams
        drafts = _choose_drafts(engine, prompts, config, num_rows, max(new))
    parts = [
        sample(
            engine.model,
            engine.params,
            tokens[rows],
            lengths[rows],
            task.grammar,
            config,
            jax.random.key(0),
            num_samples=num_samples,
            row_seeds=np.asarray(seeds, np.uint32)[rows],
            prefix_lengths=prefixes[rows],
            unconditional=second and Unconditional(*(x[rows] for x in second)),
            forced=None if forced is None else forced[rows],
            row_lengths=np.asarray(new)[rows] if task.exact else None,
            token_range=vocab.image_range if task.read is None else None,
            drafts=drafts and drafts.take(rows),
            on_progress=place_progress(on_progress, [prompts[i] for i in rows]),
        )
        for rows in _split_rows(len(prompts), chunk)
    ]
    arrays = zip(*(part[:-1] for part in parts), strict=True)
    samples = parts[0]._make(
        [*(np.concatenate(x)[: len(prompts)] for x in arrays), parts[0].drafter]
    )
    engine.draft_choice.note(samples)
    return samples


def _split_rows(num_rows: int, chunk: int) -> list[Int64[np.ndarray, " chunk"]]:
    """Chunks of rows; the last one is filled up with the last row."""
    whole = -(-num_rows // chunk) * chunk if num_rows > chunk else num_rows
    order = np.minimum(np.arange(whole), num_rows - 1)
    return [order[i : i + chunk] for i in range(0, whole, chunk)]


def _fill_rows(
    rows: Sequence[Int32[np.ndarray, " _"] | None], width: int
) -> Int32[np.ndarray, "rows width"] | None:
    """Rows of different lengths, -1 after their ends; None where no row has any."""
    if all(row is None for row in rows):
        return None
    filled = np.full((len(rows), width), -1, np.int32)
    for to, row in zip(filled, rows, strict=True):
        if row is not None:
            to[: len(row)] = row
    return filled


def _choose_drafts(
    engine: Engine,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    num_rows: int,
    longest: int,
) -> Drafts | None:
    memory = None if engine.retriever is None else engine.retriever.memory
    drafter, table = engine.draft_choice.choose(
        config.draft, memory, engine.tokenizer.vocab, num_rows
    )
    if drafter is None:
        return None
    cells = _fill_rows([p.cells for p in prompts], longest)
    known = [p.known for p in prompts if p.known is not None]
    return Drafts(drafter, table, cells, np.stack(known) if known else None)


def _write(
    engine: Engine,
    prompt: Prompt,
    documents: Sequence[TokenizedDocument],
    needed: int,
) -> Int32[np.ndarray, " length"]:
    """The whole prompt, or an error that says why it does not fit."""
    written = prompt.write(documents)
    max_length = engine.model.config.max_length
    room = max_length - needed
    if len(written) > room and len(prompt.write(())) <= room:
        fitting = len(documents)
        while len(prompt.write(documents[:fitting])) > room:
            fitting -= 1
        raise ValueError(
            f"{len(documents)} documents do not fit: with the prompt they are "
            f"{len(written)} tokens, which with at least {needed} new ones is more than "
            f"the model's max_length {max_length}; the first {fitting} would fit"
        )
    return written


def _unconditional(
    prompts: Sequence[Prompt],
    shown: Sequence[Sequence[TokenizedDocument]],
    prefixes: Int32[np.ndarray, " n"],
    config: SamplingConfig,
) -> Unconditional:
    rows = []
    for prompt, documents in zip(prompts, shown, strict=True):
        write = prompt.write_plain
        if config.guide_documents:
            rows.append((write or prompt.write)(()))
        elif write is not None:
            rows.append(write(documents))
        else:
            raise ValueError(
                "guidance compares with the same prompt without its text, and this one "
                "has none: give a prompt, or guide_documents=True to compare without "
                "the documents, or use guidance=1 and contrastive_k=0"
            )
    # Without documents only the first <eod> is shared.
    shared = np.ones_like(prefixes) if config.guide_documents else prefixes
    return Unconditional(*pad_rows(rows), shared)
