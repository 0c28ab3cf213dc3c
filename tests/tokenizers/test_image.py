"""ImageTokenizer: batching, saving, errors, and the two measures."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from vqgan_standins import make_params

from racm3_jax import sharding
from racm3_jax.checkpoints import CheckpointError, save_weights
from racm3_jax.tokenizers.image import (
    ImageTokenizer,
    compute_codebook_usage,
    compute_psnr,
)
from racm3_jax.tokenizers.vqgan import VQGANConfig

CONFIG = VQGANConfig(
    image_size=16,
    stem_patch=4,
    channels=8,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=8,
    num_codes=32,
    d_code=4,
    quantizer="cosine",
    norm_groups=4,
)


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer(CONFIG, make_params(CONFIG), batch_size=4)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    shape = (6, 16, 16, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_any_number_of_images_compiles_two_programs(tokenizer, images):
    codes = tokenizer.encode(images)
    assert codes.shape == (6, tokenizer.image_length) and codes.dtype == np.int32
    np.testing.assert_array_equal(tokenizer.encode(images[:1]), codes[:1])
    pixels = tokenizer.decode(codes)
    assert pixels.shape == images.shape and pixels.dtype == np.uint8
    np.testing.assert_array_equal(tokenizer.decode(codes[5:]), pixels[5:])
    assert tokenizer.encode(images[:0]).shape == (0, tokenizer.image_length)
    assert tokenizer.decode(codes[:0]).shape == (0, 16, 16, 3)
    # Of four images, and of one.
    assert tokenizer._encode._cache_size() == tokenizer._decode._cache_size() == 2


def test_several_devices_share_the_images(tokenizer, images):
    shared = tokenizer.on_mesh(sharding.make_mesh(devices=jax.devices()[:3]))
    codes = tokenizer.encode(images)
    np.testing.assert_array_equal(shared.encode(images), codes)
    np.testing.assert_array_equal(shared.decode(codes), tokenizer.decode(codes))


def test_save_and_load(tokenizer, images, tmp_path):
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))


def test_the_fingerprint_depends_on_weights_and_config(tokenizer):
    params = jax.tree.map(np.array, nn.meta.unbox(tokenizer.params))
    params["quant_conv"]["bias"][0] += 1.0
    changed = ImageTokenizer(CONFIG, params)
    euclidean = dataclasses.replace(CONFIG, quantizer="euclidean")
    other = ImageTokenizer(euclidean, tokenizer.params)
    prints = {t.fingerprint() for t in (tokenizer, changed, other)}
    assert len(prints) == 3


def test_wrong_inputs(tokenizer, images, tmp_path):
    with pytest.raises(ValueError, match=r"must be uint8\[n, 16, 16, 3\]; got float32"):
        tokenizer.encode(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"got uint8\[6, 8, 16, 3\]"):
        tokenizer.encode(images[:, :8])
    with pytest.raises(ValueError, match=r"codes must be int\[n, 4\]; got \[2, 3\]"):
        tokenizer.decode(np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"codes lie in 0\.\.31; got 0\.\.32"):
        tokenizer.decode(np.array([[0, 0, 0, 32]]))
    with pytest.raises(CheckpointError):
        ImageTokenizer.load(tmp_path / "nowhere")
    save_weights(tmp_path, {"a": np.zeros(2, np.float32)}, kind="clip", config={})
    with pytest.raises(CheckpointError):
        ImageTokenizer.load(tmp_path)


def test_psnr_and_usage():
    black, grey = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 51, np.uint8)
    np.testing.assert_allclose(compute_psnr(black, grey), [20 * np.log10(5)])
    np.testing.assert_allclose(compute_psnr(grey, grey), [100.0])
    used, perplexity = compute_codebook_usage(np.array([[0, 1], [2, 3]]), 8)
    assert used == 0.5 and perplexity == pytest.approx(4.0)
