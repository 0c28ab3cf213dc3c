"""k-shot classification in context, with labels that may mean nothing (section 5).

    <eod> image <break> dax <eod> image <break> wug <eod> image <break> dax <eod> ?
          `--------- one shot: an example a label ------'              wug <eod> ?

Labels stand behind their images, as in `sequences.episodes`. Each label's likelihood is
read off one forward pass. Examples that do not fit into the context are read in further
passes, whose probabilities are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.requests import Image
from racm3_jax.generation.score import compute_log_likelihoods
from racm3_jax.sequences.layout import beginning_prompt
from racm3_jax.types import Document, Segment, TokenizedDocument

Example = tuple[Image, str]


class Classification(NamedTuple):
    """What an image is, and how sure the model is.

    Attributes:
      label: the most probable one.
      labels: all of them.
      probabilities: of each, averaged over the passes; they sum to 1.
      num_passes: support sets that were read.
    """

    label: str
    labels: tuple[str, ...]
    probabilities: Float32[np.ndarray, " labels"]
    num_passes: int


def find_labels(
    support: Sequence[Example], labels: Sequence[str] | None
) -> tuple[str, ...]:
    """The labels to choose from: the given ones, or those of the support set.

    Raises:
      ValueError: fewer than two, or an example with a label that is not among them.
    """
    found = tuple(dict.fromkeys(label for _, label in support))
    chosen = found if labels is None else tuple(dict.fromkeys(labels))
    if len(chosen) < 2 or not all(label.strip() for label in chosen):
        raise ValueError(
            f"classification needs at least two labels that are not empty; got "
            f"{list(chosen)}"
        )
    for label in found:
        if label not in chosen:
            raise ValueError(
                f"the support set has the label {label!r}, which is not among the "
                f"labels {', '.join(map(repr, chosen))}"
            )
    return chosen


def group_shots(
    examples: Sequence[TokenizedDocument], given: Sequence[str], labels: Sequence[str]
) -> list[list[TokenizedDocument]]:
    """Shots of one example a label; a label with fewer examples repeats them.

    The order of the labels turns from shot to shot, so that none is always the last,
    which models favour.
    """
    by_label = {label: [] for label in labels}
    for example, label in zip(examples, given, strict=True):
        by_label[label].append(example)
    shown = [label for label in labels if by_label[label]]
    count = max((len(found) for found in by_label.values()), default=0)
    return [
        [
            by_label[label][s % len(by_label[label])]
            for label in (shown[(i + s) % len(shown)] for i in range(len(shown)))
        ]
        for s in range(count)
    ]


def classify(
    engine: Engine,
    images: Sequence[Image],
    support: Sequence[Example],
    labels: Sequence[str] | None,
    shots_per_pass: int | None,
) -> list[Classification]:
    """Classifies every image from the same support set."""
    vocab = engine.tokenizer.vocab
    names = find_labels(support, labels)
    if shots_per_pass is not None and shots_per_pass < 1:
        raise ValueError(f"shots_per_pass must be >= 1; got {shots_per_pass}")
    documents = [
        Document(f"example-{i}", (Segment(image=image), Segment(text=label)))
        for i, (image, label) in enumerate(support)
    ]
    shots = group_shots(engine.tokenized(documents), [x for _, x in support], names)
    answers = [_answer(engine, name) for name in names]
    end = np.array([vocab.break_], np.int32)
    queries = [
        np.concatenate([engine.tokenizer.encode_image(image), end]) for image in images
    ]
    passes = _split_passes(engine, shots, queries[0], answers, shots_per_pass)
    prompts, continuations = [], []
    for tokens in queries:
        for shown in passes:
            prompt = beginning_prompt(shown, tokens, vocab)
            prompts += [prompt] * len(answers)
            continuations += answers
    scores = compute_log_likelihoods(
        engine.model, engine.params, prompts, continuations, max_rows=engine.max_rows
    ).reshape(len(images), len(passes), len(names))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = (weights / weights.sum(-1, keepdims=True)).mean(1)
    return [
        Classification(names[int(row.argmax())], names, row, len(passes))
        for row in probabilities
    ]


def _answer(engine: Engine, label: str) -> Int32[np.ndarray, " length"]:
    vocab = engine.tokenizer.vocab
    return np.append(engine.tokenizer.encode_text(label), vocab.eod).astype(np.int32)


def _split_passes(
    engine: Engine,
    shots: Sequence[Sequence[TokenizedDocument]],
    query: Int32[np.ndarray, " asked"],
    answers: Sequence[Int32[np.ndarray, " length"]],
    shots_per_pass: int | None,
) -> list[list[TokenizedDocument]]:
    """As many whole shots a pass as fit, or as were asked for; none without support."""
    longest = max(len(answer) for answer in answers)
    max_length = engine.model.config.max_length
    passes: list[list[TokenizedDocument]] = [[]]
    taken = 0
    for shot in shots:
        longer = [*passes[-1], *shot]
        needed = len(beginning_prompt(longer, query, engine.tokenizer.vocab)) + longest
        full = taken == shots_per_pass or needed > max_length
        if full and not taken:
            raise ValueError(
                f"{len(shot)} documents do not fit: one example of each label and the "
                f"image are {needed} ids, more than the model's max_length {max_length}; "
                "use fewer or shorter labels"
            )
        if full:
            passes.append(list(shot))
            taken = 1
        else:
            passes[-1] = longer
            taken += 1
    return passes
