"""Every option that is a path takes URLs, or refuses them in one sentence."""

from __future__ import annotations

import argparse
import pathlib

import pytest

from racm3_jax import cli, run
from racm3_jax.commands import arguments as options
from racm3_jax.documents.images import read_image
from racm3_jax.memory import beam, builder, edit

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
TINY, LIKELIHOOD = CONFIGS / "flagworld_tiny.py", CONFIGS / "eval" / "likelihood.py"
# Options that may be URLs, by command.
URLS = {
    *((c, "memory") for c in ("generate", "caption", "infill", "edit", "demo")),
    *((f"memory {a}", "memory") for a in ("search", "stats", "verify")),
    ("train", "workdir"),
    ("memory remove", "ids"),
}
# Texts that are not paths.
TEXTS = {
    *("prompt", "text", "prefix", "labels", "box", "url_pattern", "licence", "part"),
    *("index", "engine", "beam", "deduplicate", "device", "topology"),
    *("profile_steps", "document", "example", "group_key", "words"),
    # Refused by its reader (`configs.load_config_module`).
    "config",
    # Sources: each kind checks its own path.
    *("source", "held_out", "holdout"),
}


def walk(parser, name=""):
    """(command, option, its type) of every option with a string value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                yield from walk(sub, f"{name} {command}".strip())
        elif action.nargs != 0 and action.choices is None:
            yield name, action.dest, action.type


def test_every_path_option_has_a_type_that_handles_urls():
    found = list(walk(cli._parser()))
    assert {(c, d) for c, d, t in found if t is options.place} == URLS
    assert len([1 for _, _, t in found if t is options.path]) > 60
    for command, name, kind in found:
        if kind in (None, options.non_empty):
            assert name in TEXTS, f"{command} --{name} may be a path: give it a type"


@pytest.mark.parametrize(
    "words",
    [
        "quickstart --workdir=gs://a/b",
        "evaluate --workdir=gs://a/b",
        "sweep --workdir=gs://a/b",
        "generate --workdir=gs://a/b --prompt=x",
        "generate --workdir=here --prompt=x --out=gs://a/b.png",
        "memory build --source=folder:x --memory=gs://a/b",
        "memory add --source=folder:x --memory=gs://a/b",
        "memory remove --ids=x --memory=gs://a/b",
        "memory neighbours --memory=gs://a/b",
        "memory build --source=folder:gs://a/b --memory=here",
        "convert clip gs://a/b here",
        "support --example gs://a/b.png cat",
        "support --folder=gs://a/b",
        "train --config=gs://a/b.py --workdir=here",
        f"train --config={TINY} --workdir=here --config.embedder=s3://a/b",
        f"train --config={TINY} --workdir=gs://a/b --config.tokenizer.text=s3://a/b",
        f"evaluate --config={LIKELIHOOD} --workdir=here --config.models=gs://a/b",
    ],
)
def test_urls_are_refused_at_once_where_unsupported(
    words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert "is a URL, but" in said or "is in a bucket, from which" in said
    assert "webdataset" in said and said.count("racm3: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda: run.load("gs://a/b"),
        lambda: read_image("gs://a/b.png"),
        lambda: edit.compact("gs://a/b"),
        lambda: builder.build_memory([], tokenizer=0, embedder="", path="gs://a/b"),
        lambda: beam.build_memory_with_beam("x", load_models=lambda: 0, path="gs://a"),  # type: ignore[arg-type]
    ],
)
def test_urls_are_also_refused_from_python(call):
    with pytest.raises((ValueError, ImportError), match="is a URL, but|Beam"):
        call()


def test_a_memory_at_a_url_is_opened_from_its_copy(gs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = f"--memory_cache={tmp_path}/cache"
    assert cli.main(["memory", "verify", "--memory=gs://me/none", cache]) == 2
    said = capsys.readouterr().err
    assert said.startswith("racm3: there is no memory at gs://me/none")
