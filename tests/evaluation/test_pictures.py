import types

import numpy as np
import pytest

from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet, tile
from racm3_jax.evaluation.report import CaptionRow, caption_rows, write_report
from racm3_jax.types import Document, Segment

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)


def test_tile_is_about_square():
    assert tile([RED] * 5).shape == (16, 24, 3)
    with pytest.raises(ValueError, match="no images"):
        tile([])


def test_sheet_shows_every_panel():
    row = Row("the flag of X", ([Panel(RED, "a"), Panel(RED, "b")], [Panel(RED)]))
    sheet = draw_sheet(("prompt", "retrieved", "generated"), [row], panel_size=32)
    red = (sheet == (255, 0, 0)).all(-1).sum()
    assert red == 3 * 32 * 32
    with pytest.raises(ValueError, match="groups"):
        draw_sheet(("prompt", "generated"), [row])


def test_a_row_is_as_high_as_its_longest_text():
    words = "a caption that is much too long for one line of a small panel " * 2
    rows = [Row("a", ([Panel(RED, words)],)), Row("b", ([Panel(RED, "c")],))]
    sheet = draw_sheet(("prompt", "generated"), rows, panel_size=32)
    plain = draw_sheet(("prompt", "generated"), rows[1:] * 2, panel_size=32)
    assert sheet.shape[0] > plain.shape[0] + 60
    # nothing is written over the second image or outside of the panel's column
    assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * 32 * 32
    assert (sheet[:, -8:] > 200).all()
    tall = [Row("word " * 60, ([Panel(RED)],)), rows[1]]
    sheet = draw_sheet(("prompt", "generated"), tall, panel_size=32)
    assert sheet.shape[0] > plain.shape[0] + 60


def test_captions_of_a_report_are_those_of_their_images():
    documents = [
        Document(str(i), (Segment(text=f"truth {i}"), Segment(image=RED)))
        for i in range(2)
    ]
    nothing = types.SimpleNamespace(documents=(), scores=np.zeros(0))
    found, alone = (
        [types.SimpleNamespace(texts=[f"{how} {i}"], retrieved=nothing) for i in (0, 1)]
        for how in ("found", "alone")
    )
    generator = types.SimpleNamespace(tokenizer=None)
    rows = caption_rows(generator, documents, found, alone)
    assert [(r.truth, r.with_retrieval, r.without) for r in rows] == [
        ("truth 0", "found 0", "alone 0"),
        ("truth 1", "found 1", "alone 1"),
    ]
    assert (rows[0].image == RED).all() and rows[0].retrieved == []


def test_report_is_one_file_without_external_links(tmp_path):
    from PIL import Image

    Image.fromarray(RED).save(tmp_path / "samples.png")
    caption = CaptionRow(RED, "<b>truth", [Panel(RED, "w")], "with", "without")
    write_report(
        tmp_path / "report.html",
        title="Flags",
        explanation="What they are.",
        sheet=tmp_path / "samples.png",
        captions=[caption],
        loss_curves={"Training": tmp_path / "none.png"},
        facts={"memory": "2 documents"},
    )
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and "<script" not in page
    assert "&lt;b&gt;truth" in page
    assert page.count("data:image/png;base64,") == 3
    assert not list(tmp_path.glob("*.tmp"))
