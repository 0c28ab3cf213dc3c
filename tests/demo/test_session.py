"""Search, choose, generate, caption, remove: without a page and without gradio."""

from __future__ import annotations

import numpy as np
import pytest
from demo_fakes import FakeGenerator, grey

from racm3_jax.demo.desk import NUM_EARLIER, Desk, remember
from racm3_jax.demo.session import (
    MAX_UPLOAD_BYTES,
    Session,
    check_settings,
    read_upload,
)
from racm3_jax.documents.images import encode_png
from racm3_jax.memory.memory import Memory


def ids(desk):
    return [document.id for document in desk.given]


def finish(stages):
    *_, last = stages
    return last


@pytest.fixture
def desk(session):
    return session.search(Desk(), "flag nation1 scene2", 2)


def test_a_prompt_finds_documents_with_their_metadata(desk):
    first, second = desk.given
    assert first.id == "doc-12" and first.shown.text == "flag nation1 scene2"
    assert (first.shown.images[0] == 12).all()
    assert first.score > second.score and first.licence == "CC0-1.0"
    assert first.shown.source == "https://example.org/1/2" and not first.stays


def test_a_dropped_document_is_replaced_by_the_next(session, desk):
    fewer = session.drop(desk, "doc-12")
    assert fewer.dropped == ("doc-12",) and len(fewer.given) == 2
    assert fewer.given[0].id == ids(desk)[1] and "doc-12" not in ids(fewer)
    again = session.search(fewer, "flag nation1 scene2", 2)
    assert "doc-12" not in ids(again)
    assert ids(session.restore(again)) == ids(desk)
    assert session.drop(desk, "no such document") is desk


def test_a_pinned_document_stays_for_other_prompts(session, desk):
    pinned = session.pin(desk, "doc-12")
    other = session.search(pinned, "flag nation3 scene0", 2)
    assert ids(other) == ["doc-12", "doc-30"]
    assert other.given[0].score < desk.given[0].score
    unpinned = session.pin(other, "doc-12")
    assert "doc-12" not in ids(session.search(unpinned, "flag nation3 scene0", 2))


def test_own_documents_come_first_and_are_not_added_to_the_memory(session, desk):
    before = session.memory.num_allowed
    own = session.add_own(desk, grey(99), " my flag ")
    assert ids(own) == ["own-1", "doc-12"] and own.given[0].is_own
    assert own.given[0].shown.text == "my flag"
    both = session.add_own(own, grey(98), "another")
    assert ids(both) == ["own-2", "own-1"]
    assert ids(session.drop(both, "own-2")) == ["own-1", "doc-12"]
    assert session.memory.num_allowed == before
    assert ids(session.add_own(Desk(), grey(1), "alone")) == ["own-1"]


def test_an_image_comes_in_stages_and_is_remembered(session):
    stages = list(session.draw(Desk(), "flag nation1 scene2", 2, seed=7.0))
    assert [stage.share for stage in stages] == [0.0, 0.5, 1.0, 1.0]
    assert [len(stage.images) for stage in stages] == [0, 1, 1, 1]
    output = stages[-1].output
    assert output is not None and session.attribute(output) == (-3.0, 9.0)
    assert len(stages[0].desk.given) == 2
    assert (stages[1].images[0] == 127).all()
    last = stages[-1]
    assert last.output is not None and last.output.seed == 7
    (earlier,) = remember((), last)
    assert remember((earlier,), stages[0]) == (earlier,)
    assert earlier.seed == 7 and list(earlier.ids) == ids(last.desk)
    assert (earlier.image == last.images[0]).all()


def test_dropping_changes_the_image_and_repeating_does_not(session):
    prompt = "flag nation1 scene2"
    first = finish(session.draw(Desk(), prompt, 1, seed=1))
    again = finish(session.draw(first.desk, prompt, 1, seed=1))
    assert (first.images[0] == again.images[0]).all()
    fewer = session.drop(first.desk, first.desk.given[0].id)
    other = finish(session.draw(fewer, prompt, 1, seed=1))
    assert (first.images[0] != other.images[0]).all()
    images = remember(remember((), first), other)
    assert [len(d.ids) for d in images] == [1, 1]
    for _ in range(9):
        images = remember(images, other)
    assert len(images) == NUM_EARLIER


def test_without_documents_the_model_uses_only_the_prompt(session):
    last = finish(session.draw(Desk(), "flag nation1 scene2", 0))
    assert not last.desk.given and (last.images[0] == 200).all()


def test_captions_name_their_documents(session):
    output, given = session.caption(grey(10), 2.0, seed=3, num_samples=2)
    assert output.texts == ["a flag"] * 2
    assert all(g.id.startswith("doc-1") for g in given) and len(given) == 2


def test_infilling_covers_whole_codes(session, desk):
    cells = np.array([True, False, False, False])
    settings = {"guidance": 2.0, "guide_documents": True}
    stages = list(session.infill(grey(10), cells, "flag nation1", 1, **settings))
    assert [stage.share for stage in stages] == [0.0, 0.5, 1.0, 1.0]
    assert (stages[1].images[0] == 127).all() and not stages[1].desk.given
    task, region, prompt, options = session.generator.calls[-1]
    assert (task, prompt, options["guidance"]) == ("infill", "flag nation1", 2.0)
    assert region.shape == (8, 8) and region[:4, :4].all() and region.sum() == 16
    assert len(stages[-1].desk.given) == 1 and stages[-1].output is not None
    last = finish(session.infill(grey(10), cells, "", 1, desk.given, **settings))
    task, _, prompt, options = session.generator.calls[-1]
    # Without a text, guidance leaves out only the documents, or nothing.
    assert (task, prompt, options["guidance"]) == ("edit", "", 2.0)
    assert last.desk.given == desk.given and (last.images[0] == 11).all()
    finish(session.infill(grey(10), cells, "", 1, guidance=2.0, guide_documents=False))
    assert session.generator.calls[-1][-1]["guidance"] == 1.0


def test_classification_needs_an_image(session):
    support = [(grey(10), "dax"), (grey(20), "wug")]
    assert session.classify(grey(10), support).label == "wug"
    with pytest.raises(ValueError, match="choose an image first"):
        session.classify(None, support)


def test_the_memory_is_searched_by_text_and_by_image(session):
    assert session.find("flag nation2 scene1", 3.0)[0].id == "doc-21"
    assert all(g.id.startswith("doc-2") for g in session.find(grey(20), 3))
    assert len(session.find("flag", 500)) == 12


def test_removal_is_permanent(session, desk):
    pinned = session.pin(desk, "doc-12")
    said = session.remove("doc-12")
    assert said.startswith("Removed doc-12") and "11 documents are left" in said
    assert "doc-12" not in [g.id for g in session.find("flag nation1 scene2", 12)]
    assert "doc-12" not in ids(session.search(pinned, "flag nation1 scene2", 2))
    assert "doc-12" not in ids(session.search(Desk(), "flag nation1 scene2", 2))
    assert "before" in session.remove("doc-12")
    with Memory.load(session.memory.path) as again:
        assert again.num_allowed == 11
    with pytest.raises(ValueError, match="holds no document 'doc-99'"):
        session.remove("doc-99")


def test_suggested_prompts_are_from_the_memory(session):
    prompts = session.example_prompts(3)
    assert len(prompts) == 3 and prompts[0] == "flag nation0 scene0"


def test_without_a_memory_only_own_documents_are_used():
    session = Session(FakeGenerator())  # pyright: ignore[reportArgumentType]
    assert session.example_prompts() == []
    desk = session.add_own(Desk(), grey(50), "mine")
    last = finish(session.draw(desk, "a flag", 2))
    assert ids(last.desk) == ["own-1"] and (last.images[0] == 50).all()
    assert session.caption(grey(1), 2)[1] == ()
    with pytest.raises(ValueError, match="no memory to search"):
        session.find("a flag", 3)


def test_the_size_of_uploads_is_checked_first():
    wide = np.zeros((20, 40, 3), np.uint8)
    assert read_upload(encode_png(wide)).shape == (20, 20, 3)
    assert read_upload(encode_png(np.zeros((600, 700, 3), np.uint8))).shape[0] == 512
    with pytest.raises(ValueError, match=r"the file has 8\.0 MB; 8 MB are allowed"):
        read_upload(bytes(MAX_UPLOAD_BYTES + 1))
    with pytest.raises(ValueError, match="more than the 16000000 allowed"):
        read_upload(encode_png(np.zeros((4001, 4000, 3), np.uint8)))
    with pytest.raises(ValueError, match="the file is not an image"):
        read_upload(b"not a picture")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.search(Desk(), "  ", 2), "the prompt is empty: write something"),
        (lambda s: s.search(Desk(), "x" * 501, 2), "has 501 characters; 500 are"),
        (lambda s: s.search(Desk(), "a", 9), "choose 0 to 4 documents; got 9"),
        (lambda s: s.add_own(Desk(), None, "a"), "upload an image for your document"),
        (lambda s: s.add_own(Desk(), grey(1), ""), "the caption is empty"),
        (
            lambda s: s.infill(grey(1), np.zeros(4, bool), "", 2),
            "paint over the region",
        ),
        (lambda s: s.infill(grey(1), np.ones(4, bool), "", 2, ()), "no documents on"),
        (lambda s: s.caption(None, 2), "choose an image first"),
        (lambda s: check_settings({"seed": None}), "the seed must be"),
        (
            lambda s: check_settings({"num_samples": 9}),
            "generate 1 to 4 samples; got 9",
        ),
    ],
)
def test_invalid_calls_are_refused_in_one_sentence(session, call, message):
    with pytest.raises(ValueError, match=message):
        call(session)
