import functools

import jax
import numpy as np
import pytest
from evaluation_fakes import VOCAB, caption, make_generator, make_memory, picture

from racm3_jax.evaluation.kshot import (
    Episode,
    classify_episodes,
    compute_accuracy,
    compute_auc,
    copy_nearest,
    mislead,
    sample_episodes,
)
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.model.transformer import Transformer, head_weights
from racm3_jax.types import Document, Segment


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    opened = make_memory(tmp_path_factory.mktemp("memory") / "memory")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def documents():
    return [
        Document(f"d{i}", (Segment(text=caption(i)), Segment(image=picture(500 + i))))
        for i in range(5)
    ]


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(config, params, row, segments):
    positions = jax.numpy.arange(row.shape[1])[None]
    hidden = Transformer(config).apply({"params": params}, row, positions, segments)
    return jax.nn.log_softmax(hidden[0] @ head_weights(params, config))


def plain_nats(generator, context, targets):
    """Every target alone, from the full logits of the rows before it."""
    tokens = np.concatenate([context, targets])
    row, segments = np.zeros((2, 1, max(128, len(tokens) - 1)), np.int32)
    row[0, : len(tokens) - 1], segments[0, : len(tokens) - 1] = tokens[:-1], 1
    log_probs = np.asarray(
        log_softmax(generator.model.config, generator.params, row, segments)
    )
    places = np.arange(len(context) - 1, len(tokens) - 1)
    return -log_probs[places, tokens[1:][places]]


@pytest.mark.parametrize(
    ("num_rows", "max_length", "lengths"),
    [
        (3, 192, ((3, 5), (0, 9), (70, 2), (1, 1))),
        # Not all chunks have targets; the last one begins inside the one before.
        (2, 150, ((70, 60), (100, 45))),
    ],
)
def test_scores_are_those_of_each_sequence_alone(num_rows, max_length, lengths):
    generator = make_generator(max_length=max_length)
    rng = np.random.default_rng(0)
    sequences = [
        Scored(
            np.r_[VOCAB.eod, rng.integers(0, 128, a)].astype(np.int32),
            rng.integers(0, 128, b).astype(np.int32),
        )
        for a, b in lengths
    ]
    found = score_tokens(generator, sequences, num_rows=num_rows)
    for sequence, nats in zip(sequences, found, strict=True):
        wanted = plain_nats(generator, *sequence)
        np.testing.assert_allclose(nats, wanted, rtol=2e-3, atol=2e-3)


def test_sequences_that_cannot_be_scored_are_refused():
    generator = make_generator()
    ids = np.ones(200, np.int32)
    with pytest.raises(ValueError, match="no context"):
        score_tokens(generator, [Scored(ids[:0], ids[:3])])
    with pytest.raises(ValueError, match="200 positions"):
        score_tokens(generator, [Scored(ids[:1], ids)])


def test_perplexity_counts_each_modality_and_bits_per_image(documents):
    generator = make_generator()
    found = compute_likelihoods(generator, documents, num_retrieved=0)
    sums, figures = found.sums, found.means()
    assert sums.text_tokens.tolist() == [len(caption(i)) for i in range(5)]
    assert sums.image_tokens.tolist() == [4] * 5 and sums.images.tolist() == [1] * 5
    (main,) = generator.tokenizer.tokenize(documents[:1])
    text, image = (s.tokens for s in main.segments)
    whole = np.r_[text, VOCAB.break_, image]
    nats = plain_nats(generator, np.array([VOCAB.eod]), whole)
    np.testing.assert_allclose(sums.text_nats[0], nats[: len(text)].sum(), rtol=2e-3)
    np.testing.assert_allclose(sums.image_nats[0], nats[-4:].sum(), rtol=2e-3)
    bits = sums.image_nats.sum() / np.log(2) / 5
    assert figures["bits_per_image"] == pytest.approx(bits)
    assert figures["image_perplexity"] == pytest.approx(2 ** (bits / 4))
    assert found.num_retrieved == 0
    texts = [Document("t", (Segment(text="only text"),))]
    alone = compute_likelihoods(generator, texts, num_retrieved=0).means()
    assert set(alone) == {"text_perplexity"}


def test_retrieved_documents_stand_before_and_change_the_figures(documents, memory):
    generator = make_generator(memory)
    with_two = compute_likelihoods(generator, documents, num_retrieved=2)
    without = compute_likelihoods(generator, documents, num_retrieved=0)
    assert with_two.num_retrieved == 2
    assert with_two.means()["text_perplexity"] != without.means()["text_perplexity"]
    with pytest.raises(ValueError, match="has no memory"):
        compute_likelihoods(make_generator(), documents, num_retrieved=1)


def test_episodes_never_show_what_they_ask():
    classes = [f"c{i % 3}" for i in range(12)]
    episodes = sample_episodes(classes, num_episodes=20, num_shots=2, num_ways=2)
    for episode in episodes:
        shown = [row for rows in episode.shown for row in rows]
        assert episode.asked not in shown and len(set(shown)) == 4
        right = episode.shown[episode.answer]
        assert {classes[row] for row in (*right, episode.asked)} == {
            classes[episode.asked]
        }
        assert len(set(episode.words)) == 2
    again = sample_episodes(classes, num_episodes=5, num_shots=2, num_ways=2)
    assert again == episodes[:5]
    assert {e.answer for e in episodes} == {0, 1}
    with pytest.raises(ValueError, match="got 0 classes"):
        sample_episodes(classes, num_episodes=1, num_shots=4)


def test_misleading_shows_other_classes_and_asks_the_same():
    classes = [f"c{i % 5}" for i in range(30)]
    episodes = sample_episodes(classes, num_episodes=9, num_shots=2)
    misled = mislead(episodes, classes)
    for episode, other in zip(episodes, misled, strict=True):
        assert (other.asked, other.words) == (episode.asked, episode.words)
        shown = [row for rows in other.shown for row in rows]
        assert len(set(shown)) == 4
        named = {classes[row] for rows in episode.shown for row in rows}
        assert not named & {classes[row] for row in shown}
    with pytest.raises(ValueError, match="other classes are needed"):
        mislead(episodes, ["c0", "c1"] * 15)


def test_copying_takes_the_label_of_the_most_alike():
    embeddings = dict(enumerate(np.eye(4)))
    embeddings[3] = np.array([0.1, 0.9, 0, 0])
    episodes = [Episode(((0, 2), (1,)), 3, 1, ("dax", "wug"))]
    assert copy_nearest(embeddings, episodes) == [1]


def test_classification_compares_the_calibrated_means_of_labels(monkeypatch):
    generator = make_generator()
    images = [picture(i) for i in range(8)]
    episodes = sample_episodes(["a", "b"] * 4, num_episodes=4, num_shots=1)
    seen = []

    def score(engine, sequences, num_rows):
        """The second label is liked everywhere; the image speaks for the answer."""
        seen.extend(sequences)
        nats = []
        for gain in (0.5, 0.0):  # after the image, after the neutral one
            for episode in episodes:
                gained = [gain * (label == episode.answer) for label in (0, 1)]
                nats += [9.0 - gained[0], 1.0 - gained[1]]
        return [
            np.full(len(sequence.targets), x)
            for sequence, x in zip(sequences, nats, strict=True)
        ]

    found = classify_episodes(generator, images, episodes)
    assert found.shape == (4, 2)
    np.testing.assert_allclose(found.sum(-1), 1.0)
    monkeypatch.setattr("racm3_jax.generation.likelihood.score_tokens", score)
    found = classify_episodes(generator, images, episodes)
    assert compute_accuracy(episodes, found.argmax(-1).tolist()).value == 1.0
    np.testing.assert_allclose(found.max(-1), 1 / (1 + np.exp(-0.5)))
    for sequence in (*seen[:2], *seen[8:10]):
        words = bytes(sequence.context[VOCAB.is_text(sequence.context)].tolist())
        assert all(word.encode() in words for word in episodes[0].words)
        assert sequence.targets[-1] == VOCAB.eod
    image, neutral = seen[0].context[-5:-1], seen[8].context[-5:-1]
    np.testing.assert_array_equal(seen[0].context[:-5], seen[8].context[:-5])
    assert len(set(neutral.tolist())) == 1 and image.tolist() != neutral.tolist()


def test_the_area_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 5, (30, 3)) / 4
    answers = rng.integers(0, 3, 30).tolist()
    right = [p[a] for p, a in zip(probabilities, answers, strict=True)]
    wrong = [
        p[j]
        for p, a in zip(probabilities, answers, strict=True)
        for j in range(3)
        if j != a
    ]
    wins = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    assert compute_auc(probabilities, answers) == pytest.approx(np.mean(wins))
    assert compute_auc(np.array([[0.9, 0.1], [0.2, 0.8]]), [0, 1]) == 1.0
    # A model that likes the first label always is at chance.
    assert compute_auc(np.array([[0.9, 0.1], [0.9, 0.1]]), [0, 1]) == 0.5
    with pytest.raises(ValueError, match="at least two labels; got .* shape"):
        compute_auc(np.zeros((3, 1)), [0, 0, 0])
