"""Stored outputs of the reference implementations for the same random weights.

The files are made by tests/golden/porting/make_golden.py.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from chameleon_fakes import hf_record, native_state, write_chameleon
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip, write_torch_file
from vqgan_fakes import VQGAN_CONFIG, vqgan_state

from racm3_jax.checkpoints import load_weights
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import Transformer, compute_logits
from racm3_jax.porting.chameleon import convert_chameleon
from racm3_jax.porting.clip import convert_clip
from racm3_jax.porting.files import read_json
from racm3_jax.porting.vqgan import convert_vqgan
from racm3_jax.retrieval.clip import CLIP, normalise_images
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.vqgan import VQGAN

GOLDEN = Path(__file__).parent.parent / "golden" / "porting"


def test_clip(tmp_path):
    golden = np.load(GOLDEN / "clip.npz")
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    config = convert_clip(tmp_path / "hf", tmp_path / "out")
    params = load_weights(tmp_path / "out", "clip")[0]
    pixels = normalise_images(golden["images"], config)
    apply = jax.jit(CLIP(config).apply)
    image, text, _ = apply({"params": params}, pixels, golden["tokens"])
    for ours, theirs in ((image, "image_embeds"), (text, "text_embeds")):
        ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        error = np.linalg.norm(ours - golden[theirs], axis=1)
        assert error.max() < 1e-5, error


def test_vqgan(tmp_path):
    golden = np.load(GOLDEN / "vqgan.npz")
    write_torch_file(tmp_path / "v.ckpt", vqgan_state(VQGAN_CONFIG))
    convert_vqgan(tmp_path / "v.ckpt", tmp_path / "out", image_size=16)
    tokenizer = ImageTokenizer.load(tmp_path / "out", batch_size=4)
    np.testing.assert_array_equal(tokenizer.encode(golden["images"]), golden["codes"])
    assert len(np.unique(golden["codes"])) > 5
    apply = jax.jit(VQGAN(VQGAN_CONFIG).apply, static_argnames="method")
    decoded = apply(
        {"params": tokenizer.params}, golden["codes"], method="decode_codes"
    )
    np.testing.assert_allclose(decoded, golden["decoded"], rtol=1e-4, atol=1e-4)


def test_chameleon(tmp_path):
    """Their logits equal ours, after permuting the vocabulary."""
    golden = np.load(GOLDEN / "chameleon.npz")
    write_torch_file(tmp_path / "v.ckpt", vqgan_state(VQGAN_CONFIG))
    record = hf_record()
    # From native weights: the rotary order and the shared norms are converted too.
    source = write_chameleon(tmp_path / "n", record, native_state(record), "native")
    config = convert_chameleon(
        source,
        tmp_path / "out",
        vqgan=tmp_path / "v.ckpt",
        accept_licence=True,
        image_size=16,
    )
    params, fields, _ = load_weights(tmp_path / "out" / "model", "generator")
    assert ModelConfig(**fields) == config
    orders = read_json(tmp_path / "out" / "source" / "vocabulary.json")
    ours_of_theirs = np.argsort(orders["inputs"])
    tokens = ours_of_theirs[golden["tokens"]].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = np.ones_like(tokens)

    @jax.jit
    def compute(params):
        inputs = (tokens, positions, segments)
        hidden = Transformer(config).apply({"params": params}, *inputs)
        return compute_logits(params, config, hidden)

    logits = np.asarray(compute(params))
    theirs = golden["logits"][..., np.array(orders["outputs"])]
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-4)
