"""Only files that racm3 wrote are ever replaced."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from racm3_jax import own_files

GREY = np.full((4, 6, 3), 99, np.uint8)


def write_foreign(path):
    """A file of its kind as other programs write it."""
    if path.suffix == ".png":
        Image.fromarray(GREY).save(path)
    elif path.suffix == ".json":
        path.write_text('{"mine": 1}')
    else:
        path.write_text("mine")


WRITERS = {
    "a.png": lambda path: own_files.write_png(path, GREY, {"prompt": "ü"}),
    "b.png": lambda path: own_files.write_png(path, GREY),
    "c.json": lambda path: own_files.write_json(path, {"x": 1}),
    "d.html": lambda path: own_files.write_html(path, "<title>t</title>", "<p>b"),
    "e.md": lambda path: own_files.write_markdown(path, "| a |\n|---|"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_own_files_are_replaced_and_others_are_refused(tmp_path, name):
    path = tmp_path / "made" / name
    own_files.check(path)
    assert not path.parent.exists()  # a check writes nothing
    WRITERS[name](path)
    content = path.read_bytes()
    own_files.check(path)
    WRITERS[name](path)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [name]
    write_foreign(path)
    with pytest.raises(FileExistsError, match="left alone: give another --out"):
        own_files.check(path, change="give another --out")
    path.write_bytes(b"")  # empty, as of mktemp: nothing is lost
    own_files.check(path)


def test_figures_are_marked(tmp_path):
    from matplotlib.figure import Figure

    own_files.write_figure(tmp_path / "x.png", Figure(figsize=(1, 1)))
    assert own_files.is_own(tmp_path / "x.png")
    Figure(figsize=(1, 1)).savefig(tmp_path / "y.png")
    assert not own_files.is_own(tmp_path / "y.png")


def test_a_record_of_another_kind_is_not_replaced(tmp_path):
    own_files.write_json(tmp_path / "x.json", {"settings": {}, "results": {}})
    own_files.check(tmp_path / "x.json")
    with pytest.raises(FileExistsError):
        own_files.check(tmp_path / "x.json", key="prompt")


def test_an_input_is_never_an_output(tmp_path):
    own_files.write_png(tmp_path / "x.png", GREY)
    os.link(tmp_path / "x.png", tmp_path / "y.png")
    for name in ("x.png", "y.png"):
        with pytest.raises(FileExistsError, match="is read by this command"):
            own_files.check(tmp_path / name, inputs=[tmp_path / "x.png"])


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "manifest.json").write_text('{"format": "racm3-memory"}')
    for path, words in [
        ("file/x.png", "file is a file, so"),
        ("file/y/x.png", "file is a file, so"),
        ("memory/x.png", "a memory, which holds its own files only"),
        ("memory/table/x.png", "a memory, which holds its own files only"),
        (".", "is a folder, not a file"),
    ]:
        with pytest.raises(OSError, match=words):
            own_files.check(tmp_path / path)
    os.mkfifo(tmp_path / "device")
    with pytest.raises(OSError, match="too long"):
        own_files.check(tmp_path / ("x" * 300))
    with pytest.raises(FileExistsError, match="device is not a regular file"):
        own_files.check(tmp_path / "device")
    with pytest.raises(ValueError, match="'x.jpg' does not end in .png"):
        own_files.check_png_paths("x.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["device", "file", "memory"]


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is faked."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="may not be written to: give another"):
        own_files.check(tmp_path / "new" / "x.png")


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    own_files.write_json(tmp_path / "x.json", {"x": 1})
    (tmp_path / "link.json").symlink_to("x.json")
    own_files.check(tmp_path / "link.json")
    own_files.write_json(tmp_path / "link.json", {"x": 2})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "x.json").read_text())["x"] == 2
    (tmp_path / "x.json").write_text('"mine"')
    with pytest.raises(FileExistsError):
        own_files.check(tmp_path / "link.json")


def test_files_of_the_last_version_may_be_replaced(tmp_path):
    """Without marks, the folder identifies them, unless a newer run has written there."""
    Image.fromarray(GREY).save(tmp_path / "samples.png")
    (tmp_path / "table.md").write_text("| a |")
    names = [tmp_path / "samples.png", tmp_path / "table.md"]
    assert not any(map(own_files.is_own, names))
    (tmp_path / "results.json").write_text('{"settings": {}, "results": {}}')
    own_files.check(*names, tmp_path / "results.json")
    own_files.write_json(tmp_path / "results.json", {"settings": {}, "results": {}})
    assert not any(map(own_files.is_own, names))
    (tmp_path / "report.html").write_text("<title>racm3 report</title>")
    own_files.check(*names, tmp_path / "report.html")
    own_files.write_html(tmp_path / "report.html", "<title>racm3 report</title>", "")
    assert not any(map(own_files.is_own, names))
    sweep = tmp_path / "sweep.json"
    sweep.write_text('[{"point": {}, "metrics": {"loss": 1}}]')
    own_files.check(sweep)
    sweep.write_text("[1, 2]")
    assert not own_files.is_own(sweep)


def test_damaged_files_are_not_replaced(tmp_path):
    for name, content in [
        ("a.json", b"\xff{"),
        ("b.json", b"[" * 100_000),
        ("c.png", b"\x89PNG"),
        ("d.txt", b"racm3_jax"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert not own_files.is_own(tmp_path / name)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    own_files.write_png(path, GREY)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space.*{path}"):
        own_files.write_png(path, GREY + 1)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
