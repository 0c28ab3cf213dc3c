"""The parts of the page: what they show, and that no input becomes HTML."""

from __future__ import annotations

import dataclasses

import numpy as np
from demo_fakes import FakeGenerator, grey

from racm3_jax.demo import panels
from racm3_jax.demo.desk import Desk, remember
from racm3_jax.types import Document, Segment


def test_a_card_shows_metadata_and_escapes_it(session):
    desk = session.search(Desk(), "flag nation1 scene2", 1)
    (given,) = desk.given
    card = panels.draw_cards([given], ("pin", "drop"))
    for words in ("score 0.", "doc-12", "https://example.org/1/2 · CC0-1.0", "Pin"):
        assert words in card
    evil = '"><script>x</script>'
    shown = Document(evil, (Segment(text=evil), Segment(image=grey(1))), evil)
    tokens = dataclasses.replace(given.tokens, id=evil)
    card = panels.draw_cards([dataclasses.replace(given, tokens=tokens, shown=shown)])
    assert "<script" not in card and "&lt;script&gt;" in card


def test_pinned_and_own_documents_look_different(session):
    desk = session.pin(session.search(Desk(), "flag nation1", 1), "doc-12")
    desk = session.pin(desk, desk.given[0].id)
    desk = session.add_own(desk, grey(9), "mine")
    own = panels.draw_cards(desk.given[:1], ("pin", "drop"))
    assert "your own" in own and "card stays" in own
    assert 'data-action="pin"' not in own and 'data-action="drop"' in own


def test_dropped_documents_can_be_brought_back(session):
    desk = session.drop(session.search(Desk(), "flag nation1 scene2", 1), "doc-12")
    shown = panels.draw_desk(desk)
    assert "dropped: doc-12" in shown and 'data-action="restore"' in shown
    assert "Find documents" in panels.draw_desk(Desk())
    alone = session.search(Desk(), "flag", 0)
    assert "uses only the prompt" in panels.draw_desk(alone)


def test_an_unfinished_and_a_finished_image(session):
    *stages, last = session.draw(
        Desk(), "flag nation1 scene2", 1, num_samples=2, seed=5
    )
    assert "the image appears here" in panels.draw_stage(None)
    assert "reading the documents" in panels.draw_stage(stages[0])
    assert 'data-share="50"' in panels.draw_stage(stages[1])
    done = panels.draw_stage(last)
    assert done.count("<figure>") == 2 and "seed 5 · sample 0 · score -0.000" in done
    assert "95% of the codes equal those of doc-00" in done
    assert done.count("Nearly a copy of doc-00.") == 1
    earlier = remember((), last)
    assert panels.draw_earlier(earlier) == ""
    *_, second = session.draw(last.desk, "flag nation1 scene2", 1, seed=6)
    assert "seed 5" in panels.draw_earlier(remember(earlier, second))


def test_captions_labels_and_examples():
    output = FakeGenerator().caption(grey(1), 0, seed=2, num_samples=1)
    assert "a flag" in panels.draw_captions(output)
    assert panels.draw_contributions(["a"], ()) == ""
    shown = panels.draw_contributions(["<a>", "b"], (-0.3, 12.0))
    assert "+0 bits" in shown and "+12 bits" in shown and "&lt;a&gt;" in shown
    assert shown.index("width:0.0%") < shown.index("width:100.0%")
    found = FakeGenerator().classify(grey(1), [(grey(1), "dax"), (grey(2), "wug")])
    shown = panels.draw_labels(found)
    assert shown.index("75.0%") < shown.index("25.0%")
    assert "two labels" in panels.draw_examples([])
    assert "dax" in panels.draw_examples([(grey(1), "dax")])


def test_the_brush_has_a_cell_for_every_code():
    assert 'canvas width="8" height="8"' in panels.draw_brush(grey(1), 8)
    assert "canvas" not in panels.draw_brush(None, 8)
    assert panels.draw_image(np.zeros((4, 4, 3), np.uint8), 'a "b"').count('"') == 6
