"""k-shot classification: both ways of asking, passes, odd support sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from generation_standins import SIZE, VOCAB, AsciiTokenizer, grey, pair

from racm3_jax.generation.classification import neutral_image, score_labels
from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.sequences.layout import beginning_prompt, text_to_image_prompt


def tokenized(*documents):
    return list(AsciiTokenizer().tokenize(documents))


def text(characters):
    return AsciiTokenizer().encode_text(characters)


SUPPORT = [(grey(16), "dax"), (grey(200), "wug"), (grey(32), "dax"), (grey(184), "wug")]


def test_classification_compares_calibrated_means_of_the_labels(generator):
    """Each label's mean over its tokens, less that after a neutral grey image."""
    out = generator.classify(grey(48), SUPPORT, shots_per_pass=1, by="label")
    assert out.labels == ("dax", "wug") and out.num_passes == 2
    documents = [  # the order turns
        [pair("1", "dax", 1), pair("2", "wug", 12)],
        [pair("4", "wug", 11), pair("3", "dax", 2)],
    ]
    documents = [
        tokenized(*(replace(d, segments=d.segments[::-1]) for d in shown))
        for shown in documents
    ]
    neutral = AsciiTokenizer().encode_image(neutral_image(SIZE))
    answers = [np.append(text(x), VOCAB.eod) for x in out.labels]
    probabilities = []
    for shown in documents:
        means = []
        for image in (VOCAB.image_tokens(np.full(4, 3)), neutral):
            prompt = beginning_prompt(shown, np.append(image, VOCAB.break_), VOCAB)
            nats = compute_log_likelihoods(
                generator, [Scored(prompt, answer) for answer in answers]
            )
            means.append(nats / 4)  # three letters and <eod>
        calibrated = np.exp(means[0] - means[1])
        probabilities.append(calibrated / calibrated.sum())
    np.testing.assert_allclose(out.probabilities, np.mean(probabilities, 0), rtol=1e-4)
    assert out.label == out.labels[int(np.argmax(out.probabilities))]


def test_what_questions_share_is_read_once(generator, monkeypatch):
    """The labels after the neutral image are the same for all images of a batch."""
    read = []

    def score(engine, sequences, num_rows):
        read.extend(sequences)
        return [np.ones(len(sequence.targets)) for sequence in sequences]

    monkeypatch.setattr("racm3_jax.generation.likelihood.score_tokens", score)
    found = generator.classify_batch([grey(48), grey(160)], SUPPORT, by="label")
    assert len(read) == 2 * 3 and len(found) == 2
    np.testing.assert_allclose(found[0].probabilities, 0.5)


def test_a_label_is_not_favoured_for_its_length_or_for_being_liked():
    """Both labels gain two nats a token by the image: neither is preferred."""
    prior = np.array([-3.0, -40.0])
    gained = prior + [2.0 * 1, 2.0 * 5]
    np.testing.assert_allclose(score_labels(gained, prior, [1, 5]), [2.0, 2.0])


def test_classification_by_the_images_likelihood_after_each_label(generator):
    """A label's own examples come before it, not those of the other one."""
    out = generator.classify(grey(48), SUPPORT[:3], shots_per_pass=1)
    assert out.num_passes == 2
    asked = np.append(VOCAB.image_tokens(np.full(4, 3)), np.int32(VOCAB.eod))
    dax, wug = [pair("1", "dax", 1), pair("3", "dax", 2)], pair("2", "wug", 12)
    prompts = [
        text_to_image_prompt(tokenized(shown), text(label), VOCAB)
        for shown, label in ((dax[0], "dax"), (wug, "wug"), (dax[1], "dax"))
    ]
    scores = np.exp(
        compute_log_likelihoods(generator, [Scored(p, asked) for p in prompts])
    )
    passes = [scores[[0, 1]], scores[[2, 1]]]  # the only "wug" is shown twice
    expected = np.mean([x / x.sum() for x in passes], axis=0)
    np.testing.assert_allclose(out.probabilities, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="by is 'clip'; allowed: 'label', 'image'"):
        generator.classify(grey(48), SUPPORT, by="clip")


def test_classification_reads_what_fits_and_ensembles_the_rest(generator):
    many = SUPPORT * 4  # 8 shots of 2 documents of 9 tokens; 6 of them fit into 128
    both = generator.classify_batch([grey(48), grey(160)], many, by="label")
    assert both[0].num_passes == 2
    assert generator.classify(grey(48), many).num_passes == 1  # of a label's own
    alone = generator.classify(grey(160), many, by="label")
    np.testing.assert_allclose(alone.probabilities, both[1].probabilities, rtol=1e-4)
    none = generator.classify(grey(48), [], ["dax", "wug"])
    np.testing.assert_allclose(none.probabilities.sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("support", "labels", "message"),
    [
        (SUPPORT, ["dax", "cat"], "has the label 'wug', which is not among the labels"),
        (SUPPORT[:1], None, r"at least two labels .* got \['dax'\]"),
        ([], None, r"at least two labels .* got \[\]"),
        (
            SUPPORT,
            ["dax", "wug", "x" * 200],
            "one shot does not fit: its examples and the image are",
        ),
    ],
)
def test_support_sets_that_cannot_be_are_refused(generator, support, labels, message):
    with pytest.raises(ValueError, match=message):
        generator.classify(grey(0), support, labels)
