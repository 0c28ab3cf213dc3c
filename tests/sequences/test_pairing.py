"""Documents by class: which are shown, in which order, under which names."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from test_pipeline import (
    CONFIG,
    PLAIN,
    FakeMemory,
    FakeRetriever,
    assert_same,
    main_parts,
)

from racm3_jax.documents.invented_names import make_name
from racm3_jax.sequences.pairing import Names, Pairing, PairingConfig
from racm3_jax.sequences.pipeline import make_batches
from racm3_jax.types import Example, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

CLASSES = np.array([0, 0, 1, 1, 1, 2, 2, -1, 3, 0, 0])
# Texts are their characters' codes.
SPELLED = Names(
    lambda tokens: "".join(map(chr, tokens)),
    lambda text: np.array([ord(c) for c in text], np.int32),
    make_name,
)


def make_pairing(probability=1.0, classes=CLASSES, rename=False, **changes):
    config = PairingConfig(probability, rename=rename, class_key="nation", **changes)
    return Pairing(config, classes, SPELLED if rename else None, image_size=64)


def sample_many(pairing, row=0, count=400):
    return [pairing.sample(row, np.random.default_rng(i)) for i in range(count)]


def test_one_right_and_one_wrong_document_in_any_order():
    places = set()
    for rows in sample_many(make_pairing()):
        right = CLASSES[rows] == 0
        assert right.sum() == 1 and len(rows) == 2 and 0 not in rows and 7 not in rows
        places.add(int(right.argmax()))
    assert places == {0, 1}


def test_the_majority_of_four_documents_is_uninformative():
    num_right, num_other = set(), set()
    for rows in sample_many(make_pairing(num_documents=(4,))):
        found = CLASSES[rows]
        num_right.add(int((found == 0).sum()))
        num_other.add(int(np.unique(found[found != 0], return_counts=True)[1].max()))
    assert num_right == {1, 2, 3} and num_other == {1, 2, 3}


def test_numbers_of_documents_are_equally_likely():
    sampled = sample_many(make_pairing(num_documents=(0, 1, 2, 4)), count=2000)
    counts = np.bincount([len(rows) for rows in sampled], minlength=5) / 2000
    np.testing.assert_allclose(counts, [0.25, 0.25, 0.25, 0, 0.25], atol=0.04)
    assert all(CLASSES[rows[0]] == 0 for rows in sampled if len(rows) == 1)


def test_all_right_and_all_wrong_are_configurable():
    right = sample_many(make_pairing(wrong_probability=0.0))
    assert all((CLASSES[rows] == 0).all() for rows in right)
    wrong = sample_many(make_pairing(right_probability=0.0))
    assert all((CLASSES[rows] != 0).all() for rows in wrong)
    # A class with one document is not shown twice.
    assert {len(rows) for rows in wrong} == {1, 2}
    some = sample_many(make_pairing(wrong_probability=0.7), count=1000)
    fraction = np.mean([(CLASSES[rows] != 0).any() for rows in some])
    assert abs(fraction - 0.7) < 0.06


def test_the_main_document_itself_may_be_the_right_one():
    pairing = make_pairing(same_probability=0.4, num_documents=(3,))
    sampled = sample_many(pairing, count=1000)
    shown = [0 in rows for rows in sampled]
    assert abs(np.mean(shown) - 0.4) < 0.06
    assert all(len(set(rows.tolist())) == len(rows) for rows in sampled)


def test_documents_without_a_class_or_not_sampled_are_left_to_the_retriever():
    assert make_pairing().sample(7, np.random.default_rng(0)) is None
    left_to_retriever = [
        rows is None for rows in sample_many(make_pairing(0.3), count=1000)
    ]
    assert abs(np.mean(left_to_retriever) - 0.7) < 0.06
    # Alone in its class: the wrong document remains.
    assert len(make_pairing().sample(8, np.random.default_rng(0))) == 1


def make_document(name, text):
    segments = (
        TokenizedSegment("text", SPELLED.encode(text)),
        TokenizedSegment("image", np.array([5, 6], np.int32)),
    )
    return TokenizedDocument(name, segments, metadata={"nation": name})


def text_of(document):
    return SPELLED.decode(document.segments[0].tokens)


def test_a_class_has_one_new_name_in_all_documents_of_an_example():
    main = make_document("Velmoria", "the flag of Velmoria")
    shown = [
        make_document("Ostrania", "Ostrania, at sea"),
        make_document("Velmoria", "on the moon, Velmoria"),
        make_document("Silent", "no name here"),
    ]
    pairing, seen = make_pairing(rename=True), set()
    for seed in range(50):
        new, documents = pairing.rename(main, shown, np.random.default_rng(seed))
        name = text_of(new).removeprefix("the flag of ")
        assert text_of(documents[1]) == f"on the moon, {name}"
        other = text_of(documents[0]).removesuffix(", at sea")
        assert other not in ("Ostrania", name)
        assert text_of(documents[2]) == "no name here"
        assert documents[0].segments[1] is shown[0].segments[1]
        alone, _ = pairing.rename(main, (), np.random.default_rng(seed))
        assert text_of(alone) == text_of(new)
        seen |= {name, other}
    assert len(seen) == 100


def test_the_name_after_the_main_image_has_a_larger_weight(vocab):
    pairing = make_pairing(rename=True, name_weight=5.0)
    main = make_document("Velmoria", "the flag of Velmoria")
    shown = SPELLED.encode("a Velmoria")
    image = np.full(3, vocab.image_range.start)
    weights = is_main = tokens = np.zeros(0)
    for text, first in (("the flag of Velmoria", 11), ("Velmoria is it", 0)):
        for before, after in ((shown, [*image]), ([*image, *shown], [])):
            parts = [before, after, SPELLED.encode(text), after]
            tokens = np.concatenate(parts).astype(np.int64)
            is_main = np.arange(len(tokens)) >= len(before)
            weights = np.where(is_main, 1.0, 0.1).astype(np.float32)
            found = pairing.reweight(Example(tokens, weights, is_main), main, vocab)
            expected = weights.copy()
            if after:
                start = len(before) + len(after) + first
                expected[start : start + len("Velmoria") + (first > 0)] = 5
            np.testing.assert_array_equal(found.weights, expected)
    example = Example(tokens, weights, is_main)
    other = make_document("Ostrania", "the flag of Ostrania")
    unchanged = pairing.reweight(example, other, vocab)
    np.testing.assert_array_equal(unchanged.weights, weights)
    plain = make_pairing(rename=True).reweight(example, main, vocab)
    np.testing.assert_array_equal(plain.weights, weights)
    renamed, _ = pairing.rename(main, (), np.random.default_rng(0))
    assert text_of(renamed) == f"the flag of {renamed.metadata['nation']}"


def test_the_box_of_the_main_image_has_a_larger_weight():
    vocab = Vocab(num_text_ids=9, num_image_codes=16, image_length=16, num_sentinels=2)
    pairing, side = make_pairing(box_weight=3.0), math.isqrt(vocab.image_length)
    image = vocab.image_tokens(np.arange(vocab.image_length, dtype=np.int32))
    cell = 64 // side
    box = (0, cell, cell, 64 - cell)  # the upper row but for its first code
    segments = (TokenizedSegment("image", image),)
    main = TokenizedDocument("main", segments, metadata={"box": box})
    tokens = np.concatenate([image, [vocab.eod], image])
    is_main = np.arange(len(tokens)) > len(image)
    example = Example(tokens, np.ones(len(tokens), np.float32), is_main)
    found = pairing.reweight(example, main, vocab).weights
    expected = np.ones(len(tokens))
    expected[len(image) + 2 : len(image) + 1 + side] = 3
    np.testing.assert_array_equal(found, expected)
    moved = np.concatenate([image, [vocab.eod], np.roll(image, 3)])
    for other, shown in (
        (example._replace(tokens=moved), main),
        (example, dataclasses.replace(main, metadata={})),
    ):
        np.testing.assert_array_equal(pairing.reweight(other, shown, vocab).weights, 1)


@pytest.fixture
def collect(vocab):
    memory = FakeMemory(vocab, len(CLASSES))
    rows = np.array([0, 1, 2, 3, 5, 6])

    def run(pairing, config=CONFIG, start_step=0, num_steps=6):
        retriever = FakeRetriever(memory)
        arguments = (memory, retriever, rows, vocab, PLAIN, config)
        limits = {"start_step": start_step, "num_steps": num_steps}
        with make_batches(*arguments, **limits, pairing=pairing) as batches:
            return list(batches), retriever

    return run


def test_the_pipeline_shows_the_pairs_without_the_retriever(collect, vocab):
    """`<eod> t2 <break> i2 i0 <eod> t1 <break> i1 i0 <eod> t0 <break> i0 i0 <eod>`"""
    config = dataclasses.replace(CONFIG, rows=8, max_documents=4)
    found, retriever = collect(make_pairing(), config)
    assert not retriever.queries
    num_examples = 0
    for batch, stats in found:
        assert stats["dropped"] == 0 and stats["retrieved"] == 2 * stats["examples"]
        for row, segments in zip(batch.inputs, batch.segment_ids, strict=True):
            for number in range(1, segments.max() + 1):
                texts = row[(segments == number) & vocab.is_text(row)].tolist()
                shown = [key for key, _ in itertools.groupby(texts)]
                classes = [CLASSES[text] for text in shown]
                assert len(classes) == 3
                assert (classes[0] == classes[2]) != (classes[1] == classes[2])
                num_examples += 1
    assert num_examples == 6 * CONFIG.examples_per_batch


def test_pairs_are_functions_of_the_step(collect):
    pairing = make_pairing(0.5)
    whole, _ = collect(pairing)
    resumed, retriever = collect(pairing, start_step=4, num_steps=2)
    assert_same(whole[4:], resumed)
    assert retriever.queries
    threaded = dataclasses.replace(CONFIG, threads=1, prefetch=0)
    assert_same(whole, collect(pairing, threaded)[0])


def test_without_retrieval_main_documents_and_names_are_the_same(collect):
    pairing = make_pairing(num_documents=(0, 1, 2))
    roomy = dataclasses.replace(CONFIG, rows=8)
    with_documents, _ = collect(pairing, roomy)
    without_retrieval, retriever = collect(
        pairing, dataclasses.replace(roomy, retrieval=False)
    )
    assert not retriever.queries
    for (batch, stats), (alone, stats_without) in zip(
        with_documents, without_retrieval, strict=True
    ):
        assert stats["dropped"] == stats_without["dropped"] == 0
        assert stats_without["retrieved"] == 0
        assert sorted(main_parts(batch)) == sorted(main_parts(alone))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.5}, "pairing.probability must be in 0..1; got 1.5"),
        ({"wrong_probability": -1}, "pairing.wrong_probability"),
        ({"same_probability": 2}, "pairing.same_probability"),
        ({"name_weight": 0.0}, "name_weight must be above 0; got 0.0"),
        ({"box_weight": -1.0}, "box_weight must be above 0; got -1.0"),
        ({"num_documents": ()}, "at least one number"),
        ({"num_documents": (2, -1)}, "none below 0"),
    ],
)
def test_configuration_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PairingConfig(**settings)


def test_pairs_need_two_classes_and_names():
    with pytest.raises(ValueError, match="at least two classes; the memory has 1"):
        make_pairing(classes=np.array([0, 0, -1]))
    for settings in (
        PairingConfig(1.0),
        PairingConfig(1.0, rename=False, name_weight=2),
    ):
        with pytest.raises(ValueError, match="no names were given"):
            Pairing(settings, CLASSES)
