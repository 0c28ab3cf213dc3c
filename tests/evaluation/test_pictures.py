import numpy as np
import pytest

from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet, tile
from racm3_jax.evaluation.report import CaptionRow, write_report

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)


def test_tile_is_about_square():
    assert tile([RED] * 5).shape == (16, 24, 3)
    with pytest.raises(ValueError, match="no pictures"):
        tile([])


def test_sheet_shows_every_panel():
    row = Row("the flag of X", ([Panel(RED, "a"), Panel(RED, "b")], [Panel(RED)]))
    sheet = draw_sheet(("prompt", "retrieved", "drawn"), [row], panel_size=32)
    red = (sheet == (255, 0, 0)).all(-1).sum()
    assert red == 3 * 32 * 32
    with pytest.raises(ValueError, match="groups"):
        draw_sheet(("prompt", "drawn"), [row])


def test_report_is_one_file_that_loads_nothing(tmp_path):
    from PIL import Image

    Image.fromarray(RED).save(tmp_path / "samples.png")
    caption = CaptionRow(RED, "<b>truth", "X", [Panel(RED, "w")], "with", "without")
    write_report(
        tmp_path / "report.html",
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
