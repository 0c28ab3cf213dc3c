"""The published rule for spans that cross `<break>`, against a reference in this file."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.sequences import causal_masking
from racm3_jax.sequences.causal_masking import CausalMaskingConfig, sample_spans
from racm3_jax.vocab import Vocab

SINGLE = CausalMaskingConfig(num_masks="single", rotation_probability=0.0)


def enumerate_spans(segments, rule):
    """Every span of one mask with its probability, token by token.

    Two tokens that are not `<break>` are sampled with replacement. `segments` gives the
    number of each token's segment, -1 for `<break>`.
    """
    places = [i for i, segment in enumerate(segments) if segment >= 0]
    found: dict[tuple[int, int], float] = {}
    for one in places:
        for two in places:
            first, last = min(one, two), max(one, two)
            covered = [s for s in segments[first : last + 1] if s >= 0]
            if rule == "start":
                chosen = covered[0]
            else:
                chosen = max(sorted(set(covered)), key=covered.count)
            kept = [i for i in range(first, last + 1) if segments[i] == chosen]
            span = (kept[0], kept[-1] + 1)
            found[span] = found.get(span, 0.0) + len(places) ** -2
    return found


def as_tokens(segments, vocab):
    image = vocab.image_range.start
    ids = [vocab.break_ if s < 0 else image if s % 2 else 0 for s in segments]
    return np.array(ids, np.int32)


@pytest.mark.parametrize(
    "segments",
    [[0] * 3 + [-1] + [1] * 6, [0, 0, -1, 1, 1, 1, -1, 2, 2, -1, 3, 3, 3]],
)
def test_spans_follow_the_reference(segments, vocab):
    expected = enumerate_spans(segments, "overlap")
    rng, n = np.random.default_rng(0), 20_000
    tokens = as_tokens(segments, vocab)
    sampled: dict[tuple[int, int], int] = {}
    for _ in range(n):
        (span,) = sample_spans(tokens, SINGLE, vocab, rng)
        sampled[span] = sampled.get(span, 0) + 1
    assert set(sampled) == set(expected)
    for span, probability in expected.items():
        deviation = np.sqrt(probability * (1 - probability) / n)
        assert abs(sampled[span] / n - probability) < 5 * deviation, span
    # The test distinguishes it from the earlier rule.
    before = enumerate_spans(segments, "start")
    assert sum(abs(before.get(s, 0) - p) for s, p in expected.items()) > 0.1


def compute_fractions(text, image):
    """(captions of all spans, suffixes of those, image spans from the first code) by rule.

    Exact: all pairs of one caption of `text` tokens and one image of `image`.
    """
    count = text + image
    first, last = np.triu_indices(count)
    weights = np.where(first == last, 1.0, 2.0) / count**2
    crossing = (first < text) & (last >= text)
    in_text, in_image = text - first, last - text + 1
    fractions = {}
    for rule, keeps_text in (("start", crossing), ("overlap", in_text >= in_image)):
        is_text = np.where(crossing, keeps_text, first < text)
        of_text = weights[is_text].sum()
        suffixes = weights[is_text & (last >= text - 1)].sum()
        from_first = weights[~is_text & (first <= text)].sum()
        fractions[rule] = (of_text, suffixes / of_text, from_first / (1 - of_text))
    return fractions


@pytest.mark.parametrize(("text", "image"), [(32, 1024), (10, 64)])
def test_the_table_has_the_figures_of_both_rules(text, image):
    fractions = compute_fractions(text, image)
    rows = {
        rule: f"    {text} and {image}, {name}"
        for rule, name in (("start", "where it starts"), ("overlap", "largest overlap"))
    }
    for rule, row in rows.items():
        (line,) = [
            line
            for line in (causal_masking.__doc__ or "").splitlines()
            if line.startswith(row)
        ]
        figures = [f"{100 * fraction:.2f}%" for fraction in fractions[rule]]
        assert line.split()[-3:] == figures


def test_sampled_spans_have_the_figures_of_the_table():
    vocab = Vocab(num_text_ids=20, num_image_codes=10, image_length=64)
    tokens = as_tokens([0] * 10 + [-1] + [1] * 64, vocab)
    rng, n = np.random.default_rng(1), 20_000
    spans = np.array(
        [sample_spans(tokens, SINGLE, vocab, rng)[0] for _ in range(n)], int
    )
    of_text = spans[:, 0] < 10
    found = (
        of_text.mean(),
        (spans[of_text, 1] == 10).mean(),
        (spans[~of_text, 0] == 11).mean(),
    )
    np.testing.assert_allclose(found, compute_fractions(10, 64)["overlap"], atol=0.05)
