"""Episodes: the answer is the label of the demonstration that shows the same class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_pipeline import CONFIG, PLAIN, FakeMemory, FakeRetriever

from racm3_jax.documents.invented_names import make_labels
from racm3_jax.sequences.episodes import EpisodeConfig, Episodes
from racm3_jax.sequences.pipeline import make_batches

CLASSES = np.array([0, 0, 1, 1, 1, 2, 2, -1, 3])
LABELS = [np.array([10 + i], np.int32) for i in range(8)]


def make_episodes(probability=1.0, classes=CLASSES, label_first=0.0):
    config = EpisodeConfig(probability, class_key="nation", label_first=label_first)
    return Episodes(config, classes, LABELS)


def test_the_answer_is_the_label_of_the_same_class():
    episodes, orders = make_episodes(), set()
    for i in range(200):
        row = i % 7
        episode = episodes.sample(row, np.random.default_rng(i))
        assert row not in episode.rows and 7 not in episode.rows
        same = CLASSES[episode.rows] == CLASSES[row]
        assert same.sum() == 1 and len(set(episode.labels.tolist())) == 2
        assert episode.labels[same] == [episode.answer]
        orders.add(int(same.argmax()))
    assert orders == {0, 1}


def test_no_episode_without_a_class_or_another_member():
    episodes = make_episodes()
    assert episodes.sample(7, np.random.default_rng(0)) is None  # no class
    assert episodes.sample(8, np.random.default_rng(0)) is None  # alone in its class


def test_the_fraction_of_episodes_is_as_configured():
    episodes = make_episodes(0.3)
    sampled = [episodes.sample(0, np.random.default_rng(i)) for i in range(1000)]
    assert 0.25 < np.mean([d is not None for d in sampled]) < 0.35


def test_a_row_of_the_pipeline(vocab):
    """`<eod> i2 i0 <break> t15 <eod> i0 i0 <break> t10 <eod> i1 i0 <break> t15 <eod>`"""
    memory = FakeMemory(vocab, 9)
    config = dataclasses.replace(CONFIG, examples_per_batch=1, rows=1)
    arguments = (memory, FakeRetriever(memory), np.array([0]), vocab, PLAIN, config)
    episodes = make_episodes()
    for batch, stats in make_batches(*arguments, num_steps=20, episodes=episodes):
        assert stats["episodes"] == 1
        ids = batch.inputs[0][batch.segment_ids[0] > 0].tolist()
        texts = [i for i, x in enumerate(ids) if vocab.is_text(x)]
        assert len(texts) == 3 and ids[texts[2]] in [ids[texts[0]], ids[texts[1]]]
        assert all(ids[i - 1] == vocab.break_ for i in texts)
        asked = batch.targets[0] == ids[texts[2]]
        assert batch.loss_weights[0][asked].max() == 1


def test_labels_in_front_of_their_images(vocab):
    """`<eod> t15 <break> i2 i0 <eod> t10 <break> i0 i0 <eod> t15 <break> i1 i0 <eod>`"""
    memory = FakeMemory(vocab, 9)
    config = dataclasses.replace(CONFIG, examples_per_batch=1, rows=1)
    arguments = (memory, FakeRetriever(memory), np.array([0]), vocab, PLAIN, config)
    episodes = make_episodes(label_first=1.0)
    for batch, _ in make_batches(*arguments, num_steps=5, episodes=episodes):
        ids = batch.inputs[0][batch.segment_ids[0] > 0].tolist()
        texts = [i for i, x in enumerate(ids) if vocab.is_text(x)]
        assert len(texts) == 3 and ids[texts[2]] in [ids[texts[0]], ids[texts[1]]]
        assert all(ids[i + 1] == vocab.break_ for i in texts)
    sampled = [
        make_episodes(label_first=0.25).sample(0, np.random.default_rng(i)).label_first
        for i in range(400)
    ]
    assert 0.18 < np.mean(sampled) < 0.32


def test_without_retrieval_there_are_no_episodes(vocab):
    memory = FakeMemory(vocab, 9)
    mains = np.arange(9)

    def batches(episodes, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        made = make_batches(
            memory,
            FakeRetriever(memory),
            mains,
            vocab,
            PLAIN,
            config,
            num_steps=1,
            episodes=episodes,
        )
        return next(made)

    plain, _ = batches(None, retrieval=False)
    without_retrieval, stats = batches(make_episodes(), retrieval=False)
    assert stats["episodes"] == 0
    np.testing.assert_array_equal(plain.inputs, without_retrieval.inputs)


def test_invalid_episode_settings():
    with pytest.raises(ValueError, match=r"in 0\.\.1; got 2"):
        EpisodeConfig(2)
    with pytest.raises(ValueError, match="1 of 2000"):
        EpisodeConfig(num_ways=1)
    with pytest.raises(ValueError, match="has 1 classes by 'nation'"):
        make_episodes(classes=np.zeros(4, int))


def test_labels_are_meaningless_words():
    words = make_labels(300, np.random.default_rng(0))
    assert len(set(words)) == 300 and all(w.isalpha() and w.islower() for w in words)
    assert words == make_labels(300, np.random.default_rng(0))


def test_the_answer_may_have_a_larger_weight(vocab):
    memory = FakeMemory(vocab, 9)
    config = dataclasses.replace(CONFIG, examples_per_batch=1, rows=1)
    arguments = (memory, FakeRetriever(memory), np.array([0]), vocab, PLAIN, config)
    plain, heavy = make_episodes(), make_episodes()
    heavy.config = dataclasses.replace(heavy.config, label_weight=5.0)
    for (before, _), (after, _) in zip(
        make_batches(*arguments, num_steps=5, episodes=plain),
        make_batches(*arguments, num_steps=5, episodes=heavy),
        strict=True,
    ):
        is_answer = before.is_main & vocab.is_text(before.targets)
        assert is_answer.sum() == 1
        ratio = after.loss_weights / np.maximum(before.loss_weights, 1e-9)
        assert ratio[is_answer].tolist() == [5.0]
        assert set(ratio[~is_answer].tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="label_weight must be above 0; got 0"):
        EpisodeConfig(label_weight=0.0)
