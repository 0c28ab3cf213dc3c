"""CLIP from three layouts: one set of weights, one set of embeddings."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from porting_fakes import (
    CLIP_CONFIG,
    MERGES,
    clip_state,
    openai_clip_state,
    write_hf_clip,
    write_merges,
    write_torch_file,
)

from racm3_jax.checkpoints import load_weights, verify_manifest
from racm3_jax.porting.clip import convert_clip
from racm3_jax.porting.rules import flatten
from racm3_jax.porting.tensors import PortingError
from racm3_jax.retrieval.embedder import DocumentEmbedder


def write_openai(folder, state):
    folder.mkdir()
    facts = {"input_resolution": np.array(16), "context_length": np.array(9)}
    write_torch_file(folder / "ViT.pt", openai_clip_state(state) | facts)
    write_merges(folder / "merges.txt")
    return folder / "ViT.pt"


def write_openclip(folder, state, *, wrapped):
    folder.mkdir()
    state = openai_clip_state(state)
    if wrapped:
        text = ("token_emb", "positional", "transformer", "ln_final", "text_proj")
        state = {
            ("text." if n.startswith(text) else "") + n: x for n, x in state.items()
        }
    safetensors.numpy.save_file(state, folder / "open_clip_model.safetensors")
    record = {
        "model_cfg": {
            "quick_gelu": True,
            "vision_cfg": {"width": 64, "head_width": 64},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    write_merges(folder / "merges.txt")
    return folder


def test_layouts_of_the_same_weights_are_equal(tmp_path):
    state = clip_state(CLIP_CONFIG)
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, state)
    sources = {
        "hf": tmp_path / "hf",
        "openai": write_openai(tmp_path / "openai", state),
        "openclip": write_openclip(tmp_path / "oc", state, wrapped=False),
        "wrapped": write_openclip(tmp_path / "ocw", state, wrapped=True),
    }
    converted = {}
    for name, source in sources.items():
        out = tmp_path / "out" / name
        config = convert_clip(source, out)
        means = (
            (0.5,) * 3 if name in ("openclip", "wrapped") else CLIP_CONFIG.image_mean
        )
        assert config == dataclasses.replace(
            CLIP_CONFIG, image_mean=means, image_std=config.image_std
        )
        assert verify_manifest(out) is None
        converted[name] = flatten(load_weights(out, "clip")[0])
    for params in converted.values():
        assert params.keys() == converted["hf"].keys()
        for name, array in params.items():
            np.testing.assert_array_equal(array, converted["hf"][name], name)
    embedder = DocumentEmbedder.load(tmp_path / "out" / "hf", batch_size=2)
    assert embedder.embed_texts(["the flag", "of"]).shape == (2, CLIP_CONFIG.d_embed)


def test_half_precision_is_kept(tmp_path):
    state = {n: x.astype(np.float16) for n, x in clip_state(CLIP_CONFIG).items()}
    state["logit_scale"] = state["logit_scale"].astype(np.float32)
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, state)
    convert_clip(tmp_path / "hf", tmp_path / "out")
    params = flatten(load_weights(tmp_path / "out")[0])
    name = "vision_model.embeddings.class_embedding"
    np.testing.assert_array_equal(params["vision/class_embedding"], state[name])
    assert params["vision/class_embedding"].dtype == np.float32
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(x.size for x in state.values())


def test_tokens_are_openais(tmp_path):
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    convert_clip(tmp_path / "hf", tmp_path / "out")
    tokenizer = DocumentEmbedder.load(tmp_path / "out").tokenizer
    the, flag, of = 512 + 1, 512 + 4, 512 + 5
    ids = tokenizer.encode_batch(["The  FLAG of", "&lt;<|endoftext|>"])
    assert ids[0].tolist() == [518, the, flag, of, 519, 0, 0, 0, 0]
    assert ids[1].max() == 519 and (ids[1] == 519).sum() == 1
    assert tokenizer.text.decode(ids[0][1:4]) == "the flag of"


@pytest.mark.parametrize("fault", ["missing", "extra", "nan", "merges", "mlp"])
def test_nothing_is_written_when_something_is_wrong(tmp_path, fault):
    state = clip_state(CLIP_CONFIG)
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        state["logit_bias"] = np.zeros(1, np.float32)
        name = "logit_bias"
    elif fault == "nan":
        state[name][3] = np.nan
    elif fault == "mlp":
        state[name] = np.zeros(100, np.float32)
        name += " is [100], not [256]"
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, state)
    if fault == "merges":
        (tmp_path / "hf" / "merges.txt").write_text("\n".join(["#", *MERGES[:2]]))
        name = "merges of another model"
    with pytest.raises(PortingError) as error:
        convert_clip(tmp_path / "hf", tmp_path / "out")
    assert name in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_filled_folder_is_not_overwritten(tmp_path):
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="left alone"):
            convert_clip(tmp_path / "hf", tmp_path / "hf", overwrite=overwrite)
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    out = tmp_path / "out"
    convert_clip(tmp_path / "hf", out)
    with pytest.raises(FileExistsError, match="already"):
        convert_clip(tmp_path / "hf", out)
    convert_clip(tmp_path / "hf", out, overwrite=True)
    # A folder with a file of the user's must not be changed.
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        convert_clip(tmp_path / "hf", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_the_activation_of_a_bare_file_must_be_given(tmp_path):
    state = openai_clip_state(clip_state(CLIP_CONFIG))
    safetensors.numpy.save_file(state, tmp_path / "m.safetensors")
    write_merges(tmp_path / "merges.txt")
    with pytest.raises(PortingError, match="--activation"):
        convert_clip(tmp_path / "m.safetensors", tmp_path / "out")
    out = tmp_path / "out"
    config = convert_clip(tmp_path / "m.safetensors", out, activation="gelu")
    assert config.activation == "gelu"


def test_another_model_is_named(tmp_path):
    safetensors.numpy.save_file({"a.b": np.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(PortingError, match=r"not a CLIP with ViT towers.*a\.b"):
        convert_clip(tmp_path / "m.safetensors", tmp_path / "out")
