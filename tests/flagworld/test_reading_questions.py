"""Questions with a right and a wrong document, and who follows which."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from racm3_jax import wiring
from racm3_jax.flagworld import FlagworldConfig, make_nations, reading
from racm3_jax.flagworld.reading import (
    generate_answers,
    make_reading_questions,
    measure_reading,
)
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document, GenerationOutput

WORLD = FlagworldConfig(num_nations=0, num_heldout=8, documents_per_heldout=3)


@pytest.fixture(scope="module")
def questions():
    return make_reading_questions(WORLD, 6)


@pytest.fixture(scope="module")
def tokenizer():
    return MixedTokenizer.load(wiring.resolve("shipped:flagworld/tokenizer"))


class Reader:
    """Follows the first document, or the one that shows what is asked."""

    def __init__(self, tokenizer, copies, nations):
        self.tokenizer, self.copies = tokenizer, copies
        self.nations = nations
        self.retriever = None

    def with_retriever(self, retriever):
        other = copy.copy(self)
        other.retriever = retriever
        return other

    def _follow(self, count, fits):
        found = self.retriever.retrieve(np.zeros((count, 2)), None, [None] * count)
        for i, retrieved in enumerate(found):
            documents = [self.tokenizer.decode(d) for d in retrieved.documents]
            right = [d for d in documents if fits(i, d)]
            assert len(documents) == 2 and len(right) == 1
            followed = documents[0] if self.copies else right[0]
            answer = Document("x", followed.segments)
            yield GenerationOutput([answer], np.zeros(1), retrieved, "", 0)

    def text_to_image_batch(self, prompts, *, num_retrieved, rank_by, **sampling):
        assert num_retrieved == 2 and rank_by == "likelihood"
        return list(
            self._follow(
                len(prompts),
                lambda i, d: d.metadata["nation"] in prompts[i],
            )
        )

    def caption_batch(self, images, *, temperature, **sampling):
        assert temperature == 0.0
        named = [n.name for n in self.nations]
        return list(
            self._follow(len(images), lambda i, d: d.metadata["nation"] == named[i])
        )


def test_a_question_shows_its_nation_and_another_one(questions):
    for question in questions:
        asked = question.asked.metadata["nation"]
        assert question.right.metadata["nation"] == asked
        (wrong,) = question.wrong
        name = wrong.metadata["nation"]
        assert name != asked and name in question.other.text
        assert question.other.text == question.asked.text.replace(asked, name)
        assert (question.other.images[0] != question.asked.images[0]).any()
    many = make_reading_questions(WORLD, 3, num_documents=4)
    names = [
        {d.metadata["nation"] for d in (question.right, *question.wrong)}
        for question in many
    ]
    assert all(len(found) == 4 for found in names)


def test_copying_depends_on_the_order_and_reading_does_not(questions, tokenizer):
    nations = make_nations(WORLD, "heldout")
    for copies, place, expected in (
        (True, 0, 1.0),
        (True, -1, 0.0),
        (False, 0, 1.0),
        (False, -1, 1.0),
    ):
        reader = Reader(tokenizer, copies, nations)
        found = generate_answers(reader, questions, nations, right_place=place)
        assert np.mean(found["name"]) == np.mean(found["flag"]) == expected
        assert len(found["flag"]) == 6


def test_a_generator_takes_what_is_shown_for_its_memory(questions):
    generator = wiring.load_generator(wiring.resolve("shipped:flagworld"), None)
    rows = [
        list(generator.tokenizer.tokenize([question.right, *question.wrong]))
        for question in questions[:2]
    ]
    reader = generator.with_retriever(reading.ShownDocuments(rows))
    reader.check_counts(1, 2, None)
    found = reader.retrieve_for(["a flag", questions[0].asked.images[0]], 2, None)
    assert [[d.id for d in f.documents] for f in found] == [
        [d.id for d in row] for row in rows
    ]
    with pytest.raises(ValueError, match="holds only 2"):
        reader.check_counts(1, 3, None)


def test_the_first_token_that_differs_is_compared(questions, tokenizer, monkeypatch):
    """Scores are made up: 1 nat a token, and 0.5 at the first one of the right name."""
    seen = []

    def score(generator, sequences, num_rows):
        seen.append(sequences)
        nats = [np.ones(len(sequence.targets)) for sequence in sequences]
        for right, wrong, of_right in zip(
            sequences[::2], sequences[1::2], nats[::2], strict=True
        ):
            np.testing.assert_array_equal(right.context, wrong.context)
            length = min(len(right.targets), len(wrong.targets))
            differ = right.targets[:length] != wrong.targets[:length]
            of_right[int(np.argmax(differ))] = 0.5
            # Later tokens speak for the wrong one.
            of_right[-1] = 30.0
        return nats

    monkeypatch.setattr(reading, "score_tokens", score)
    reader = Reader(tokenizer, False, [])
    found = measure_reading(reader, questions, right_place=-1)
    for asked in ("name", "flag"):
        result = found[asked]
        assert result.first.value == 1.0 and result.whole.value == 0.0
        assert result.probability_right == pytest.approx(np.exp(-0.5))
        assert result.probability_wrong == pytest.approx(np.exp(-1.0))
        assert result.to_json()["first"]["total"] == 6
    names, flags = seen
    vocab = tokenizer.vocab
    for question, sequence in zip(questions, names[::2], strict=True):
        written = tokenizer.text.decode(sequence.targets[:-1])
        assert written == question.asked.text and sequence.targets[-1] == vocab.eoss
        shown = tokenizer.text.decode(sequence.context[vocab.is_text(sequence.context)])
        assert shown == question.wrong[0].text + question.right.text
    measure_reading(reader, questions, right_place=-1, image_first=True)
    for before, after in zip(names, seen[2], strict=True):
        assert after.context[1:].tolist() != before.context[1:].tolist()
        assert vocab.is_image(after.context[1 : 1 + vocab.image_length]).all()
        assert sorted(after.context.tolist()) == sorted(before.context.tolist())
    for sequence in flags:
        assert vocab.is_image(sequence.targets).all()
        assert len(sequence.targets) == vocab.image_length


def test_too_few_nations_are_refused():
    with pytest.raises(ValueError, match="9 questions with 2 documents each"):
        make_reading_questions(WORLD, 9)
    with pytest.raises(ValueError, match="at least 2 documents"):
        make_reading_questions(WORLD, 2, num_documents=1)
    with pytest.raises(ValueError, match="documents of different nations"):
        make_reading_questions(WORLD, 2, num_documents=9)
