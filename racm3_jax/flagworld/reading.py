"""Does a model read its documents, or copy one of them by its place?

    shown    a document of Ostrania      the wrong one, first or last
             a document of Velmoria      the right one
    asked    a scene with the flag of Velmoria: its caption, or its image by the caption

A model that copies the first document gets all questions right where the right one is
first, and none where it is last; a model that reads does not depend on the order.

`measure_reading`, the gate of a training, scores both continuations, the right one and
the same one with the name (or the flag) of the wrong document; nothing is generated. Its
figures are those of the first token in which they differ (the first of the name, the
first code of the flag) and of the whole. `generate_answers`, for the suite, generates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int

from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.flagworld import (
    FlagIdentifier,
    FlagworldConfig,
    Nation,
    make_nations,
    read_flagworld,
    redraw,
)
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.generation.tasks import Generator
from racm3_jax.sequences.layout import (
    caption_prompt,
    put_images_first,
    text_to_image_prompt,
)
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document, Modality, Retrieved, TokenizedDocument

Asked = Literal["name", "flag"]
ASKED: tuple[Asked, ...] = ("name", "flag")


@dataclasses.dataclass(frozen=True)
class ReadingQuestion:
    """What is shown and asked.

    Attributes:
      right: the document of the nation that is asked about.
      wrong: documents of other nations.
      asked: in a scene of its own.
      other: `asked` with the name and the flag of the first wrong document.
    """

    right: Document
    wrong: tuple[Document, ...]
    asked: Document
    other: Document


@dataclasses.dataclass(frozen=True)
class ReadingResult:
    """How often the right document is followed.

    Attributes:
      first: of the questions, at the first token that differs.
      whole: of the questions, by the whole continuation.
      probability_right: of that first token, the mean.
      probability_wrong: of the wrong document's, the mean.
    """

    first: Share
    whole: Share
    probability_right: float
    probability_wrong: float

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first.to_json(),
            "whole": self.whole.to_json(),
            "probability_right": self.probability_right,
            "probability_wrong": self.probability_wrong,
        }


def make_reading_questions(
    world: FlagworldConfig, count: int, *, num_documents: int = 2, seed: int = 0
) -> list[ReadingQuestion]:
    """Questions about held-out nations, one for each of the first `count`.

    Args:
      world: with enough held-out nations.
      count: questions.
      num_documents: documents shown, one of which is right.
      seed: of the wrong documents.

    Raises:
      ValueError: too few nations, or fewer than two documents.
    """
    if num_documents < 2 or not 1 <= count <= world.num_heldout:
        raise ValueError(
            f"{count} questions with {num_documents} documents each: at least 2 "
            "documents are needed, and 1 to flagworld.num_heldout="
            f"{world.num_heldout} questions"
        )
    if world.num_heldout < num_documents:
        raise ValueError(
            f"{num_documents} documents of different nations are needed; "
            f"flagworld.num_heldout is {world.num_heldout}"
        )
    nations = make_nations(world, "heldout")
    shown: dict[int, list[Document]] = {}
    for document in read_flagworld(world, "heldout_memory"):
        shown.setdefault(document.metadata["nation_id"], []).append(document)
    asked = {d.metadata["nation_id"]: d for d in read_flagworld(world, "heldout_test")}
    questions = []
    for i, nation in enumerate(nations[:count]):
        rng = np.random.default_rng([seed, i])
        others = rng.permutation([n for n in range(len(nations)) if n != i])

        def choose(number: int, rng: np.random.Generator = rng) -> Document:
            documents = shown[nations[number].id]
            return documents[rng.integers(len(documents))]

        wrong = others[: num_documents - 1].tolist()
        main = asked[nation.id]
        questions.append(
            ReadingQuestion(
                choose(i),
                tuple(choose(n) for n in wrong),
                main,
                redraw(world, main, nations[wrong[0]]),
            )
        )
    return questions


def measure_reading(
    generator: Generator,
    questions: Sequence[ReadingQuestion],
    *,
    right_place: int,
    image_first: bool = False,
    num_rows: int = 16,
) -> dict[Asked, ReadingResult]:
    """Asks every question for the name and for the flag.

    Args:
      generator: its memory is not used.
      questions: from `make_reading_questions`.
      right_place: where the right document is, 0 for first, -1 for last.
      image_first: names are asked for after documents with their images in front.
      num_rows: see `score_tokens`.
    """
    tokenizer = generator.tokenizer
    flat: list[Document] = []
    for question in questions:
        flat += [question.right, *question.wrong, question.asked, question.other]
    tokenized = iter(tokenizer.tokenize(flat))
    pairs: dict[Asked, list[tuple[Scored, Scored]]] = {name: [] for name in ASKED}
    for question in questions:
        right = next(tokenized)
        shown = [next(tokenized) for _ in question.wrong]
        place = right_place % (len(shown) + 1)
        shown.insert(place, right)
        asked, other = next(tokenized), next(tokenized)
        for name in ASKED:
            before = shown
            if image_first and name == "name":
                before = [put_images_first(document) for document in shown]
            pairs[name].append(_continuations(name, before, asked, other, tokenizer))
    results: dict[Asked, ReadingResult] = {}
    for name, asked_pairs in pairs.items():
        nats = score_tokens(
            generator, [s for pair in asked_pairs for s in pair], num_rows=num_rows
        )
        results[name] = _compare(asked_pairs, nats)
    return results


class ShownDocuments:
    """In place of a retriever: row i is given `shown[i]`, whatever it asks for."""

    def __init__(self, shown: Sequence[Sequence[TokenizedDocument]]) -> None:
        self._shown = [
            Retrieved(
                np.full(len(documents), -1, np.int64),
                np.full(len(documents), np.nan, np.float32),
                tuple(documents),
            )
            for documents in shown
        ]

    @property
    def memory(self) -> ShownDocuments:
        """Of these documents alone."""
        return self

    @property
    def num_allowed(self) -> int:
        """Documents that every row can be given."""
        return min(len(retrieved.documents) for retrieved in self._shown)

    def usual_score(self, modality: Modality) -> float:
        """Unknown: nothing was searched."""
        del modality
        return float("nan")

    def retrieve(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        nums: Int[np.ndarray, " queries"],
        mains: Sequence[TokenizedDocument | None],
    ) -> list[Retrieved]:
        """The documents of all rows.

        Raises:
          ValueError: for other rows than those that it was made for.
        """
        if len(queries) != len(self._shown):
            raise ValueError(
                f"{len(queries)} queries for the documents of {len(self._shown)} rows"
            )
        return self._shown


def generate_answers(
    generator: Generator,
    questions: Sequence[ReadingQuestion],
    nations: Sequence[Nation],
    *,
    right_place: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.9,
) -> dict[Asked, list[bool]]:
    """Of each question: has what is generated the right nation's name, and flag?

    Captions are greedy, after documents in the order of the model's training; nothing is
    guided, ranked or chosen again.

    Args:
      generator: its memory is not used, its embedder is not asked.
      questions: from `make_reading_questions`.
      nations: all held-out ones, among which flags are identified.
      right_place: where the right document is, 0 for first, -1 for last.
      seed: of the images.
      temperature: of the images.
      top_p: of the images.
    """
    tokenizer = generator.tokenizer
    shown = []
    for question in questions:
        documents = list(question.wrong)
        place = right_place % (len(documents) + 1)
        documents.insert(place, question.right)
        shown.append(list(tokenizer.tokenize(documents)))
    documents_by_row: Any = ShownDocuments(shown)
    reader = generator.with_retriever(documents_by_row)
    names = [question.asked.metadata["nation"] for question in questions]
    how: dict[str, Any] = {"num_retrieved": len(shown[0]), "seed": seed}
    images = reader.text_to_image_batch(
        [question.asked.text for question in questions],
        temperature=temperature,
        top_p=top_p,
        rank_by="likelihood",
        **how,
    )
    found = FlagIdentifier(nations).identify([output.images[0] for output in images])
    captions = reader.caption_batch(
        [question.asked.images[0] for question in questions],
        temperature=0.0,
        guidance=1.0,
        num_candidates=0,
        **how,
    )
    return {
        "name": [
            name.lower() in output.texts[0].lower()
            for name, output in zip(names, captions, strict=True)
        ],
        "flag": [
            nation.name == name for name, (nation, _) in zip(names, found, strict=True)
        ],
    }


def _continuations(
    name: Asked,
    shown: Sequence[TokenizedDocument],
    asked: TokenizedDocument,
    other: TokenizedDocument,
    tokenizer: MixedTokenizer,
) -> tuple[Scored, Scored]:
    """The right one and the wrong one, after the same prompt."""
    vocab = tokenizer.vocab
    words, image = (segment.tokens for segment in asked.segments)
    other_words, other_image = (segment.tokens for segment in other.segments)
    if name == "flag":
        context = text_to_image_prompt(shown, words, vocab)
        return Scored(context, image), Scored(context, other_image)
    context = caption_prompt(shown, image, vocab)
    end = [vocab.eoss]
    return (
        Scored(context, np.append(words, end).astype(np.int32)),
        Scored(context, np.append(other_words, end).astype(np.int32)),
    )


def _compare(
    pairs: Sequence[tuple[Scored, Scored]], nats: Sequence[np.ndarray]
) -> ReadingResult:
    first, whole, right, wrong = [], [], [], []
    for i, (a, b) in enumerate(pairs):
        length = min(len(a.targets), len(b.targets))
        differ = np.flatnonzero(a.targets[:length] != b.targets[:length])
        place = int(differ[0])
        of_right, of_wrong = nats[2 * i], nats[2 * i + 1]
        first.append(bool(of_right[place] < of_wrong[place]))
        whole.append(bool(of_right.sum() < of_wrong.sum()))
        right.append(np.exp(-of_right[place]))
        wrong.append(np.exp(-of_wrong[place]))
    return ReadingResult(
        compute_share(first),
        compute_share(whole),
        float(np.mean(right)),
        float(np.mean(wrong)),
    )
