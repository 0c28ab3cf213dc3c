"""The commands convert, export and tokenize."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racm3_jax import cli
from racm3_jax.commands import convert
from racm3_jax.documents.images import read_image

sys.path.insert(0, str(Path(__file__).parent.parent / "porting"))

from porting_fakes import (
    CLIP_CONFIG,
    clip_state,
    write_hf_clip,
    write_torch_file,
    write_torch_zip,
)
from vqgan_fakes import VQGAN_CONFIG, vqgan_state


def racm3(*words):
    parser = argparse.ArgumentParser()
    convert.register(parser.add_subparsers())
    arguments = parser.parse_args([str(word) for word in words])
    arguments.command(arguments)


def test_converting_and_exporting_a_clip_is_bit_exact(tmp_path, capsys):
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    racm3("convert", "clip", tmp_path / "hf", tmp_path / "ours")
    racm3("export", tmp_path / "ours", tmp_path / "back", "--format=hf")
    racm3("convert", "clip", tmp_path / "back", tmp_path / "again")
    assert capsys.readouterr().out.count("wrote") == 3
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        ours, again = (tmp_path / folder / name for folder in ("ours", "again"))
        assert ours.read_bytes() == again.read_bytes(), name

    from racm3_jax.porting.files import open_tensors

    before, after = open_tensors(tmp_path / "hf"), open_tensors(tmp_path / "back")
    assert before.tensors == after.tensors
    for name in before.tensors:
        np.testing.assert_array_equal(before.read(name), after.read(name), name)


def test_roundtrip_of_a_photo(tmp_path, capsys):
    write_torch_file(tmp_path / "v.ckpt", vqgan_state(VQGAN_CONFIG))
    racm3("convert", "vqgan", tmp_path / "v.ckpt", tmp_path / "v", "--image_size=16")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    capsys.readouterr()
    tokenize = ("tokenize", tmp_path / "photo.png", "--tokenizer", tmp_path / "v")
    racm3(*tokenize)
    codes = capsys.readouterr().out.split()
    assert len(codes) == VQGAN_CONFIG.image_length
    assert all(0 <= int(code) < VQGAN_CONFIG.num_codes for code in codes)
    (tmp_path / "tokenizer").mkdir()  # the folder of a whole tokenizer
    (tmp_path / "tokenizer" / "image").symlink_to(tmp_path / "v")
    racm3(*tokenize[:-1], tmp_path / "tokenizer")
    assert capsys.readouterr().out.split() == codes
    racm3(*tokenize, "--roundtrip", "--out", tmp_path / "both.png")
    out = capsys.readouterr().out
    assert out.startswith("PSNR ") and f"{len(set(codes))} different codes" in out
    assert read_image(tmp_path / "both.png").shape == (16, 32, 3)


def test_an_option_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--merges has no effect for vqgan"):
        racm3("convert", "vqgan", tmp_path, tmp_path / "out", "--merges=x")


def test_the_licence_of_chameleon_is_shown(tmp_path):
    with pytest.raises(ValueError, match="research only.*--accept_licence"):
        racm3("convert", "chameleon", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Malicious:
    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("malicious", "calls builtins.print"),
        ("truncated", "is truncated"),
        ("nan", "holds a NaN"),
        ("merges", "merges of another model"),
        ("absent", "does not exist"),
    ],
)
def test_a_bad_source_is_refused_in_one_sentence_and_leaves_nothing(
    tmp_path, capsys, fault, words
):
    state = clip_state(CLIP_CONFIG)
    if fault == "nan":
        state["logit_scale"] = np.array(np.nan, np.float32)
    source = tmp_path / "hf"
    write_hf_clip(source, CLIP_CONFIG, state)
    weights = source / "model.safetensors"
    if fault == "malicious":
        weights.unlink()
        program = pickle.dumps({"state_dict": Malicious()}, 2).replace(
            b"__builtin__", b"builtins"
        )
        write_torch_zip(source / "pytorch_model.bin", program, {})
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif fault == "merges":
        (source / "merges.txt").write_text("#version\nt h\n")
    elif fault == "absent":
        source = tmp_path / "none"
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", "clip", str(source), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("racm3: ") and message.count("\n") == 1
    assert words in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_of_the_hub(tmp_path, monkeypatch, capsys):
    """From a folder in huggingface_hub's cache layout, by name, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--clip"
    write_hf_clip(
        repository / "snapshots" / ("a" * 40), CLIP_CONFIG, clip_state(CLIP_CONFIG)
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    out = tmp_path / "out"
    assert cli.main(["convert", "clip", "hub:owner/clip", str(out)]) == 0
    assert (out / "model.safetensors").is_file()
    assert cli.main(["convert", "clip", "hub:owner/none", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert "could not be fetched" in message and message.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_help_explains_each_argument(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    text = capsys.readouterr().out
    for word in ("hub:owner/name", "--accept_licence", "--merges", "safetensors"):
        assert word in text
