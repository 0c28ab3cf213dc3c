"""`racm3 support` writes what `racm3 classify --support` reads."""

import json
import pathlib

import numpy as np

from racm3_jax import cli, own_files
from racm3_jax.commands.generate import _beside, _read_list


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    own_files.write_png(path, np.zeros((8, 8, 3), np.uint8))
    return path


def read(path):
    entries = _read_list(path, {"image", "label"})
    return [(_beside(path, e["image"]).resolve(), e["label"]) for e in entries]


def test_examples_and_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write_image(tmp_path / "one.png")
    named = [write_image(tmp_path / "by_label" / n / "a.png") for n in ("dax", "wug")]
    write_image(tmp_path / "by_label" / "no_label.png")
    words = ["support", "--example", "one.png", "dax", "--folder=by_label"]
    out = tmp_path / "new" / "support.json"
    for _ in range(2):  # its own file is replaced
        assert cli.main([*words, f"--out={out}"]) == 0
    assert "3 examples of dax, wug" in capsys.readouterr().out
    assert read(out) == [(one, "dax"), (named[0], "dax"), (named[1], "wug")]
    assert not pathlib.PurePath(
        json.loads(out.read_text())["examples"][0]["image"]
    ).root


def test_wrong_support_is_refused(tmp_path, capsys):
    image = write_image(tmp_path / "one.png")
    text = tmp_path / "mine.json"
    text.write_text('{"prompt": "mine"}')
    for words, said in [
        ([], "give --example IMAGE LABEL"),
        (["--example", str(text), "dax"], "is not an image"),
        (["--example", str(image), " "], "is empty"),
        (["--example", str(image), "dax", f"--out={text}"], "left alone"),
        (["--example", str(image), "dax", f"--out={tmp_path}/x.txt"], ".json"),
        ([f"--folder={tmp_path}"], "has no images in subfolders"),
    ]:
        words = (
            words
            if "--out" in " ".join(words)
            else [*words, f"--out={tmp_path}/y.json"]
        )
        assert cli.main(["support", *words]) == 2
        assert said in capsys.readouterr().err
    assert text.read_text() == '{"prompt": "mine"}'
    assert not (tmp_path / "y.json").exists()
