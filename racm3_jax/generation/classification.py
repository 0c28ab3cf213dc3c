"""k-shot classification in context, with labels that may mean nothing (section 5).

    "label"   <eod> image <break> dax <eod> image <break> wug <eod> image <break> ? <eod>
                    `--------- one shot: an example a label ------'
    "image"   <eod> dax <break> image <eod> dax <break> ? <eod>
              <eod> wug <break> image <eod> wug <break> ? <eod>

"label" compares how likely each label is after the image and after examples of all labels:
the paper's way. A label's score is the mean over its tokens, so that long labels are not
punished, less the same after a neutral grey image, so that a label is not favoured that
the model likes anyway (contextual calibration, arXiv 2102.09690). "image" compares how
likely the image is after each label and that label's own examples: a noisy channel (arXiv
2108.04106), with labels equally likely before the image is seen. Every likelihood is read off one forward pass. Examples that do not fit
into the context are read in further passes, whose probabilities are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from jaxtyping import Float, Float32, Int32

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.requests import Image
from racm3_jax.generation.score import compute_log_likelihoods
from racm3_jax.sequences.layout import beginning_prompt, retrieved_prefix
from racm3_jax.types import Document, Segment, TokenizedDocument

# Grey level of the image that says nothing.
NEUTRAL_LEVEL = 128
Example = tuple[Image, str]
ClassifyBy = Literal["label", "image"]
CLASSIFY_BY: tuple[ClassifyBy, ...] = get_args(ClassifyBy)
# By label: an example of each, and the known and the asked tokens.
Shot = dict[str, TokenizedDocument]
Question = dict[str, tuple[Int32[np.ndarray, " known"], Int32[np.ndarray, " asked"]]]
_Part = TypeVar("_Part")


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


def neutral_image(size: int) -> Image:
    """A flat grey image, which shows none of the classes."""
    return np.full((size, size, 3), NEUTRAL_LEVEL, np.uint8)


def score_labels(
    log_likelihoods: Float[np.ndarray, "*questions labels"],
    neutral: Float[np.ndarray, "*questions labels"],
    num_tokens: Sequence[int],
) -> Float[np.ndarray, "*questions labels"]:
    """What labels are compared by: the one score of `classify` and of all evaluations.

        log p(label | context, image) - log p(label | context, neutral image)
        ---------------------------------------------------------------------
                              tokens of the label

    Args:
      log_likelihoods: of each label's tokens after the image, summed, in nats.
      neutral: the same after the neutral image, in the same context.
      num_tokens: of each label, `<eod>` included.
    """
    return (log_likelihoods - neutral) / np.asarray(num_tokens, np.float64)


def compute_label_probabilities(
    scores: Float[np.ndarray, "*questions labels"],
) -> Float[np.ndarray, "*questions labels"]:
    """Softmax over the labels."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


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
) -> list[Shot]:
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
        {
            label: by_label[label][s % len(by_label[label])]
            for label in (shown[(i + s) % len(shown)] for i in range(len(shown)))
        }
        for s in range(count)
    ]


def classify(
    engine: Engine,
    images: Sequence[Image],
    support: Sequence[Example],
    labels: Sequence[str] | None,
    shots_per_pass: int | None,
    by: ClassifyBy,
) -> list[Classification]:
    """Classifies every image from the same support set."""
    names = find_labels(support, labels)
    if shots_per_pass is not None and shots_per_pass < 1:
        raise ValueError(f"shots_per_pass must be >= 1; got {shots_per_pass}")
    if by not in CLASSIFY_BY:
        raise ValueError(
            f"by is {by!r}; allowed: {', '.join(map(repr, CLASSIFY_BY))}: whose "
            "likelihood is compared"
        )
    documents = [
        Document(f"example-{i}", _order(by, Segment(text=label), Segment(image=image)))
        for i, (image, label) in enumerate(support)
    ]
    shots = group_shots(engine.tokenized(documents), [x for _, x in support], names)
    words = {name: engine.tokenizer.encode_text(name) for name in names}
    asked = list(images)
    if by == "label":
        asked.append(neutral_image(engine.tokenizer.image.image_size))
    questions = [
        _question(engine, engine.tokenizer.encode_image(image), words, by)
        for image in asked
    ]
    passes = _split_passes(engine, shots, questions, shots_per_pass, by)
    prompts, continuations = [], []
    for question in questions:
        for shown in passes:
            for label, (known, continuation) in question.items():
                context = _context(shown, label, by)
                prompts.append(beginning_prompt(context, known, engine.tokenizer.vocab))
                continuations.append(continuation)
    scores = compute_log_likelihoods(
        engine.model, engine.params, prompts, continuations, max_rows=engine.max_rows
    ).reshape(len(asked), len(passes), len(names))
    if by == "label":
        num_tokens = [len(continuation) for _, continuation in questions[-1].values()]
        scores = score_labels(scores[:-1], scores[-1:], num_tokens)
    probabilities = compute_label_probabilities(scores).mean(1).astype(np.float32)
    return [
        Classification(names[int(row.argmax())], names, row, len(passes))
        for row in probabilities
    ]


def _order(by: ClassifyBy, label: _Part, image: _Part) -> tuple[_Part, _Part]:
    """What is compared comes last."""
    return (image, label) if by == "label" else (label, image)


def _question(
    engine: Engine,
    image: Int32[np.ndarray, " image_length"],
    labels: Mapping[str, Int32[np.ndarray, " length"]],
    by: ClassifyBy,
) -> Question:
    """For each label the known tokens, and those whose likelihood is asked for."""
    vocab = engine.tokenizer.vocab
    break_, eod = np.array([vocab.break_], np.int32), np.array([vocab.eod], np.int32)
    question = {}
    for name, words in labels.items():
        known, asked = _order(by, words, image)
        question[name] = (np.concatenate([known, break_]), np.concatenate([asked, eod]))
    return question


def _context(
    shots: Sequence[Shot], label: str, by: ClassifyBy
) -> list[TokenizedDocument]:
    """What a label's likelihood is read after: all examples, or the label's own."""
    if by == "label":
        return [example for shot in shots for example in shot.values()]
    return [shot[label] for shot in shots if label in shot]


def _split_passes(
    engine: Engine,
    shots: Sequence[Shot],
    questions: Sequence[Question],
    shots_per_pass: int | None,
    by: ClassifyBy,
) -> list[list[Shot]]:
    """As many whole shots a pass as fit, or as were asked for; none without support."""
    max_length = engine.model.config.max_length
    longest = {
        label: max(sum(map(len, question[label])) for question in questions)
        for label in questions[0]
    }

    def count_ids(shown: Sequence[Shot]) -> int:
        return max(
            len(retrieved_prefix(_context(shown, label, by), engine.tokenizer.vocab))
            + length
            for label, length in longest.items()
        )

    passes: list[list[Shot]] = [[]]
    for shot in shots:
        longer = [*passes[-1], shot]
        needed = count_ids(longer)
        full = len(passes[-1]) == shots_per_pass or needed > max_length
        if full and not passes[-1]:
            raise ValueError(
                f"one shot does not fit: its examples and the image are {needed} tokens, more "
                f"than the model's max_length {max_length}; use fewer or shorter labels"
            )
        if full:
            passes.append([shot])
        else:
            passes[-1] = longer
    return passes
