"""VQGAN from taming's and diffusers' layouts."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from porting_fakes import write_torch_file
from vqgan_fakes import DIFFUSERS_RECORD, VQGAN_CONFIG, diffusers_state, vqgan_state

from racm3_jax.checkpoints import load_weights, verify_manifest
from racm3_jax.porting.rules import flatten
from racm3_jax.porting.tensors import PortingError
from racm3_jax.porting.vqgan import convert_vqgan
from racm3_jax.tokenizers.image import ImageTokenizer


def write_diffusers(folder, state, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DIFFUSERS_RECORD | changes))
    path = folder / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file(state, path)


def test_layouts_of_the_same_weights_are_equal(tmp_path):
    state = vqgan_state(VQGAN_CONFIG)
    discriminator = {"loss.discriminator.main.0.bias": np.zeros(2, np.float32)}
    write_torch_file(tmp_path / "last.ckpt", state | discriminator)
    write_diffusers(tmp_path / "diffusers", diffusers_state(state))
    params = []
    for source, size in ((tmp_path / "last.ckpt", 16), (tmp_path / "diffusers", None)):
        out = tmp_path / "out" / source.name
        assert convert_vqgan(source, out, image_size=size) == VQGAN_CONFIG
        assert verify_manifest(out) is None
        params.append(flatten(load_weights(out, "vqgan")[0]))
    assert params[0].keys() == params[1].keys()
    for name, array in params[0].items():
        np.testing.assert_array_equal(array, params[1][name], name)


def test_gumbel_codes_are_the_best_scores(tmp_path):
    """Against the scores, computed here from the latents with NumPy."""
    config = dataclasses.replace(VQGAN_CONFIG, quantizer="gumbel")
    state = vqgan_state(config)
    write_torch_file(tmp_path / "gumbel.ckpt", state)
    out = tmp_path / "out"
    assert convert_vqgan(tmp_path / "gumbel.ckpt", out, image_size=16) == config
    tokenizer = ImageTokenizer.load(out, batch_size=2)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    codes = tokenizer.encode(images)

    from racm3_jax.tokenizers.vqgan import VQGAN

    pixels = images.astype(np.float32) / 127.5 - 1
    apply = jax.jit(VQGAN(config).apply, static_argnames="method")
    latents = apply({"params": tokenizer.params}, pixels, method="encode")
    weight = state["quantize.proj.weight"][:, :, 0, 0]
    scores = np.asarray(latents) @ weight.T + state["quantize.proj.bias"]
    np.testing.assert_array_equal(codes, scores.argmax(-1).reshape(2, -1))
    assert len(np.unique(codes)) > 3
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize(
    "fault, words",
    [
        ("decoder", "no decoder"),
        ("setting", "norm_type='spatial'"),
        ("missing", "decoder.mid_block.resnets.1.conv2.bias"),
    ],
)
def test_mismatches_are_named(tmp_path, fault, words):
    state = diffusers_state(vqgan_state(VQGAN_CONFIG))
    changes = {}
    if fault == "decoder":
        state = {n: x for n, x in state.items() if not n.startswith("decoder.")}
    elif fault == "setting":
        changes["norm_type"] = "spatial"
    else:
        del state[words]
    write_diffusers(tmp_path / "diffusers", state, **changes)
    with pytest.raises(PortingError, match=words.replace(".", r"\.")):
        convert_vqgan(tmp_path / "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
