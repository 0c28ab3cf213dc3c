"""k-shot classification in context, with labels that may mean nothing (section 5.4).

    "label"   <eod> image <break> dax <eod> image <break> wug <eod> image <break> ?
                    `---- one shot: an example of each label -----'
    "image"   <eod> dax <break> image <eod> dax <break> ?
              <eod> wug <break> image <eod> wug <break> ?

"label" compares how likely each label, with its `<eod>`, is after the image and after
examples of all labels: the paper's way. A label's score is the mean over its tokens, so
that long labels are not punished, minus the same after a neutral grey image, so that no
label wins because the model prefers it anyway (contextual calibration, arXiv
2102.09690). "image" compares how likely the image is after each label and that label's
own examples: a noisy channel (arXiv 2108.04106), with labels equally likely before the
image is seen. Examples that do not fit into the context are read in further passes, whose
probabilities are averaged.

`Generator.classify` and all evaluations use `classify_questions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Float64

from racm3_jax.generation.engine import Engine
from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.generation.requests import Image
from racm3_jax.sequences.layout import beginning_prompt
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

# Grey level of the image that says nothing.
NEUTRAL_LEVEL = 128
Example = tuple[Image, str]
ClassifyBy = Literal["label", "image"]
CLASSIFY_BY: tuple[ClassifyBy, ...] = get_args(ClassifyBy)
# An example of each label.
Shot = dict[str, TokenizedDocument]


class Question(NamedTuple):
    """An image to classify.

    Attributes:
      image: of any size.
      support: labelled images; none asks the model without context.
      labels: to choose from; those of `support` where None.
    """

    image: Image
    support: Sequence[Example]
    labels: Sequence[str] | None = None


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
    probabilities: Float64[np.ndarray, " labels"]
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
    """Shots of one example per label; a label with fewer examples repeats them.

    The order of the labels rotates from shot to shot: models favour the last label, so
    none is always the last.

        dax: a b, wug: c   ->   [dax a, wug c], [wug c, dax b]
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


def classify_questions(
    engine: Engine,
    questions: Sequence[Question],
    *,
    shots_per_pass: int | None = None,
    by: ClassifyBy = "image",
    num_rows: int | None = None,
) -> list[Classification]:
    """Answers every question from its own support set.

    Args:
      engine: its memory is not used.
      questions: in any order; each is answered alone.
      shots_per_pass: examples of each label in the context at once; as many as fit
        unless given.
      by: what is compared.
      num_rows: see `score_tokens`.

    Raises:
      ValueError: a setting or a question that is not possible.
    """
    if shots_per_pass is not None and shots_per_pass < 1:
        raise ValueError(f"shots_per_pass must be >= 1; got {shots_per_pass}")
    if by not in CLASSIFY_BY:
        raise ValueError(
            f"by is {by!r}; allowed: {', '.join(map(repr, CLASSIFY_BY))}: whose "
            "likelihood is compared"
        )
    vocab = engine.tokenizer.vocab
    labels = [find_labels(question.support, question.labels) for question in questions]
    images = [question.image for question in questions]
    neutral = neutral_image(engine.tokenizer.image.image_size)
    examples = [image for question in questions for image, _ in question.support]
    tokens = _encode(engine, [*images, *examples, neutral], itertools.chain(*labels))
    passes = [
        _split_passes(engine, tokens, question, names, shots_per_pass, by)
        for question, names in zip(questions, labels, strict=True)
    ]
    rounds = [images] if by == "image" else [images, [neutral] * len(images)]
    asked = [
        [
            _ask(tokens, _context(shots, label, by), image, label, by, vocab)
            for shots in shown
            for label in names
        ]
        for images in rounds
        for image, names, shown in zip(images, labels, passes, strict=True)
    ]
    scores = _score(engine, asked, num_rows)
    found = []
    for i, (names, shown) in enumerate(zip(labels, passes, strict=True)):
        score = scores[i].reshape(len(shown), len(names))
        if by == "label":
            after_neutral = scores[len(images) + i].reshape(score.shape)
            num_tokens = [len(tokens[label].tokens) + 1 for label in names]
            score = score_labels(score, after_neutral, num_tokens)
        probabilities = compute_label_probabilities(score).mean(0)
        best = names[int(probabilities.argmax())]
        found.append(Classification(best, names, probabilities, len(shown)))
    return found


def _encode(
    engine: Engine, images: Iterable[Image], labels: Iterable[str]
) -> dict[Any, TokenizedSegment]:
    """Segments of all labels, and of all images by their `id`; each is encoded once."""
    segments: dict[Any, Segment] = {id(image): Segment(image=image) for image in images}
    segments |= {label: Segment(text=label) for label in labels}
    documents = engine.tokenized([Document("", (x,)) for x in segments.values()])
    return dict(zip(segments, (d.segments[0] for d in documents), strict=True))


def _order(
    tokens: Mapping[Any, TokenizedSegment], image: Image, label: str, by: ClassifyBy
) -> tuple[TokenizedSegment, TokenizedSegment]:
    """What is compared comes last."""
    seen, said = tokens[id(image)], tokens[label]
    return (seen, said) if by == "label" else (said, seen)


def _ask(
    tokens: Mapping[Any, TokenizedSegment],
    context: Sequence[TokenizedDocument],
    image: Image,
    label: str,
    by: ClassifyBy,
    vocab: Vocab,
) -> Scored:
    """The last document: its first half is known, its second half is scored."""
    known, asked = (half.tokens for half in _order(tokens, image, label, by))
    prompt = beginning_prompt(context, np.append(known, vocab.break_), vocab)
    return Scored(prompt, np.append(asked, vocab.eod).astype(np.int32))


def _context(
    shots: Sequence[Shot], label: str, by: ClassifyBy
) -> list[TokenizedDocument]:
    """What a label's likelihood is read after: all examples, or the label's own."""
    if by == "label":
        return [example for shot in shots for example in shot.values()]
    return [shot[label] for shot in shots if label in shot]


def _split_passes(
    engine: Engine,
    tokens: Mapping[Any, TokenizedSegment],
    question: Question,
    labels: Sequence[str],
    shots_per_pass: int | None,
    by: ClassifyBy,
) -> list[list[Shot]]:
    """As many whole shots a pass as fit, or as were asked for; none without support."""
    max_length, vocab = engine.model.config.max_length, engine.tokenizer.vocab
    examples = [
        TokenizedDocument(f"example-{i}", _order(tokens, image, label, by))
        for i, (image, label) in enumerate(question.support)
    ]

    def count_tokens(shots: Sequence[Shot]) -> int:
        asked = (
            _ask(tokens, _context(shots, x, by), question.image, x, by, vocab)
            for x in labels
        )
        return max(len(s.context) + len(s.targets) for s in asked)

    passes: list[list[Shot]] = [[]]
    for shot in group_shots(examples, [label for _, label in question.support], labels):
        longer = [*passes[-1], shot]
        needed = count_tokens(longer)
        full = len(passes[-1]) == shots_per_pass or needed > max_length
        if full and not passes[-1]:
            raise ValueError(
                f"one shot does not fit: its examples and the image are {needed} "
                f"tokens, more than the model's max_length {max_length}; use fewer or "
                "shorter labels"
            )
        if full:
            passes.append([shot])
        else:
            passes[-1] = longer
    return passes


def _score(
    engine: Engine, asked: Sequence[Sequence[Scored]], num_rows: int | None
) -> list[Float64[np.ndarray, " sequences"]]:
    """Log-likelihoods; equal sequences (after the neutral image) are read once."""
    flat = [sequence for sequences in asked for sequence in sequences]
    keys = [(s.context.tobytes(), s.targets.tobytes()) for s in flat]
    distinct = dict(zip(keys, flat, strict=True))
    read = compute_log_likelihoods(engine, list(distinct.values()), num_rows=num_rows)
    found = dict(zip(distinct, read, strict=True))
    ends = np.cumsum([len(sequences) for sequences in asked])[:-1]
    return np.split(np.array([found[key] for key in keys]), ends)
