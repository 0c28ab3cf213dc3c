"""Infilling, editing, controlled and free generation, guidance."""

from __future__ import annotations

import numpy as np
import pytest
from generation_standins import (
    SIZE,
    VOCAB,
    AsciiTokenizer,
    FirstDocuments,
    MeanEmbedder,
    grey,
    make_generator,
    pair,
)

from racm3_jax.generation import sample as sample_module
from racm3_jax.model.config import tiny, tiny_chameleon
from racm3_jax.retrieval.alignment import Alignment
from racm3_jax.sequences.layout import (
    beginning_prompt,
    infill_prompt,
    retrieved_prefix,
    text_to_image_prompt,
)
from racm3_jax.types import Segment

RIGHT = (SIZE // 2, 0, SIZE, SIZE)  # codes 1 and 3 of the four


def codes_of(image):
    return AsciiTokenizer().encode(image[None])[0]


def quadrants(*codes):
    return AsciiTokenizer().decode_codes(np.array([codes]))[0]


def tokenized(*documents):
    return list(AsciiTokenizer().tokenize(documents))


def text(characters):
    return AsciiTokenizer().encode_text(characters)


@pytest.mark.parametrize("max_spans", [1, 2])
def test_infill_fills_the_region_and_keeps_the_rest(generator, quick, max_spans):
    image = quadrants(3, 5, 7, 9)
    documents = tokenized(pair("x", "cd", 3))
    out = generator.infill(
        image, RIGHT, "ab", 4, documents=documents, max_spans=max_spans, seed=5
    )
    tokens = np.concatenate(
        [text("ab"), [VOCAB.break_], VOCAB.image_tokens(np.array([3, 5, 7, 9]))]
    )
    spans = [(4, 7)] if max_spans == 1 else [(4, 5), (6, 7)]
    assert quick == [infill_prompt(documents, tokens, spans, VOCAB).tolist()]
    for filled in out.images:
        assert codes_of(filled)[[0, 2]].tolist() == [3, 7]
    assert len({codes_of(x)[[1, 3]].tobytes() for x in out.images}) > 1
    assert out.texts[0] == "ab" and out.documents[0].metadata["codes_generated"] == 2


def test_infill_in_place_continues_where_the_region_begins(generator, quick):
    image = quadrants(3, 5, 7, 9)
    documents = tokenized(pair("x", "cd", 3))
    out = generator.infill(
        image, RIGHT, "ab", 4, documents=documents, region_prompt="in_place", seed=5
    )
    known = np.concatenate(
        [text("ab"), [VOCAB.break_], VOCAB.image_tokens(np.array([3]))]
    )
    assert quick == [beginning_prompt(documents, known, VOCAB).tolist()]
    for filled in out.images:
        assert codes_of(filled)[[0, 2]].tolist() == [3, 7]
    assert len({codes_of(x)[[1, 3]].tobytes() for x in out.images}) > 1
    with pytest.raises(ValueError, match="region_prompt is 'after'; allowed: 'masked"):
        generator.infill(image, RIGHT, "ab", region_prompt="after")
    with pytest.raises(
        ValueError, match="max_spans is 3, but region_prompt='in_place'"
    ):
        generator.infill(image, RIGHT, "ab", max_spans=3, region_prompt="in_place")


def test_a_region_without_a_prompt_is_guided_only_by_its_documents(generator):
    image, documents = grey(32), [pair("x", "cd", 3)]
    with pytest.raises(ValueError, match="guide_documents=True"):
        generator.edit(image, RIGHT, documents, guidance=2.0)
    out = generator.edit(image, RIGHT, documents, guidance=2.0, guide_documents=True)
    assert len(out.images) == 1


def test_the_query_of_an_infill_without_a_prompt_is_the_rest(quick):
    queries = []

    class Listening(MeanEmbedder):
        def embed_images(self, images):
            queries.append(np.array(images))
            return super().embed_images(images)

    other = make_generator(embedder=Listening())
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, SIZE // 2 :] = True
    out = other.infill(quadrants(2, 15, 4, 15), mask, num_samples=2)
    assert codes_of(queries[0][0]).tolist() == [2, 3, 4, 3]  # the mean of the rest
    assert out.documents[0].text == ""
    assert (out.scores < 0).all()  # no prompt to compare with: likelihood
    tokens = VOCAB.image_tokens(np.array([2, 15, 4, 15]))
    first = tokenized(*FirstDocuments().documents[:2])
    assert quick == [infill_prompt(first, tokens, [(1, 4)], VOCAB).tolist()]


def test_edit_reads_the_chosen_document(generator, quick):
    document = pair("chosen", "red", 6)
    images = [quadrants(3, 5, 7, 9), quadrants(1, 1, 1, 1)]
    outs = generator.edit_batch(
        images, [RIGHT, (0, 0, SIZE, SIZE)], [[document], [pair("b", "b", 2)]]
    )
    assert [o.retrieved.documents[0].id for o in outs] == ["chosen", "b"]
    assert outs[0].documents[0].metadata["task"] == "edit"
    assert codes_of(outs[0].images[0])[[0, 2]].tolist() == [3, 7]
    alone = generator.edit(images[1], (0, 0, SIZE, SIZE), [pair("b", "b", 2)], seed=1)
    np.testing.assert_array_equal(alone.images[0], outs[1].images[0])
    prefix = retrieved_prefix(tokenized(document), VOCAB)
    assert quick[0][: len(prefix)] == prefix.tolist()


def test_neighbours_of_the_chosen_documents_come_after_them(generator, quick):
    chosen = [pair("chosen", "red", 6), pair("m1", "memory 1", 1)]
    out = generator.edit(grey(32), RIGHT, chosen, num_neighbours=2)
    given = out.retrieved
    assert [d.id for d in given.documents] == ["chosen", "m1", "m0", "m2"]
    assert given.ids.tolist() == [-1, -1, 0, 2]
    assert np.isnan(given.scores).tolist() == [True, True, False, False]
    prefix = retrieved_prefix(given.documents, VOCAB)
    assert quick[0][: len(prefix)] == prefix.tolist()
    ((queries, mains),) = generator.retriever.asked[-1:]
    embedder = MeanEmbedder()
    embedded = embedder.embed_documents(chosen).document
    middle = embedder.unit(embedded.sum(0, keepdims=True))
    np.testing.assert_allclose(queries, middle, rtol=1e-5)
    assert [d.id for d in mains] == ["chosen"]
    # Documents that are already tokenized are embedded by their texts and images.
    tokens = tokenized(*chosen[:1])
    out = generator.continue_("c", tokens, num_neighbours=1)
    assert [d.id for d in out.retrieved.documents] == ["chosen", "m0"]
    np.testing.assert_allclose(
        generator.retriever.asked[-1][0][0], embedded[0], rtol=1e-5
    )


def test_a_text_span_is_written_at_the_marker(generator, quick):
    out = generator.infill_text(
        "the <mask> flag", grey(32), 3, documents=[], max_span_length=5
    )
    tokens = [*text("the "), *text(" flag"), VOCAB.break_]
    tokens = np.array([*tokens, *VOCAB.image_tokens(np.full(4, 2))])
    assert quick == [infill_prompt([], tokens, [(4, 4)], VOCAB).tolist()]
    for written in out.texts:
        assert written.startswith("the ") and written.endswith(" flag")
        assert 1 <= len(written) - len("the  flag") <= 5
    assert (np.diff(out.scores) <= 0).all()
    alone = generator.infill_text("<mask> flag", num_retrieved=0, max_span_length=5)
    assert alone.texts[0].endswith(" flag") and not alone.images


def test_texts_and_free_generation_are_guided_by_their_documents(generator, quick):
    how = {"documents": [pair("x", "cd", 3)], "guidance": 2.0}
    for task, given in (
        (generator.infill_text, "<mask> flag"),
        (generator.generate, ["look"]),
    ):
        with pytest.raises(ValueError, match="guide_documents=True to compare"):
            task(given, **how)
        task(given, guide_documents=True, **how)
        plain = quick.calls[-1][1]["unconditional"].tokens[0].tolist()
        task(given, documents=[])
        assert plain == quick[-1]


def test_nothing_is_computed_for_an_invalid_call(generator, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was tokenized")

    monkeypatch.setattr(generator.tokenizer.image, "encode", refuse)
    for wrong in ({"temperature": -1.0}, {"seed": -1}, {"num_samples": 0}):
        with pytest.raises(ValueError, match="must be|a seed is"):
            generator.infill(grey(32), RIGHT, **wrong)
        with pytest.raises(ValueError, match="must be|a seed is"):
            generator.caption(grey(32), **wrong)
    with pytest.raises(ValueError, match="at least one document"):
        generator.edit(grey(32), RIGHT, [])


def test_controlled_generation_reads_the_demonstrations(generator, quick):
    shown = [pair("one", "a", 1), pair("two", "b", 2)]
    out = generator.continue_("c", shown, num_samples=2, seed=4)
    assert quick == [text_to_image_prompt(tokenized(*shown), text("c"), VOCAB).tolist()]
    same = generator.text_to_image("c", 2, documents=shown, seed=4)
    np.testing.assert_array_equal(out.images[0], same.images[0])
    assert out.documents[0].metadata["task"] == "continue"


def test_free_generation_writes_whole_segments(generator, quick):
    out = generator.generate(
        ["look", grey(48)], 40, documents=[], max_segments=3, max_text_length=6
    )
    kinds = set()
    for document in out.documents:
        given, new = document.segments[:2], document.segments[2:]
        assert given[0].text == "look" and given[1].image is not None
        assert 1 <= len(new) <= 3
        assert all(s.text is None or 1 <= len(s.text) <= 6 for s in new)
        kinds |= {s.modality for s in new}
    assert kinds == {"text", "image"}
    empty = generator.generate(num_samples=2, max_segments=3, max_text_length=6)
    assert all(document.segments for document in empty.documents)


def test_the_caption_last_prompt_ends_with_the_image(generator, quick):
    out = generator.caption(
        grey(32),
        2,
        documents=[],
        caption_prompt="last",
        prefix="A",
        max_caption_length=5,
    )
    image = VOCAB.image_tokens(np.full(4, 2)).tolist()
    assert quick == [[VOCAB.eod, *image, VOCAB.break_, *text("A")]]
    assert all(t[0] == "A" and 2 <= len(t) <= 6 for t in out.texts)


@pytest.mark.parametrize("drop", [False, True])
def test_guidance_is_by_the_masked_text(generator, quick, drop):
    shown = tokenized(pair("x", "cd", 3))
    mask = np.array([VOCAB.sentinel(0)])
    generator.text_to_image("ab", documents=shown, guidance=2.0, guide_documents=drop)
    ((_, options, _),) = quick.calls
    kept = [] if drop else shown
    plain, first = options["unconditional"], len(retrieved_prefix(shown, VOCAB))
    expected = text_to_image_prompt(kept, mask, VOCAB)
    assert plain.tokens[0].tolist() == expected.tolist()
    assert plain.prefix_lengths == (1 if drop else first)
    assert options["prefix_lengths"] == first
    generator.text_to_image("ab", documents=shown)
    assert quick.calls[-1][1]["unconditional"] is None


def test_the_text_of_a_region_is_masked_after_the_region(generator, quick):
    """`<mask:0>` is the region in both prompts; the text is `<mask:1>`."""
    generator.infill(quadrants(3, 5, 7, 9), RIGHT, "ab", documents=[], guidance=2.0)
    tokens = [VOCAB.sentinel(1), VOCAB.break_]
    tokens = np.array([*tokens, *VOCAB.image_tokens(np.array([3, 5, 7, 9]))])
    plain = quick.calls[0][1]["unconditional"]
    expected = infill_prompt([], tokens, [(3, 6)], VOCAB)
    assert plain.tokens[0].tolist() == expected.tolist()


def test_ranking_by_similarity_to_the_first_document(generator, quick):
    embedder = MeanEmbedder()
    shown = pair("x", "a", 0)
    shown = type(shown)("x", (shown.segments[0], Segment(image=quadrants(9, 2, 9, 2))))
    both = [shown, pair("y", "b", 5)]
    how = {"num_samples": 4, "rank_by": "document"}
    whole = (0, 0, SIZE, SIZE)
    for out in (
        generator.continue_("c", both, **how),
        generator.edit(grey(32), whole, both, "c", **how),
        generator.infill(grey(32), whole, documents=both, **how),
        generator.text_to_image("c", documents=both, **how),
    ):
        similarities = (
            embedder.embed_images(out.images) @ embedder.embed_images(shown.images)[0]
        )
        np.testing.assert_allclose(out.scores, similarities, rtol=1e-5)
        assert (np.diff(out.scores) <= 0).all() and len(set(out.scores.tolist())) > 1


def test_the_clip_ranks_only_where_it_was_measured_to_align(
    generator, quick, monkeypatch
):
    def measured(preference):
        return Alignment(100, 0.7, 0.7, preference, 0.5, 0.0)

    by = {
        name: generator.text_to_image("a", 4, rank_by=name).scores.tolist()
        for name in ("clip", "likelihood")
    }
    assert by["clip"] != by["likelihood"]
    for alignment, expected in (
        (None, "likelihood"),
        (measured(0.5), "likelihood"),
        (measured(0.99), "clip"),
    ):
        generator.embedder.alignment = alignment
        try:
            assert generator.text_to_image("a", 4).scores.tolist() == by[expected]
        finally:
            generator.embedder.alignment = None
    # What was measured with the weights comes first.
    for name in ("clip", "likelihood"):
        monkeypatch.setattr(generator, "defaults", {"image": {"rank_by": name}})
        assert generator.text_to_image("a", 4).scores.tolist() == by[name]


def test_ranking_by_likelihood_and_near_copies(generator, quick):
    out = generator.text_to_image("a", 3, rank_by="likelihood")
    assert (out.scores < 0).all() and (np.diff(out.scores) <= 0).all()
    codes = codes_of(out.images[0])
    copied = pair("copied", "a", 0)
    copied = type(copied)(
        "copied", (copied.segments[0], Segment(image=quadrants(*codes)))
    )
    from racm3_jax.generation.rerank import find_nearest

    retrieved = generator.pick([pair("far", "b", 99 % 16), copied])
    tokens = VOCAB.image_tokens(np.stack([codes, (codes + 1) % 16]))
    near, far = find_nearest(tokens, retrieved, VOCAB)
    assert near == {"nearest": {"id": "copied", "equal_codes": 1.0}, "near_copy": True}
    assert not far["near_copy"]
    assert find_nearest(tokens, generator.pick([]), VOCAB) == [{}, {}]


def test_a_preview_is_grey_where_nothing_is_sampled(generator, monkeypatch):
    monkeypatch.setattr(sample_module, "PROGRESS_EVERY", 3)
    seen = []
    out = generator.text_to_image("a", 2, on_progress=seen.append)
    assert [progress.num_sampled for progress in seen] == [3, 4]
    first, last = (generator.preview(progress)[0] for progress in seen)
    assert {x.tobytes() for x in last} == {x.tobytes() for x in out.images}
    half = SIZE // 2
    assert (first[:, half:, half:] == 127).all()
    np.testing.assert_array_equal(first[:, :half], last[:, :half])


@pytest.mark.parametrize("region_prompt", ["masked", "in_place"])
def test_a_preview_of_a_region_shows_the_rest_of_the_image(
    generator, monkeypatch, region_prompt
):
    monkeypatch.setattr(sample_module, "PROGRESS_EVERY", 1)
    seen = []
    images = [quadrants(3, 5, 7, 9), grey(32)]
    how = {"region_prompt": region_prompt, "draft": "off"}  # reports each token
    regions, both = [RIGHT, (0, 0, SIZE, SIZE)], [[pair("x", "cd", 3)]] * 2
    outs = generator.edit_batch(images, regions, both, on_progress=seen.append, **how)
    previews = [generator.preview(progress)[:, 0] for progress in seen]
    # RIGHT is codes 1 and 3; the span over both holds code 2, which is known.
    half = SIZE // 2
    for preview, num_new in zip((x[0] for x in previews), (1, 1, 2, 2), strict=True):
        np.testing.assert_array_equal(preview[:, :half], outs[0].images[0][:, :half])
        assert (preview[half:, half:] == 127).all() == (num_new < 2)
    last = previews[-1]
    assert (last[0] == outs[0].images[0]).all() and (last[1] == outs[1].images[0]).all()
    assert (previews[0][1][:, half:] == 127).all()


def reference_log_probs(call, token_range, sampled):
    """Log-probabilities of the sampled tokens, by one forward pass without a cache."""
    import jax

    from racm3_jax.model.transformer import compute_logits

    model, params, tokens, lengths = call
    rows = np.zeros((sampled.shape[0], 128), np.int32)
    for row, new in zip(rows, sampled, strict=True):
        row[: lengths[0]] = tokens[0, : lengths[0]]
        row[lengths[0] : lengths[0] + len(new)] = new
    segments = np.arange(128) < lengths[0] + sampled.shape[1]

    @jax.jit
    def forward(rows):
        places = np.broadcast_to(np.arange(128), rows.shape)
        kinds = np.broadcast_to(segments.astype(np.int32), rows.shape)
        hidden = model.apply({"params": params}, rows, places, kinds)
        return compute_logits(params, model.config, hidden)

    logits = np.asarray(forward(rows), np.float64)
    logits = logits[:, lengths[0] - 1 : lengths[0] - 1 + sampled.shape[1]]
    chosen = np.take_along_axis(logits, sampled[..., None], -1)[..., 0]
    if token_range is not None:
        logits = logits[..., token_range.start : token_range.stop]
    return chosen - np.logaddexp.reduce(logits, axis=-1)


DOCUMENT = [pair("x", "cd", 3)]
TASKS = {
    "text_to_image": lambda g: g.text_to_image(
        "a", 2, documents=DOCUMENT, guidance=2.0
    ),
    "infill": lambda g: g.infill(
        grey(32), RIGHT, "a", 2, documents=DOCUMENT, max_spans=2
    ),
    "edit": lambda g: g.edit(grey(32), RIGHT, DOCUMENT, num_samples=2),
    "infill_in_place": lambda g: g.infill(
        grey(32), RIGHT, "a", 2, documents=DOCUMENT, region_prompt="in_place"
    ),
    "caption": lambda g: g.caption(
        grey(32), 2, documents=DOCUMENT, max_caption_length=9
    ),
    "infill_text": lambda g: g.infill_text("a <mask>", None, 2, documents=DOCUMENT),
    "generate": lambda g: g.generate(["a"], 2, documents=DOCUMENT, max_text_length=9),
}


@pytest.mark.parametrize(
    ("style", "task"),
    [(tiny, "infill"), (tiny_chameleon, "text_to_image")]
    + [
        pytest.param(style, task, marks=pytest.mark.slow)
        for style in (tiny, tiny_chameleon)
        for task in TASKS
    ],
)
def test_samples_equal_the_full_forward(style, task, prompts_seen):
    # Weights times three round too much to compare at 1e-5: two full forward passes,
    # by `plain` and `blocked` attention, differ by 2.1e-5 there; by 3e-6 at two.
    TASKS[task](make_generator(style, times=2))
    ((call, options, samples),) = prompts_seen.calls
    token_range, forced = options["token_range"], options["forced"]
    got, sampled = samples.log_probs[0], samples.tokens[0]
    expected = reference_log_probs(call, token_range, sampled)
    free = np.arange(sampled.shape[1]) < samples.lengths[0][:, None]
    if forced is not None:
        free &= forced[0] < 0
    assert free.any()
    np.testing.assert_allclose(got[free], expected[free], rtol=1e-5, atol=1e-5)
    assert (got[~free] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g: g.infill(grey(0), (0, 0, 9, 4)),
            "does not lie inside the image of 8x8",
        ),
        (lambda g: g.infill(grey(0), np.ones((4, 4), bool)), "the mask is .* has 8x8"),
        (lambda g: g.infill(grey(0), RIGHT, num_samples=0), "num_samples .* got 0"),
        (
            lambda g: g.infill(grey(0), RIGHT, temperature=-1.0),
            "temperature .* got -1.0",
        ),
        (lambda g: g.infill(grey(0), RIGHT, guidance=2.0), "this one has none: give a"),
        (
            lambda g: g.infill(grey(0), RIGHT, rank_by="luck"),
            "rank_by is 'luck'; allowed",
        ),
        (
            lambda g: g.text_to_image("a", num_retrieved=0, rank_by="document"),
            "retrieve or give one that has a picture",
        ),
        (
            lambda g: g.infill_batch([grey(0)], []),
            "1 images need as many regions; got 0",
        ),
        (lambda g: g.infill_text("no marker"), "contains <mask> exactly once"),
        (lambda g: g.edit(grey(0), RIGHT, []), "needs at least one document"),
        (lambda g: g.continue_("a", []), "needs at least one demonstration"),
        (
            lambda g: g.edit(grey(0), RIGHT, DOCUMENT, num_neighbours=4),
            "num_neighbours is 4 but the memory holds only 3",
        ),
        (
            lambda g: g.continue_("a", DOCUMENT, num_neighbours=-1),
            "num_neighbours must be >= 0",
        ),
        (lambda g: g.caption(grey(0), caption_prompt="x"), "caption_prompt is 'x'"),
        (
            lambda g: g.generate([""]),
            "part 0 is ''; a part is a text that is not empty",
        ),
        (lambda g: g.generate(["a"], max_segments=0), "max_segments >= 1"),
        (
            lambda g: g.text_to_image("a", documents=[pair("x", "cd" * 9, 3)] * 6),
            "6 documents do not fit: .* max_length 128; the first 5 would fit",
        ),
    ],
)
def test_invalid_calls_are_refused(generator, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(generator)
    assert "\n" not in str(error.value)


def test_likelihoods_equal_the_full_forward(generator):
    from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods

    prompt = text_to_image_prompt([], text("a flag"), VOCAB)
    drawn = VOCAB.image_tokens(np.array([[1, 2, 3, 4], [5, 5, 5, 5]]))
    call = (generator.model, generator.params, prompt[None], [len(prompt)])
    expected = reference_log_probs(call, None, drawn).sum(-1)
    got = compute_log_likelihoods(generator, [Scored(prompt, d) for d in drawn])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="more than the model's max_length 128"):
        compute_log_likelihoods(generator, [Scored(np.zeros(126, int), drawn[0])])
