"""`racm3 memory …` from a source to images, with stand-ins for the models."""

from __future__ import annotations

import argparse
import json
import re
import types

import numpy as np
import pytest
from corpus_files import forty, line, write_corpus
from memory_fakes import FakeEmbedder, FakeTokenizer, make_document
from PIL import Image

from racm3_jax.commands import memory as family
from racm3_jax.commands.configs import UsageError
from racm3_jax.memory import beam as beam_build
from racm3_jax.memory.builder import build_memory
from racm3_jax.memory.memory import Memory


class Tokenizer(FakeTokenizer):
    def decode(self, document):
        return make_document(int(document.id.split("-")[1]), source=document.source)

    def decode_text(self, document):
        return self.decode(document).text


@pytest.fixture(autouse=True)
def models(monkeypatch):
    pair = (Tokenizer(), FakeEmbedder())
    monkeypatch.setattr(family, "_load_models", lambda _: pair)


def run(*words: str) -> None:
    """As `cli.main` runs it."""
    parser = argparse.ArgumentParser()
    family.register(parser.add_subparsers())
    arguments = parser.parse_args(["memory", *words])
    arguments.command(arguments)


def build(tmp_path):
    source = forty(tmp_path / "in")
    words = (f"--source={source}", "--index=exact", "--num_query_variants=1")
    run("build", f"--memory={tmp_path}/memory", *words)
    return tmp_path / "memory"


def output(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_from_build_to_removal(capsys, tmp_path):
    path = build(tmp_path)
    shown = capsys.readouterr().out
    assert "40 documents, exact index" in shown and "read 40, bad 0" in shown
    assert "excluded from retrieval for some documents: 40 itself" in shown
    assert re.search(r"^\d+\.\d s: \d+% ", shown, re.MULTILINE)
    # filters without matches are not listed
    assert not re.search(r"\b0 (?!bad)\w+", shown)
    out = f"--out={tmp_path}/a.png"
    words = ("search", f"--memory={path}", out, "--json", "--k=8")
    run(*words, "--text=nation3 on scene1")
    found = output(capsys)["results"]
    assert found[0]["id"] == "doc-13" and found[0]["text"] == "nation3 on scene1"
    assert found[0]["source"] == "http://site1/13"
    assert len(found) == 8
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape[0] > 2 * 128 and sheet.shape[1] > 6 * 128

    run(*words[:3], "--text=nation3 on scene1")
    assert "8 of 8 images decoded from the memory" in capsys.readouterr().out

    Image.fromarray(make_document(22).images[0]).save(tmp_path / "q.png")
    image = f"--image={tmp_path}/q.png"
    run(*words, image)
    assert output(capsys)["results"][0]["id"] == "doc-22"

    run("stats", f"--memory={path}", out, "--json", "--num_queries=8")
    stats = output(capsys)
    assert stats["documents"] == 40 and stats["recall"]["text"] == 1.0
    run("stats", f"--memory={path}", out, "--num_queries=8")
    said = capsys.readouterr().out
    assert said.startswith(
        "40 documents\n  with text 40, with an image 40, with both 40"
    )
    assert "text queries: finds 100.0% of the exact 10 nearest" in said
    assert "of 8 sampled documents\n  built from 40 documents\n" in said
    assert "{" not in said and "removed" not in said

    like = ("remove", f"--memory={path}", f"--like={tmp_path}/q.png")
    run(*like, "--dry_run")
    assert "1 documents would be removed" in capsys.readouterr().out
    run(*like)
    (tmp_path / "ids").write_text("doc-1\ndoc-2\n")
    run("remove", f"--memory={path}", f"--ids={tmp_path}/ids")
    run("remove", f"--memory={path}", "--ids=doc-0,doc-1")
    run("remove", f"--memory={path}", "--url_pattern=http://site3/*")
    shown = capsys.readouterr().out
    for sentence in ("removed 1 of 1", "removed 2 of 2", "1 of 2", "removed 10 of 10"):
        assert sentence in shown
    run(*words, image)
    assert "doc-22" not in [r["id"] for r in output(capsys)["results"]]
    run("verify", f"--memory={path}")
    assert "26 documents, 14 removed ones are not found" in capsys.readouterr().out
    run("remove", f"--memory={path}", "--compact")
    assert "14 documents deleted from disk" in capsys.readouterr().out

    more = write_corpus(tmp_path / "more", [[line(50), line(51), "{", line(51)]])
    run("add", f"--memory={path}", f"--source={more}", "--max_bad=0.5")
    shown = capsys.readouterr().out
    assert "added 2 documents" in shown and "filtered: 1 exact duplicate" in shown
    run("verify", f"--memory={path}", "--share=0.01")
    shown = capsys.readouterr().out
    assert "of 27 files chosen at random" in shown and "files were sampled" in shown
    run("neighbours", f"--memory={path}", "--k=8")
    assert "wrote 8 neighbours of 112 queries" in capsys.readouterr().out
    run("verify", f"--memory={path}")
    assert "28 documents, 0 removed" in capsys.readouterr().out


def test_search_by_words_needs_no_encoder(capsys, tmp_path):
    path = build(tmp_path)
    out = (f"--out={tmp_path}/a.png", f"--memory={path}", "--json", "--k=3")
    run("search", *out, "--words=SCENE1 nation3")
    found = output(capsys)["results"]
    assert found[0]["text"] == "nation3 on scene1" and len(found) == 3
    assert found[0]["score"] > found[1]["score"] > 0
    with pytest.raises(
        UsageError, match="no caption of .* has a word of --words='duck'"
    ):
        run("search", *out, "--words=duck")


def test_an_encoder_that_does_not_fit_is_named(capsys, tmp_path, monkeypatch):
    class Mixed(FakeEmbedder):
        """Images are unrelated to their texts."""

        alignment = None
        text_tokenizer = types.SimpleNamespace(encode=list)  # a token a letter

        def embed_images(self, images, drop=0.0, rng=None):
            names = [(f"a{i[0, 0, 0]}", f"b{i[0, 0, 1]}") for i in images]
            return self._embed(names, "image", drop, rng)

    monkeypatch.setattr(family, "_load_models", lambda _: (Tokenizer(), Mixed()))
    path = build(tmp_path)
    assert "note: the encoder does not suit these documents" in capsys.readouterr().out
    run("search", f"--memory={path}", f"--out={tmp_path}/a.png", "--text=x y", "--json")
    note = output(capsys)["note"]
    assert "of 40 samples (50% is chance), and their words take" in note
    assert "racm3 fit --source" in note
    # An encoder that separates texts and images is judged by the words in its vocabulary.
    Mixed.text_tokenizer = types.SimpleNamespace(encode=str.split)
    run("search", f"--memory={path}", f"--out={tmp_path}/a.png", "--text=x y", "--json")
    assert output(capsys)["note"] == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0),
        (["--for=search"], 0),
        (["--for=training"], 4),
        (["--for=training", "--num_query_variants=2"], 2),
    ],
)
def test_training_queries_are_made_when_asked_for(tmp_path, words, expected):
    source, path = forty(tmp_path / "in"), tmp_path / "memory"
    run("build", f"--memory={path}", f"--source={source}", "--index=exact", *words)
    with Memory.load(path) as memory:
        assert memory.num_query_variants == expected
        with pytest.raises(ValueError, match="build --for=training"):
            memory.check_variant(expected + 1)


def test_wrong_input(tmp_path):
    path = build(tmp_path)
    memory = f"--memory={path}"
    with pytest.raises(
        UsageError, match="use it, give another path, or replace it .--over"
    ):
        run("build", f"--source=jsonl:{tmp_path}/in/*.jsonl", memory)
    with pytest.raises(UsageError, match="--text, --image and --words"):
        run("search", memory)
    with pytest.raises(UsageError, match="'no-such'; nothing was removed"):
        run("remove", memory, "--ids=no-such")
    with pytest.raises(UsageError, match="give one of --ids"):
        run("remove", memory)
    with pytest.raises(FileNotFoundError, match="there is no memory"):
        run("verify", f"--memory={tmp_path}/none")
    with pytest.raises(ValueError, match="did you mean 'folder'"):
        run("build", "--source=foldr:x", f"--memory={tmp_path}/m")


def test_build_with_beam(capsys, tmp_path, monkeypatch):
    asked = {}

    def stand_in(source, *, load_models, options, **settings):
        asked.update(options=options, models=(load_models.func, load_models.args))
        tokenizer, embedder = Tokenizer(), FakeEmbedder()
        build_memory(source, tokenizer=tokenizer, embedder=embedder, **settings)

    monkeypatch.setattr(beam_build, "build_memory_with_beam", stand_in)
    words = [f"--source={forty(tmp_path / 'in')}", f"--memory={tmp_path}/m"]
    words += ["--beam=--runner=FnApiRunner --direct_num_workers=2", "--embedder=e"]
    run("build", *words, "--tokenizer=t", "--index=exact")
    assert asked["options"] == ["--runner=FnApiRunner", "--direct_num_workers=2"]
    assert asked["models"] == (family.load_models, ("t", "e"))
    assert "m: 40 documents, exact index" in capsys.readouterr().out


def test_plan(capsys):
    run("plan", "--num_documents=150e6", "--hosts=64")
    assert "150,000,000 documents" in capsys.readouterr().out
    run("plan", "--num_documents=1e6", "--json")
    assert output(capsys)["devices"] == 8


def test_omitted_files_are_shown_and_links_are_followed(capsys, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_corpus(elsewhere, [[line(0), line(1)]])
    (tmp_path / "in").mkdir()
    for file in elsewhere.iterdir():
        (tmp_path / "in" / file.name).symlink_to(file)
    large = line(2, exif="x" * 90_000)
    (tmp_path / "in" / "own.jsonl").write_text(large)
    words = (f"--source=jsonl:{tmp_path}/in/*.jsonl", "--max_bad=0.5", "--index=exact")
    run("build", f"--memory={tmp_path}/memory", *words)
    shown = capsys.readouterr().out
    assert "1 documents, exact index" in shown
    assert "bad: 1 link outside the folder" in shown
    assert "left out: 1 oversized metadata value" in shown
    run("build", f"--memory={tmp_path}/all", "--follow_links", *words)
    shown = capsys.readouterr().out
    assert "3 documents, exact index" in shown and "bad 0" in shown
    run("add", f"--memory={tmp_path}/memory", "--follow_links", *words[:2])
    assert "added 2 documents" in capsys.readouterr().out
