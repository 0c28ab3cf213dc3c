"""The path of every task from its arguments to its outputs.

    checks -> prompts (the task's) -> documents -> samples -> segments -> ranked outputs

The number of samples, the seeds, the documents, the ranking and the progress are the same
for all tasks, and are handled only here; a `Task` says what differs. A single item is a
batch of one, so it gives the same samples as in a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from racm3_jax.generation.batching import sample_prompts
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.requests import (
    CallOptions,
    Given,
    Prompt,
    Task,
    mean_log_probs,
    place_tokens,
    row_seeds,
)
from racm3_jax.generation.rerank import (
    check_rank_by,
    find_nearest,
    score_pictures,
)
from racm3_jax.generation.sample import Samples
from racm3_jax.generation.settings import RankBy, SamplingSettings, make_config
from racm3_jax.types import Document, GenerationOutput, Retrieved, Segment
from racm3_jax.vocab import Vocab


def run_task(
    engine: Engine,
    num_rows: int,
    make_task: Callable[[], Task],
    given: Given,
    options: CallOptions,
) -> list[GenerationOutput]:
    """The outputs of every row of a call; none where there are no rows.

    Args:
      engine: whose model samples, after documents of its memory.
      num_rows: prompts or images.
      make_task: checks the task's own arguments and writes its prompts; called after the
        other checks, as it may tokenize images.
      given: the documents.
      options: the other arguments of the call.

    Raises:
      ValueError: on invalid arguments.
    """
    if not num_rows:
        return []
    make_config(options.settings)  # checks them
    seeds = row_seeds(options.seed, num_rows)
    num_samples, (num_retrieved, documents, own, noun, name) = (
        options.num_samples,
        given,
    )
    engine.check_counts(num_samples, num_retrieved, documents, name)
    if own is None:
        task = make_task()
        retrieved = engine.retrieve_for(task.queries, num_retrieved, documents)
    else:
        retrieved = engine.pick_each(own, num_rows, noun, num_retrieved)
        task = make_task()
    if task.choose is not None:
        retrieved = task.choose(retrieved)
    measured: Mapping[str, Any] = {}
    if task.read is None:
        check_rank_by(options.rank_by, engine, retrieved)
        measured = engine.defaults.get("image", {})
    config = make_config(options.settings, measured)
    samples = sample_prompts(
        engine, task, retrieved, seeds, config, num_samples, options.on_progress
    )
    outputs = _make_outputs(engine, task, samples, retrieved, seeds, options.rank_by)
    used = {name: getattr(config, name) for name in SamplingSettings.__annotations__}
    return [
        dataclasses.replace(output, settings=used | dict(task.settings))
        for output in outputs
    ]


def _make_outputs(
    engine: Engine,
    task: Task,
    samples: Samples,
    retrieved: Sequence[Retrieved],
    seeds: Sequence[int],
    rank_by: RankBy,
) -> list[GenerationOutput]:
    """Each row's samples as documents, best first, with the ids of their documents."""
    tokens, scores, images = samples.tokens, mean_log_probs(samples), None
    if task.read is None:
        tokens = place_tokens(task.prompts, tokens)
        images = engine.decode_images(tokens)
        scores = score_pictures(engine, rank_by, task.texts, retrieved, images, scores)
    outputs = []
    for i, (seed, shown) in enumerate(zip(seeds, retrieved, strict=True)):
        prompt, text = task.prompts[i], task.texts[i]
        if images is not None:
            before = (Segment(text=text),) if text else ()
            segments = [(*before, Segment(image=image)) for image in images[i]]
            facts = _describe_images(prompt, tokens[i], shown, engine.tokenizer.vocab)
        else:
            assert task.read is not None  # as above
            segments = [task.read(i, sample) for sample in tokens[i]]
            facts = [task.facts for _ in segments]
        common = {"task": task.name, "seed": seed}
        names = [document.id for document in shown.documents]
        order = np.argsort(-scores[i], kind="stable").tolist()
        documents = [
            Document(
                f"{task.name}-{seed}-{j}",
                segments[j],
                metadata={**common, "sample": j, "retrieved": names, **facts[j]},
            )
            for j in order
        ]
        outputs.append(
            GenerationOutput(
                documents,
                scores[i][order],
                shown,
                text,
                seed,
                samples.count_drafts(i) if task.writes_images else None,
            )
        )
    return outputs


def _describe_images(
    prompt: Prompt,
    tokens: Int32[np.ndarray, "samples codes"],
    retrieved: Retrieved,
    vocab: Vocab,
) -> list[dict[str, Any]]:
    """How close each image is to a retrieved one; for regions, how many codes are kept."""
    near = find_nearest(tokens, retrieved, vocab)
    if prompt.known is None:
        return near
    known = prompt.known >= 0
    kept = (vocab.image_codes(tokens) == prompt.known)[:, known].sum(1)
    counts = {"codes_generated": int((~known).sum()), "codes_outside": int(known.sum())}
    return [
        fact | counts | {"codes_outside_kept": int(count)}
        for fact, count in zip(near, kept, strict=True)
    ]
