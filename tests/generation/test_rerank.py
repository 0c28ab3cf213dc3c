"""Retrieved documents re-ranked by how likely the image is after each."""

from __future__ import annotations

import numpy as np
import pytest
from generation_standins import VOCAB, AsciiTokenizer, grey

from racm3_jax.generation.captioning import fill_in_defaults
from racm3_jax.generation.likelihood import Scored, compute_log_likelihoods
from racm3_jax.generation.requests import Given
from racm3_jax.generation.rerank import rank_documents
from racm3_jax.sequences.layout import retrieved_prefix
from racm3_jax.types import Retrieved

ASK = np.array([VOCAB.sentinel(0), VOCAB.break_], np.int32)
EMPTY = Retrieved(np.arange(0), np.zeros(0, np.float32), ())


@pytest.fixture(scope="module")
def found(generator):
    documents = generator.tokenized(generator.retriever.documents)
    return Retrieved(np.arange(3), np.array([0.9, 0.8, 0.7], np.float32), documents)


def best_first(generator, level, documents):
    prompts = [np.append(retrieved_prefix([d], VOCAB), ASK) for d in documents]
    image = AsciiTokenizer().encode_image(grey(level))
    scores = compute_log_likelihoods(generator, [Scored(p, image) for p in prompts])
    return np.argsort(-scores)


def test_the_documents_that_explain_the_image_best_come_first(generator, found):
    levels = [16, 176, 80]
    images = np.stack([AsciiTokenizer().encode_image(grey(x)) for x in levels])
    ranked = rank_documents(generator, images, [found, EMPTY, found], 2)
    assert ranked[1].documents == () and len(ranked) == 3
    for level, kept in ((16, ranked[0]), (80, ranked[2])):
        order = best_first(generator, level, found.documents)[:2]
        assert kept.ids.tolist() == order.tolist()
        assert kept.scores.tolist() == found.scores[order].tolist()
        assert [d.id for d in kept.documents] == [f"m{i}" for i in order]
    assert rank_documents(generator, images[:1], [EMPTY], 2) == [EMPTY]


def test_captions_follow_the_best_of_the_candidates(generator, found, quick):
    settings = {"num_retrieved": 1, "max_caption_length": 4}
    plain = generator.caption(grey(176), **settings)
    assert plain.retrieved.ids.tolist() == [0]
    chosen = generator.caption(grey(176), num_candidates=3, **settings)
    best = best_first(generator, 176, found.documents)[0]
    assert chosen.retrieved.ids.tolist() == [best]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_candidates": 1},
            "num_candidates is 1, of which num_retrieved=2 are kept",
        ),
        ({"num_candidates": -1}, "num_candidates is -1"),
        ({"num_candidates": 4}, "num_candidates is 4 but the memory holds only 3"),
        (
            {"num_candidates": 2, "documents": []},
            "re-ranks what is retrieved; nothing is",
        ),
        ({"num_candidates": 2, "num_retrieved": 0}, "nothing is, with documents"),
        ({"num_candidates": 2, "num_retrieved": -1}, "nothing is, with documents"),
        ({"num_retrieved": 4}, "num_retrieved is 4 but the memory holds only 3"),
    ],
)
def test_invalid_candidates_are_refused(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator.caption(grey(0), **arguments)


MEASURED = {
    "caption": {
        "num_candidates": 16,
        "temperature": 0.0,
        "guidance": 2.0,
        "guide_documents": True,
    }
}


@pytest.fixture
def measured(generator, monkeypatch):
    monkeypatch.setattr(generator, "defaults", MEASURED)
    return generator


@pytest.mark.parametrize(
    ("call", "candidates", "settings"),
    [
        ({}, 3, {"temperature": 0.0, "guidance": 2.0, "guide_documents": True}),
        ({"guidance": 1.0}, 3, {"temperature": 0.0, "guide_documents": True}),
        ({"temperature": 0.7}, 3, {"guidance": 2.0, "guide_documents": True}),
        ({"num_samples": 2}, 3, {"guidance": 2.0, "guide_documents": True}),
        ({"contrastive_k": 2}, 3, {"temperature": 0.0}),
        ({"num_candidates": 0}, 0, MEASURED["caption"]),
        ({"num_retrieved": 3}, 0, MEASURED["caption"]),
        ({"num_retrieved": 0}, 0, {}),
        ({"documents": []}, 0, {}),
    ],
)
def test_defaults_of_a_caption_are_those_measured_for_the_weights(
    measured, call, candidates, settings
):
    call = dict(call)
    num_samples, chosen = call.pop("num_samples", 1), call.pop("num_candidates", None)
    given = Given(call.pop("num_retrieved", 2), call.pop("documents", None))
    found = fill_in_defaults(measured, given, num_samples, chosen, call)
    own = {name: value for name, value in settings.items() if name != "num_candidates"}
    assert found == (candidates, own | call)


def test_images_are_sampled_with_the_measured_settings(generator, monkeypatch):
    monkeypatch.setattr(
        generator,
        "defaults",
        {"image": {"temperature": 0.0, "top_p": 0.5, "region_prompt": "in_place"}},
    )
    box = {"region": (0, 0, 8, 8), "num_retrieved": 0}
    for given, used in (
        ({}, "in_place"),
        ({"max_spans": 2}, "masked"),  # in place is one span
        ({"region_prompt": "masked"}, "masked"),
    ):
        out = generator.infill(grey(90), **box, **given)
        assert out.settings["region_prompt"] == used
    for out in (
        generator.text_to_image("a flag", num_retrieved=1),
        generator.infill(grey(90), **box),
    ):
        assert out.settings["temperature"] == 0.0 and out.settings["top_p"] == 0.5
    chosen = generator.text_to_image("a flag", num_retrieved=1, top_p=0.7)
    assert chosen.settings["top_p"] == 0.7 and chosen.settings["temperature"] == 0.0
    # Texts are not images.
    text = generator.infill_text("a <mask>", num_retrieved=0, max_span_length=2)
    assert text.settings["temperature"] == 1.0 and text.settings["top_p"] == 0.9


def test_a_caption_uses_the_measured_settings(generator, measured, quick):
    left = {"num_retrieved": 1, "max_caption_length": 4}
    said = {**left, **MEASURED["caption"], "num_candidates": 3}
    out = measured.caption(grey(176), **left)
    assert out.texts == generator.caption(grey(176), **said).texts
    assert out.retrieved.ids.tolist() != [0]
    used = {**MEASURED["caption"], "num_candidates": 3, "image_first": False}
    assert used.items() <= out.settings.items() and out.settings["top_p"] == 0.9
