"""Converted Chameleon weights on the command line: a memory, images, captions.

The weights are random: this tests that the commands in the README fit together, not the
images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racm3_jax import cli
from racm3_jax.checkpoints import load_weights
from racm3_jax.porting.files import read_json
from racm3_jax.porting.rules import flatten
from racm3_jax.tokenizers.mixed import MixedTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "porting"))

from chameleon_fakes import hf_record, native_state, write_chameleon
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip, write_torch_file
from vqgan_fakes import VQGAN_CONFIG, vqgan_state

pytestmark = pytest.mark.slow  # eight commands and their compilations
CONFIG = Path(__file__).parent.parent.parent / "configs" / "chameleon_finetune.py"


def racm3(*words):
    status = cli.main([str(word) for word in words])
    assert status == 0, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Public weights and photographs, converted and indexed."""
    folder = tmp_path_factory.mktemp("chameleon")
    record = hf_record(layers=1) | {"max_position_embeddings": 256}
    write_chameleon(folder / "hf", record, native_state(record), "hf")
    write_torch_file(folder / "hf" / "vqgan.ckpt", vqgan_state(VQGAN_CONFIG))
    write_hf_clip(folder / "clip_hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (20, 24 + i, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"the flag of {i}")
    racm3("convert", "clip", folder / "clip_hf", folder / "clip")
    racm3(
        *("convert", "chameleon", folder / "hf", folder / "ours", "--accept_licence"),
        *("--clip", folder / "clip", "--image_size=16"),
    )
    racm3(
        *(
            "memory",
            "build",
            f"--source=folder:{photos}",
            "--memory",
            folder / "memory",
        ),
        *("--tokenizer", folder / "ours" / "tokenizer"),
        *("--embedder", folder / "ours" / "clip"),
        *("--num_query_variants=1", "--index=exact"),
    )
    return folder


def test_generate_and_caption_from_converted_weights(folder, capsys, tmp_path):
    common = ("--workdir", folder / "ours", "--memory", folder / "memory", "--json")
    out = tmp_path / "x.png"
    racm3("generate", *common, "--prompt=the flag", "--num_retrieved=2", "--out", out)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    # With random weights all embeddings are similar, so the second may be dropped.
    assert 1 <= len(record["retrieved"]) <= 2
    with Image.open(out) as picture:
        assert picture.size == (16, 16)
    racm3("caption", *common, "--image", folder / "photos" / "3.png")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["retrieved"] and len(record["captions"]) == 1


def test_without_a_clip_the_sentence_says_how_to_get_one(folder, capsys, tmp_path):
    racm3(
        *("convert", "chameleon", folder / "hf", tmp_path / "ours", "--accept_licence"),
        "--image_size=16",
    )
    words = ("generate", "--workdir", tmp_path / "ours", "--prompt=the flag")
    assert cli.main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--clip" in message


def train(folder, workdir, arg, **changes):
    ours = folder / "ours"
    settings = {
        "init_from": ours / "model",
        "embedder": ours / "clip",
        "memory_path": folder / "memory",
        "tokenizer.text": ours / "tokenizer" / "text",
        "tokenizer.image": ours / "tokenizer" / "image",
        "tokenizer.num_sentinels": 5,
        **{f"model.{name}": value for name, value in _SIZES.items()},
        "pipeline.rows": 8,
        "pipeline.row_length": 256,
        "pipeline.examples_per_batch": 4,
        "masking.max_masks": 5,
        "memory.num_query_variants": 1,
        "optimizer.weight_decay": 0.1,
        "train.num_steps": 2,
        "train.log_every": 1,
        **changes,
    }
    racm3(
        *("train", f"--config={CONFIG}:{arg}", "--workdir", workdir),
        *(f"--config.{name}={value}" for name, value in settings.items()),
    )


_SIZES = {
    "d_model": 32,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 40,
    "max_length": 256,
}


@pytest.mark.parametrize("arg", ["", "image_output"])
def test_fine_tuning_from_converted_weights(folder, arg, tmp_path):
    """Both choices, then export as a Hugging Face folder."""
    train(folder, tmp_path / "tuned", arg)
    before = flatten(load_weights(folder / "ours" / "model", "generator")[0])
    after = flatten(load_weights(tmp_path / "tuned" / "model", "generator")[0])
    assert before.keys() == after.keys()
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    if arg:
        assert changed == {"head"}
        vocab = MixedTokenizer.load(tmp_path / "tuned" / "tokenizer").vocab
        columns = (before["head"] != after["head"]).any(axis=0)
        assert columns.nonzero()[0].tolist() == list(vocab.image_range)
    else:
        assert {"head", "layers_0/attention/value/kernel"} <= changed
    origin = read_json(tmp_path / "tuned" / "origin.json")
    assert origin["licence"] == "Chameleon Research License"
    racm3("export", tmp_path / "tuned", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()
