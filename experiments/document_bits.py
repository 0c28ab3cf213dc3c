"""What documents tell about a held-out document: bits of its image, and of its caption.

    none         nothing is shown
    right        documents of the same group: another drawing of the same thing
    wrong        documents of another group
    right_first  a right and a wrong one
    right_last   the wrong one first
    itself       the document that is asked for: bits of a verbatim copy

A model that reads needs fewer bits after `right` than after `wrong` and `none`; one that
copies the first document differs between `right_first` and `right_last`. Unlike
flagworld's questions, any source with a `group_key` can be asked so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from racm3_jax.documents.sources import Corpus
from racm3_jax.evaluation.intervals import compute_share
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.generation.tasks import Generator
from racm3_jax.sequences.layout import (
    caption_prompt,
    put_images_first,
    text_to_image_prompt,
)
from racm3_jax.types import Document, TokenizedDocument

SHOWN = ("none", "right", "wrong", "right_first", "right_last", "itself")


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out document, and what may be shown before it.

    Attributes:
      asked: whose image and caption are scored.
      right: of its group.
      wrong: as many of another group.
    """

    asked: Document
    right: tuple[Document, ...]
    wrong: tuple[Document, ...]


def make_questions(
    corpus: Corpus,
    count: int,
    *,
    num_documents: int = 2,
    exclude_keys: Sequence[str] = (),
    seed: int = 0,
) -> list[Question]:
    """Questions about held-out documents, evenly spread over their order.

    Args:
      corpus: with a `group_key`.
      count: questions; fewer if fewer documents have enough others of their group.
      num_documents: shown ones.
      exclude_keys: a document that agrees with the asked one in all of these metadata
        keys is not shown, as in the retriever's strategy.
      seed: of what is shown.

    Raises:
      ValueError: no document has enough others of its group, or there is one group.
    """
    groups: dict[str, list[Document]] = {}
    for document in corpus.heldout():
        if document.text.strip() and document.images:
            groups.setdefault(corpus.group(document), []).append(document)

    def others(asked: Document) -> list[Document]:
        return [
            document
            for document in groups[corpus.group(asked)]
            if document.id != asked.id
            and not (
                exclude_keys
                and all(
                    document.metadata.get(key) == asked.metadata.get(key)
                    for key in exclude_keys
                )
            )
        ]

    usable = [
        document
        for documents in groups.values()
        for document in documents
        if len(others(document)) >= num_documents
    ]
    wide = [name for name, found in groups.items() if len(found) >= num_documents]
    if not usable or len(wide) < 2:
        raise ValueError(
            f"no held-out document has {num_documents} others of its group and "
            f"{num_documents} of another: set config.group_key to a metadata key that "
            "several documents share, and hold out more groups"
        )
    places = np.linspace(0, len(usable) - 1, min(count, len(usable))).round()
    questions = []
    for i, place in enumerate(places.astype(int).tolist()):
        asked = usable[place]
        rng = np.random.default_rng([seed, i])
        elsewhere = [name for name in wide if name != corpus.group(asked)]
        other = groups[elsewhere[rng.integers(len(elsewhere))]]

        def choose(
            documents: list[Document], rng: np.random.Generator = rng
        ) -> tuple[Document, ...]:
            rows = rng.choice(len(documents), num_documents, replace=False)
            return tuple(documents[row] for row in rows)

        questions.append(Question(asked, choose(others(asked)), choose(other)))
    return questions


def measure_bits(
    generator: Generator,
    questions: Sequence[Question],
    *,
    images_first: bool = False,
    num_rows: int = 8,
) -> dict[str, Any]:
    """Mean bits by what is shown, and how often the right documents save some.

    Args:
      generator: its memory is not used.
      questions: from `make_questions`.
      images_first: captions are asked for after documents with their images first.
      num_rows: see `score_tokens`.

    Returns:
      For "image" and "caption": mean bits by the names of `SHOWN`, and `right_wins`, the
      fraction of the questions with fewer bits after `right` than after `wrong`.
    """
    found: dict[str, Any] = {"questions": len(questions)}
    bits = {
        name: _score(generator, questions, name, num_rows, images_first)
        for name in SHOWN
    }
    for j, what in enumerate(("image", "caption")):
        mean = {
            name: round(float(values[:, j].mean()), 1) for name, values in bits.items()
        }
        wins = (bits["right"][:, j] < bits["wrong"][:, j]).tolist()
        found[what] = mean | {"right_wins": round(compute_share(wins).value, 3)}
    return found


def _score(
    generator: Generator,
    questions: Sequence[Question],
    shown: str,
    num_rows: int,
    images_first: bool,
) -> np.ndarray:
    """Bits of the image and of the caption of each question, (questions, 2)."""
    tokenizer, vocab = generator.tokenizer, generator.tokenizer.vocab
    scored = []
    for question in questions:
        before = list(tokenizer.tokenize(_choose(question, shown)))
        (asked,) = tokenizer.tokenize([question.asked])
        words = _tokens_of(asked, "text")
        image = _tokens_of(asked, "image")
        turned = [put_images_first(d) for d in before] if images_first else before
        scored += [
            Scored(text_to_image_prompt(before, words, vocab), image),
            Scored(
                caption_prompt(turned, image, vocab),
                np.append(words, vocab.eoss).astype(np.int32),
            ),
        ]
    nats = score_tokens(generator, scored, num_rows=num_rows)
    return np.array([x.sum() for x in nats]).reshape(-1, 2) / np.log(2)


def _choose(question: Question, shown: str) -> list[Document]:
    return {
        "none": [],
        "right": list(question.right),
        "wrong": list(question.wrong),
        "right_first": [question.right[0], question.wrong[0]],
        "right_last": [question.wrong[0], question.right[0]],
        "itself": [question.asked],
    }[shown]


def _tokens_of(document: TokenizedDocument, modality: str) -> np.ndarray:
    return next(s.tokens for s in document.segments if s.modality == modality)
