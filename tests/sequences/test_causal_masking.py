"""Diagrams and properties of the CM3 objective."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from racm3_jax.sequences import layout
from racm3_jax.sequences.causal_masking import (
    CausalMaskingConfig,
    ExampleTooLong,
    apply_masks,
    build_example,
    sample_num_masks,
    sample_spans,
    unmask,
)
from racm3_jax.vocab import Vocab

PLAIN = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)
ROTATED = CausalMaskingConfig(num_masks="none", rotation_probability=1.0)
LONG = 10_000


def build(
    main, retrieved, config, vocab, *, max_length=LONG, seed=0, alpha=0.1, ranks=None
):
    return build_example(
        main,
        retrieved,
        config,
        vocab,
        alpha=alpha,
        max_length=max_length,
        rng=np.random.default_rng(seed),
        ranks=ranks,
    )


def body_and_moved(tokens, vocab):
    last = int(np.flatnonzero(tokens == vocab.eod)[-1]) + 1
    return tokens[:last], tokens[last:]


def moved_spans(tokens, vocab):
    """The contents of the moved spans, in order, without sentinel and `<eoss>`."""
    _, moved = body_and_moved(tokens, vocab)
    pieces = np.split(moved, np.flatnonzero(moved == vocab.eoss) + 1)
    return [piece[1:-1] for piece in pieces if len(piece)]


def test_diagram_of_apply_masks(vocab, parse):
    tokens = parse("<eod> t1 t2 t3 <break> i1 i2 <eod>")
    masked = apply_masks(tokens, [(2, 3), (5, 6)], vocab)
    assert vocab.to_text(masked) == (
        "<eod> t1 <mask:0> t3 <break> <mask:1> i2 <eod> "
        "<mask:0> t2 <eoss> <mask:1> i1 <eoss>"
    )
    masked = apply_masks(tokens, [(2, 3)], vocab)
    assert vocab.to_text(masked) == (
        "<eod> t1 <mask:0> t3 <break> i1 i2 <eod> <mask:0> t2 <eoss>"
    )
    rotated = apply_masks(tokens, [(1, 4)], vocab)
    assert vocab.to_text(rotated) == (
        "<eod> <mask:0> <break> i1 i2 <eod> <mask:0> t1 t2 t3 <eoss>"
    )


def test_diagram_of_unmask(vocab, parse):
    masked = parse("<eod> t1 <mask:0> t3 <eod> <mask:0> t2 <eoss>")
    assert vocab.to_text(unmask(masked, vocab)) == "<eod> t1 t2 t3 <eod>"


def test_unmask_puts_back_an_empty_span(vocab, parse):
    masked = parse("<eod> t1 <mask:0> <eod> <mask:0> <eoss>")
    assert vocab.to_text(unmask(masked, vocab)) == "<eod> t1 <eod>"


def test_diagram_of_build_example(vocab, make_document):
    example = build(
        make_document("t1", "i1 i1"), [make_document("t2", "i2 i2")], ROTATED, vocab
    )
    assert vocab.to_text(example.tokens) == (
        "<eod> t2 <break> i2 i2 <eod> <mask:0> <break> i1 i1 <eod> <mask:0> t1 <eoss>"
    )
    a = np.float32(0.1)
    expected = [0, a, a, a, a, a, 0, 1, 1, 1, 1, 0, 1, 1]
    np.testing.assert_array_equal(example.weights, np.array(expected, np.float32))
    np.testing.assert_array_equal(example.is_main, np.arange(14) >= 6)
    assert example.tokens.dtype == np.int32
    assert example.weights.dtype == np.float32
    assert example.is_main.dtype == bool


def test_cuts_are_the_images_of_retrieved_documents_least_relevant_first(
    vocab, make_document
):
    retrieved = [
        make_document("t1", "i1 i2"),
        make_document("t2", "i3 i4", "t3 t3", "i5 i6"),
    ]
    main = make_document("t4", "i7 i8")

    def trimmable_images(ranks=None):
        example = build(main, retrieved, ROTATED, vocab, ranks=ranks)
        return [vocab.to_text(example.tokens[a:b]) for a, b in example.cuts]

    assert trimmable_images() == ["i5 i6", "i3 i4", "i1 i2"]
    assert trimmable_images([1, 0]) == ["i1 i2", "i5 i6", "i3 i4"]
    assert build(main, [], ROTATED, vocab).cuts.shape == (0, 2)


def test_no_cut_touches_moved_spans(vocab, sample_document):
    rng = np.random.default_rng(3)
    masking = CausalMaskingConfig(mean=2.0, max_masks=4, mask_retrieved=True)
    num_cuts = 0
    for seed in range(300):
        documents = [sample_document(rng) for _ in range(4)]
        example = build(documents[0], documents[1:], masking, vocab, seed=seed)
        last_eod = np.flatnonzero(example.tokens == vocab.eod)[-1]
        for start, end in example.cuts:
            assert vocab.is_image(example.tokens[start:end]).all()
            assert not example.is_main[start:end].any()
            assert end < last_eod
            assert example.tokens[end] in (vocab.eod, vocab.break_)
            num_cuts += 1
    assert num_cuts > 100


def test_diagram_of_a_plain_example(vocab, make_document):
    example = build(make_document("t1", "i1 i1"), [], PLAIN, vocab)
    assert vocab.to_text(example.tokens) == "<eod> t1 <break> i1 i1 <eod>"
    np.testing.assert_array_equal(example.weights, [0, 1, 1, 1, 1, 1])


def test_unmask_inverts_mask_on_10000_random_documents(vocab, sample_document):
    rng = np.random.default_rng(0)
    config = CausalMaskingConfig(mean=2.0, rotation_probability=0.2, max_masks=8)
    num_masked = num_interleaved = 0
    for _ in range(10_000):
        document = sample_document(rng)
        tokens = layout.document_tokens(document, vocab)
        row = layout.join([], tokens, vocab)
        spans = [(i + 1, j + 1) for i, j in sample_spans(tokens, config, vocab, rng)]
        masked = apply_masks(row, spans, vocab)
        assert len(masked) == len(row) + 3 * len(spans)
        np.testing.assert_array_equal(unmask(masked, vocab), row)
        num_masked += bool(spans)
        num_interleaved += sum(s.modality == "image" for s in document.segments) > 1
    assert num_masked > 8_000
    assert num_interleaved > 3_000


@pytest.mark.parametrize("mask_retrieved", [False, True])
def test_unmasked_examples_are_the_plain_documents(
    vocab, sample_document, mask_retrieved
):
    config = CausalMaskingConfig(mean=3.0, mask_retrieved=mask_retrieved)
    rng = np.random.default_rng(1)
    for seed in range(500):
        main, *retrieved = (sample_document(rng) for _ in range(rng.integers(1, 4)))
        plain = layout.join(retrieved, layout.document_tokens(main, vocab), vocab)
        example = build(main, retrieved, config, vocab, seed=seed)
        np.testing.assert_array_equal(unmask(example.tokens, vocab), plain)
        unmasked = build(main, retrieved, PLAIN, vocab, seed=seed)
        np.testing.assert_array_equal(unmasked.tokens, plain)


def test_spans_are_disjoint_and_stay_within_segments(vocab, sample_document):
    rng = np.random.default_rng(2)
    config = CausalMaskingConfig(num_masks="fixed", mean=4, rotation_probability=0.1)
    for _ in range(2_000):
        tokens = layout.document_tokens(sample_document(rng), vocab)
        spans = sample_spans(tokens, config, vocab, rng)
        assert len(spans) <= 4
        end_before = 0
        for start, end in spans:
            assert end_before <= start < end <= len(tokens)
            assert not vocab.is_control(tokens[start:end]).any()
            end_before = end


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_fraction_of_rotated_captions_matches_the_configuration(
    vocab, make_document, probability
):
    caption = " ".join(f"t{i % 20}" for i in range(32))
    config = CausalMaskingConfig(num_masks="none", rotation_probability=probability)
    tokens = layout.document_tokens(make_document(caption, "i1 i2"), vocab)
    rng = np.random.default_rng(3)
    n = 10_000
    rotated = sum(
        sample_spans(tokens, config, vocab, rng) == [(0, 32)] for _ in range(n)
    )
    # Four standard deviations of a binomial fraction.
    assert abs(rotated / n - probability) <= 4 * np.sqrt(0.25 / n) * (
        0 < probability < 1
    )


def test_clipped_spans_rarely_rotate_a_caption(parse):
    """Why rotation exists: 32 tokens of text next to 1024 of image."""
    vocab = Vocab(num_text_ids=20, num_image_codes=10, image_length=1024)
    image = np.full(1024, vocab.image_range.start)
    tokens = np.concatenate([np.zeros(32), [vocab.break_], image]).astype(np.int32)
    config = CausalMaskingConfig(rotation_probability=0.0)
    rng = np.random.default_rng(4)
    hits = sum(
        (0, 32) in sample_spans(tokens, config, vocab, rng) for _ in range(10_000)
    )
    assert hits < 10


def test_rotation_samples_the_modality(vocab, make_document):
    rng = np.random.default_rng(5)
    tokens = layout.document_tokens(make_document("t1 t2 t3", "i1 i2", "t4"), vocab)
    images = CausalMaskingConfig(rotation_probability=1.0, rotation_text_share=0.0)
    assert sample_spans(tokens, images, vocab, rng) == [(4, 6)]
    sampled = {tuple(sample_spans(tokens, ROTATED, vocab, rng)) for _ in range(50)}
    assert sampled == {((0, 3),), ((7, 8),)}
    only_text = layout.document_tokens(make_document("t1 t2"), vocab)
    assert sample_spans(only_text, images, vocab, rng) == [(0, 2)]
    only_image = layout.document_tokens(make_document("", "i1 i2"), vocab)
    assert sample_spans(only_image, ROTATED, vocab, rng) == [(1, 3)]


@pytest.mark.parametrize(
    ("num_masks", "mean", "expected"),
    [
        ("poisson_clamp1", 1.0, {0: 0.0, 1: 2 / np.e, 2: 0.5 / np.e}),
        ("poisson_clamp0", 1.0, {0: 1 / np.e, 1: 1 / np.e, 2: 0.5 / np.e}),
        ("fixed", 3, {3: 1.0}),
        ("single", 7.0, {1: 1.0}),
        ("none", 7.0, {0: 1.0}),
    ],
)
def test_distribution_of_the_number_of_masks(num_masks, mean, expected):
    config = CausalMaskingConfig(num_masks=num_masks, mean=mean)
    rng = np.random.default_rng(6)
    sampled = np.array([sample_num_masks(config, rng) for _ in range(10_000)])
    for number, probability in expected.items():
        assert abs((sampled == number).mean() - probability) < 0.02
    assert sampled.max() <= config.max_masks


def test_number_of_masks_is_clamped_from_above():
    config = CausalMaskingConfig(mean=100.0, max_masks=5)
    assert sample_num_masks(config, np.random.default_rng(0)) == 5


def test_sentinels_and_first_token_have_no_weight(vocab, sample_document):
    rng = np.random.default_rng(7)
    config = CausalMaskingConfig(mean=3.0, mask_retrieved=True)
    for seed in range(300):
        main, *retrieved = (sample_document(rng) for _ in range(3))
        example = build(main, retrieved, config, vocab, seed=seed)
        expected = np.where(example.is_main, np.float32(1), np.float32(0.1))
        expected[vocab.is_sentinel(example.tokens)] = 0
        expected[0] = 0
        np.testing.assert_array_equal(example.weights, expected)


def test_sentinel_weight_is_configurable(vocab, make_document):
    config = CausalMaskingConfig(rotation_probability=1.0, sentinel_weight=0.5)
    example = build(make_document("t1", "i1 i1"), [], config, vocab)
    np.testing.assert_array_equal(example.weights, [0, 0.5, 1, 1, 1, 1, 0.5, 1, 1])


@pytest.mark.parametrize("mask_retrieved", [False, True])
def test_masks_of_the_main_document_do_not_depend_on_retrieved_documents(
    vocab, sample_document, mask_retrieved
):
    rng = np.random.default_rng(8)
    config = CausalMaskingConfig(mean=2.0, mask_retrieved=mask_retrieved)
    for seed in range(200):
        main, *retrieved = (sample_document(rng) for _ in range(3))
        alone = build(main, [], config, vocab, seed=seed)
        with_documents = build(main, retrieved, config, vocab, seed=seed)
        np.testing.assert_array_equal(
            alone.tokens[1:],
            with_documents.tokens[len(with_documents.tokens) - len(alone.tokens) + 1 :],
        )


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_fraction_of_the_retrieved_documents_has_spans(
    vocab, sample_document, share, expected
):
    """A user's prompt reads whole documents: training must show some."""
    config = CausalMaskingConfig(mask_retrieved=True, retrieved_probability=share)
    rng, masked = np.random.default_rng(10), []
    for seed in range(400):
        main, retrieved = sample_document(rng), sample_document(rng)
        example = build(main, [retrieved], config, vocab, seed=seed)
        shown = example.tokens[~example.is_main]
        masked.append(vocab.is_sentinel(shown).any())
        alone = build(main, [], config, vocab, seed=seed)
        after = len(example.tokens) - len(alone.tokens) + 1
        np.testing.assert_array_equal(alone.tokens[1:], example.tokens[after:])
    assert abs(np.mean(masked) - expected) < 0.06


def test_spans_of_retrieved_documents_are_at_their_own_ends(vocab, sample_document):
    """The main document is predicted from whole documents."""
    config = CausalMaskingConfig(mean=3.0, max_masks=4, mask_retrieved=True)
    rng, counts = np.random.default_rng(9), set()
    for seed in range(200):
        main, *retrieved = (sample_document(rng) for _ in range(3))
        example = build(main, retrieved, config, vocab, seed=seed)
        start = int(example.is_main.argmax())
        assert example.is_main[start:].all() and not example.is_main[:start].any()
        empty = np.zeros(0, np.int32)
        plain = layout.join(retrieved, empty, vocab)[:-1]  # without an empty main one
        shown = example.tokens[:start]
        np.testing.assert_array_equal(unmask(shown, vocab), plain)
        # Each document has its own numbers.
        for part in np.split(shown, np.flatnonzero(shown == vocab.eod) + 1)[1:]:
            moved = part[vocab.is_sentinel(part)][: (part == vocab.eoss).sum()]
            expected = [vocab.sentinel(i) for i in range(len(moved))]
            assert moved.tolist() == expected
            counts.add(len(moved))
    assert counts == {0, 1, 2, 3, 4}


def test_diagram_of_a_masked_retrieved_document(vocab, make_document):
    main, shown = make_document("t1", "i1 i2"), make_document("t2", "i3 i4")
    config = CausalMaskingConfig(
        "single", rotation_probability=1.0, mask_retrieved=True
    )
    found = set()
    for seed in range(60):
        example = build(main, [shown], config, vocab, seed=seed)
        text = vocab.to_text(example.tokens)
        rest = " <mask:0> <break> i1 i2 <eod> <mask:0> t1 <eoss>"
        assert text.endswith(rest)
        found.add(text.removesuffix(rest))
    assert found == {
        "<eod> <mask:0> <break> i3 i4 <eod> <mask:0> t2 <eoss>",
        "<eod> t2 <break> <mask:0> i4 <eod> <mask:0> i3 <eoss>",
        "<eod> t2 <break> i3 <mask:0> <eod> <mask:0> i4 <eoss>",
        "<eod> t2 <break> <mask:0> <eod> <mask:0> i3 i4 <eoss>",
    }


def test_overflow_drops_whole_retrieved_documents_that_do_not_fit(vocab, make_document):
    main = make_document("t1", "i1 i1")
    first, second = make_document("t2", "i2 i2"), make_document("t3", "i3 i3")
    long = make_document("t4 t4 t4 t4 t4 t4", "i4 i4")
    rest = "t1 <break> i1 i1 <eod>"
    kept = build(main, [first, second], PLAIN, vocab, max_length=11)
    assert vocab.to_text(kept.tokens) == f"<eod> t2 <break> i2 i2 <eod> {rest}"
    kept = build(main, [long, second], PLAIN, vocab, max_length=11)
    assert vocab.to_text(kept.tokens) == f"<eod> t3 <break> i3 i3 <eod> {rest}"
    kept = build(main, [first, second], PLAIN, vocab, max_length=10)
    assert vocab.to_text(kept.tokens) == f"<eod> {rest}"


def test_diagram_of_trimming_the_main_document(vocab, make_document):
    """Sentinel and moved span are kept; the beginning of the document is trimmed."""
    main = make_document("i1 i1", "t1 t2 t3", "i2 i2")
    tokens = layout.document_tokens(main, vocab)
    seed = next(
        seed
        for seed in range(100)
        if sample_spans(tokens, ROTATED, vocab, np.random.default_rng(seed)) == [(3, 6)]
    )
    whole = "<mask:0> <break> i2 i2 <eod> <mask:0> t1 t2 t3 <eoss>"
    full = build(main, [], ROTATED, vocab, seed=seed)
    assert vocab.to_text(full.tokens) == f"<eod> i1 i1 <break> {whole}"
    # One token too long: the whole image is dropped, not half of it.
    cut = build(main, [], ROTATED, vocab, seed=seed, max_length=13)
    assert vocab.to_text(cut.tokens) == f"<eod> <break> {whole}"
    cut = build(main, [], ROTATED, vocab, seed=seed, max_length=11)
    assert vocab.to_text(cut.tokens) == f"<eod> {whole}"
    with pytest.raises(ExampleTooLong, match="longer than a row"):
        build(main, [], ROTATED, vocab, seed=seed, max_length=7)


def test_overflow_never_touches_moved_spans(vocab, sample_document):
    rng = np.random.default_rng(10)
    config = CausalMaskingConfig(mean=2.0)
    num_trimmed = num_refused = 0
    for seed in range(1_000):
        main, *retrieved = (sample_document(rng) for _ in range(3))
        full = build(main, [], config, vocab, seed=seed)
        max_length = int(rng.integers(8, 50))
        try:
            cut = build(
                main, retrieved, config, vocab, seed=seed, max_length=max_length
            )
        except ExampleTooLong:
            num_refused += 1
            _, moved = body_and_moved(full.tokens, vocab)
            num_sentinels = len(moved_spans(full.tokens, vocab))
            assert len(moved) + num_sentinels + 2 > max_length
            continue
        assert len(cut.tokens) <= max_length
        assert len(cut.tokens) == len(cut.weights) == len(cut.is_main)
        body, moved = body_and_moved(full.tokens, vocab)
        cut_body, cut_moved = body_and_moved(cut.tokens, vocab)
        np.testing.assert_array_equal(cut_moved, moved)
        # The main document keeps its sentinels and the end of the rest.
        cut_main = cut_body[cut.is_main[: len(cut_body)]]
        full_main = body[full.is_main[: len(body)]]
        for keep in (vocab.is_sentinel, lambda x: ~vocab.is_sentinel(x)):
            left, had = cut_main[keep(cut_main)], full_main[keep(full_main)]
            np.testing.assert_array_equal(left, had[len(had) - len(left) :])
        assert vocab.is_sentinel(cut_main).sum() == vocab.is_sentinel(full_main).sum()
        assert cut.tokens[0] == vocab.eod
        num_trimmed += len(cut_main) < len(full_main)
    assert num_trimmed > 100
    assert num_refused > 10


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 1)], "empty"),
        ([(1, 3), (2, 4)], "overlap"),
        ([(2, 4), (1, 2)], "ascend"),
        ([(1, 99)], "within"),
        ([(3, 6)], "control"),
        ([(0, 2)], "control"),
    ],
)
def test_apply_masks_refuses_wrong_spans(vocab, parse, spans, message):
    tokens = parse("<eod> t1 t2 t3 <break> i1 i2 <eod>")
    with pytest.raises(ValueError, match=message):
        apply_masks(tokens, spans, vocab)


@pytest.mark.parametrize(
    ("diagram", "message"),
    [
        ("t1 t2", "<eod>"),
        ("<eod> t1 <mask:0> <eod>", "no moved span"),
        ("<eod> t1 <eod> <mask:0> t2 <eoss>", "without a place"),
        ("<eod> <mask:0> <eod> <mask:0> t2", "no <eoss>"),
        ("<eod> <mask:0> <eod> t2 <eoss>", "its own sentinel"),
        ("<eod> <mask:0> <eod> <eoss>", "its own sentinel"),
        ("<eod> <mask:0> <eod> <mask:0> t1 <eoss> <mask:0> <eoss>", "its own"),
        ("<eod> <mask:0> <mask:0> <eod> <mask:0> t1 <eoss>", "no moved span"),
    ],
)
def test_unmask_refuses_malformed_sequences(vocab, parse, diagram, message):
    with pytest.raises(ValueError, match=message):
        unmask(parse(diagram), vocab)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_masks": "poison"}, "poisson_clamp1"),
        ({"num_masks": "fixed", "mean": 1.5}, "whole"),
        ({"mean": -1.0}, ">= 0"),
        ({"max_masks": 0}, "max_masks"),
        ({"rotation_probability": 1.5}, "rotation_probability"),
        ({"rotation_text_share": -0.1}, "rotation_text_share"),
    ],
)
def test_configuration_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalMaskingConfig(**settings)


def test_more_masks_than_sentinels_are_refused(vocab, make_document):
    config = CausalMaskingConfig(max_masks=17)
    with pytest.raises(ValueError, match="16 sentinels"):
        build(make_document("t1"), [], config, vocab)


def test_text_of_the_main_document_may_weigh_more(vocab, make_document, parse):
    plain = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)
    heavy = dataclasses.replace(plain, text_weight=5.0)
    main, shown = make_document("t1 t2", "i1 i2"), make_document("t3", "i3 i4")

    def reweight(config):
        rng = np.random.default_rng(0)
        return build_example(
            main, [shown], config, vocab, alpha=0.5, max_length=40, rng=rng
        )

    example = reweight(heavy)
    diagram = "<eod> t3 <break> i3 i4 <eod> t1 t2 <break> i1 i2 <eod>"
    np.testing.assert_array_equal(example.tokens, parse(diagram))
    expected = [0, 0.5, 0.5, 0.5, 0.5, 0.5, 5, 5, 1, 1, 1, 1]
    np.testing.assert_array_equal(example.weights, np.float32(expected))
    ratio = example.weights / np.maximum(reweight(plain).weights, 1e-9)
    assert set(ratio.tolist()) == {0.0, 1.0, 5.0}
    with pytest.raises(ValueError, match="text_weight must be above 0; got 0"):
        CausalMaskingConfig(text_weight=0.0)
