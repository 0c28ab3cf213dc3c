"""The generating commands: how they call the generator, and what they write."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
from PIL import Image

from racm3_jax import cli
from racm3_jax.generation.classification import Classification
from racm3_jax.own_files import PNG_KEY
from racm3_jax.types import (
    Document,
    DraftCounts,
    GenerationOutput,
    Retrieved,
    Segment,
    TokenizedDocument,
)


def grey_image(level=0):
    return np.full((8, 8, 3), level, np.uint8)


class Recorder:
    """In place of `Generator`: records calls and returns fixed samples."""

    retriever = None

    def __init__(self):
        self.calls = []

    def __getattr__(self, task):
        def call(*args, **kwargs):
            self.calls.append((task, args, kwargs))
            if task == "classify":
                probabilities = np.array([0.25, 0.75], np.float32)
                return Classification("wug", ("dax", "wug"), probabilities, 2)
            if task == "attribute":
                return np.array([12.345], np.float32)
            if kwargs.get("on_progress"):
                tokens = np.zeros((1, 1, 2), np.int32)
                kwargs["on_progress"](
                    types.SimpleNamespace(
                        tokens=tokens,
                        num_sampled=2,
                        max_new_tokens=4,
                        tokens_per_second=9.0,
                    )
                )
            return self.answer(task)

        return call

    def preview(self, progress):
        return np.full((1, 1, 8, 8, 3), 77, np.uint8)

    def quantized(self):
        self.is_quantized = True
        return self

    def answer(self, task):
        nearest = {"nearest": {"id": "m1", "equal_codes": 0.95}, "near_copy": True}
        new = (Segment(text="words"), Segment(image=grey_image(9)))
        documents = [
            Document(f"{task}-7-0", new, metadata={"given_segments": 0} | nearest),
            Document(f"{task}-7-1", new, metadata={"given_segments": 0}),
        ]
        shown = TokenizedDocument("m1", (), "http://x", {"licence": "CC0"})
        retrieved = Retrieved(np.array([1]), np.array([0.5], np.float32), (shown,))
        drafts = DraftCounts("table", 8, 18.5, 0.75)
        scores = np.array([0.2, 0.1])
        return GenerationOutput(documents, scores, retrieved, "a flag", 7, drafts)


@pytest.fixture
def generator(monkeypatch, tmp_path):
    recorder = Recorder()

    def load(path, memory, mesh):
        recorder.mesh = mesh
        return recorder

    monkeypatch.setattr("racm3_jax.run.load", load)
    monkeypatch.chdir(tmp_path)
    for name, level in (("a.png", 10), ("b.png", 20)):
        Image.fromarray(grey_image(level)).save(tmp_path / name)
    mask = grey_image()
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return recorder


def kwargs_of(generator):
    return generator.calls[-1][2]


def run(*arguments):
    assert cli.main([*arguments, "--workdir=w"]) == 0


def test_an_image_has_its_record_inside_and_in_a_file(generator, capsys):
    run(
        "generate",
        "--prompt=a flag",
        "--out=x.png",
        "--guidance=3",
        "--min_p=0.05",
        "--seed=7",
        "--scale=2",
        "--json",
    )
    printed = json.loads(capsys.readouterr().out)
    with Image.open("x.png") as image:
        inside = json.loads(image.text[PNG_KEY])  # pyright: ignore[reportAttributeAccessIssue]
    with open("x.json") as file:
        record_in_file = json.load(file)
    assert printed == inside == record_in_file
    assert printed["samples"] == ["x-0.png", "x-1.png"]
    with Image.open("x-1.png") as image:
        alone = json.loads(image.text[PNG_KEY])  # pyright: ignore[reportAttributeAccessIssue]
        assert image.size == (16, 16) and alone == inside | {"sample": 1}
    run("caption", "--image=x.png", "--json")
    note = json.loads(capsys.readouterr().out)["note"]
    assert (
        note == "x.png is a sheet of 2 samples: give one of them, the best is x-0.png"
    )
    run("caption", "--image=x-0.png", "--json")
    assert json.loads(capsys.readouterr().out)["note"] == ""
    del generator.calls[1:]
    assert printed["prompt"] == "a flag" and printed["seed"] == 7
    assert printed["retrieved"] == [
        {"id": "m1", "score": 0.5, "source": "http://x", "licence": "CC0"}
    ]
    assert printed["settings"]["guidance"] == 3.0
    assert printed["settings"]["min_p"] == kwargs_of(generator)["min_p"] == 0.05
    assert printed["settings"]["draft"] == kwargs_of(generator)["draft"] == "auto"
    assert printed["drafts"] == {
        "source": "table", "window": 8, "passes": 18.5, "acceptance": 0.75
    }  # fmt: skip
    assert printed["near_copies"] == [{"sample": 0, "id": "m1", "equal_codes": 0.95}]
    assert set(printed["versions"]) == {"racm3_jax", "jax", "python"}
    ((task, args, kwargs),) = generator.calls
    assert (task, args) == ("text_to_image", ("a flag",))
    assert "documents" not in kwargs and kwargs["num_retrieved"] == 2


def test_8_bit_weights_are_refused_on_a_cpu(generator, capsys):
    arguments = ["generate", "--prompt=a", "--int8", "--workdir=w"]
    assert cli.main(arguments) == 2
    assert "--int8 is for accelerators" in capsys.readouterr().err
    assert not generator.calls


def test_near_copies_are_named_and_previews_written(generator, capsys, monkeypatch):
    monkeypatch.setattr("racm3_jax.sharding.current_platform", lambda: "gpu")
    arguments_of_generate = (
        "--document",
        "a.png",
        "red",
        "--preview=p.png",
        "--int8",
        "--tensor=2",
    )
    run("generate", "--prompt=a", *arguments_of_generate)
    out = capsys.readouterr().out
    assert "wrote sample.png" in out and "retrieved m1 (score 0.500)" in out
    assert (
        "warning: sample 0 is nearly a copy of m1 (95% of the codes are equal)" in out
    )
    assert (np.asarray(Image.open("p.png")) == 77).all()
    assert generator.is_quantized
    assert generator.mesh.shape["tensor"] == 2 and generator.mesh.size == 8
    task, (prompt, (shown,)), options = generator.calls[0]
    assert task == "continue_" and prompt == "a" and options["num_neighbours"] == 0
    assert shown.text == "red" and (shown.images[0] == 10).all()


def test_free_generation_reads_and_writes_lists(generator, tmp_path, capsys):
    parts = [{"text": "look"}, {"image": "a.png"}]
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    run("generate", "--parts=parts.json", "--out=free.png", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["written"][1] == [{"text": "words"}, {"image": "free_1_1.png"}]
    assert (np.asarray(Image.open("free_1_1.png")) == 9).all()
    text, image = generator.calls[0][1][0]
    assert text == "look" and (image == 10).all()


def test_infill_takes_a_box_a_mask_or_a_text(generator, capsys):
    run("infill", "--image=a.png", "--box=4,0,8,8", "--prompt=a flag")
    run("infill", "--image=a.png", "--mask=mask.png", "--preview=p.png")
    assert (np.asarray(Image.open("p.png")) == 77).all()
    run("infill", "--text=the <mask> flag")
    (box, mask, text) = generator.calls
    assert box[1][1:] == ((4, 0, 8, 8), "a flag")
    assert mask[1][1].dtype == bool and mask[1][1].sum() == 32
    assert text[0] == "infill_text" and text[1] == ("the <mask> flag", None)
    assert "words" in capsys.readouterr().out
    run("infill", "--text=the <mask> flag", "--json")
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["num_retrieved"] == 2 and None not in settings.values()


def test_edit_and_caption(generator, capsys):
    run(
        *("edit", "--image=a.png", "--box=0,0,8,8", "--document", "b.png", "red"),
        *("--num_neighbours=1", "--rank_by=document", "--json", "--preview=p.png"),
    )
    assert (np.asarray(Image.open("p.png")) == 77).all()
    assert json.loads(capsys.readouterr().out)["out"] == "sample.png"
    run("caption", "--image=a.png", "--caption_prompt=last", "--prefix=Photo of")
    assert capsys.readouterr().out.startswith("words\nwords\n")
    edit, caption = generator.calls
    assert edit[0] == "edit" and (edit[1][2][0].images[0] == 20).all()
    assert edit[2]["num_neighbours"] == 1 and edit[2]["rank_by"] == "document"
    assert caption[2]["caption_prompt"] == "last"


def test_contributions_of_documents_are_printed_on_request(generator, capsys):
    for command in (
        ("generate", "--prompt=a flag"),
        ("caption", "--image=a.png"),
        ("infill", "--image=a.png", "--box=4,0,8,8"),
        ("edit", "--image=a.png", "--box=4,0,8,8", "--document", "b.png", "red"),
    ):
        run(*command, "--attribute")
        assert "retrieved m1 (score 0.500, +12 bits)" in capsys.readouterr().out
        run(*command, "--json")
        assert "bits" not in json.loads(capsys.readouterr().out)["retrieved"][0]
    run("caption", "--image=a.png", "--attribute", "--json")
    assert json.loads(capsys.readouterr().out)["retrieved"][0]["bits"] == 12.35
    command = ["infill", "--text=the <mask> flag", "--attribute", "--workdir=w"]
    assert cli.main(command) == 2
    assert "--attribute is for images and captions" in capsys.readouterr().err
    command = ["infill", "--text=the <mask> flag", "--guidance=2", "--workdir=w"]
    assert cli.main(command) == 2
    assert "add --guide_documents" in capsys.readouterr().err


def test_classify_reads_a_support_set(generator, tmp_path, capsys):
    support = [{"image": "a.png", "label": "dax"}, {"image": "b.png", "label": "wug"}]
    (tmp_path / "s.json").write_text(json.dumps(support))
    run("classify", "--image=a.png", "--support=s.json", "--labels=dax,wug")
    assert capsys.readouterr().out == "wug\n  dax 0.250\n  wug 0.750\n"
    run("classify", "--image=a.png", "--support=s.json", "--json")
    assert json.loads(capsys.readouterr().out)["passes"] == 2
    _, (_, examples, labels), _ = generator.calls[0]
    assert [label for _, label in examples] == ["dax", "wug"] == labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", "--image=a.png"], "give the region as --box=left,top,right,bottom"),
        (["infill", "--image=a.png", "--box=1,2"], "--box is '1,2'; write left,top"),
        (["infill"], "infill needs --image with --box or --mask, or --text"),
        (["infill", "--text=a <mask>", "--box=1,2,3,4"], "--text fills in words"),
        (
            ["infill", "--text=a <mask>", "--rank_by=document"],
            "--text writes no image",
        ),
        (["infill", "--text=a <mask>", "--preview=p.png"], "remove --preview"),
        (["generate", "--parts=b.json", "--preview=p.png"], "remove --preview"),
        (["classify", "--image=a.png", "--support=a.json"], "a.json is not JSON"),
        (["generate", "--parts=b.json"], "must be a JSON list of objects"),
        (
            ["generate", "--prompt=a", "--num_neighbours=1"],
            "--num_neighbours adds documents similar to those of --document",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(
    generator, tmp_path, capsys, arguments, message
):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('["text"]')
    assert cli.main([*arguments, "--workdir=w"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not generator.calls
