"""The training loss: it learns, and its two players do not touch each other."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import (
    Discriminator,
    VQGANLossConfig,
    adversarial_terms,
    init_vqgan,
    normalize_images,
    vqgan_loss,
)

CONFIG = VQGANConfig(
    image_size=16,
    stem_patch=4,
    channels=16,
    channel_multipliers=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=16,
    num_codes=64,
    d_code=3,
    quantizer="fsq",
    fsq_levels=(4, 4, 4),
    norm_groups=4,
)
LOSS = VQGANLossConfig(
    l2_weight=1.0,
    edge_weight=0.5,
    adversarial_weight=0.01,
    adversarial_start=40,
    discriminator_channels=8,
    discriminator_layers=2,
)
KEY = jax.random.key(0)


def make_shapes(num: int, seed: int) -> np.ndarray:
    """Coloured rectangles on coloured grounds."""
    rng = np.random.default_rng(seed)
    images = np.zeros((num, 16, 16, 3), np.uint8)
    for image in images:
        image[:] = rng.choice([20, 120, 230], 3)
        top, left = rng.integers(0, 3, 2) * 4
        image[top : top + 8, left : left + 8] = rng.choice([20, 120, 230], 3)
    return images


def norm(tree) -> float:
    return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))


def test_a_short_training_learns_and_uses_the_codes():
    """With the adversary from step 40 on, under one optimizer."""
    init = jax.jit(functools.partial(init_vqgan, CONFIG, LOSS))
    params = nn.meta.unbox(init(KEY))
    assert set(params) == {"vqgan", "discriminator"}
    loss_fn, optimizer = vqgan_loss(CONFIG, LOSS), optax.adam(3e-3)

    @jax.jit
    def train(params, opt_state, images, step):
        gradient, metrics = jax.grad(loss_fn, has_aux=True)(
            params, {"images": images}, KEY, step
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics

    opt_state, history = optimizer.init(params), []
    fresh = jax.device_get(params["discriminator"])
    for step in range(80):
        images = jnp.asarray(make_shapes(16, step))
        params, opt_state, metrics = train(params, opt_state, images, step)
        history.append({name: float(v / w) for name, (v, w) in metrics.items()})
        if step == LOSS.adversarial_start - 1:
            jax.tree.map(np.testing.assert_array_equal, fresh, params["discriminator"])
    psnr = [means["psnr"] for means in history]
    assert np.mean(psnr[-5:]) > psnr[0] + 4.0
    assert history[-1]["codebook_usage"] > 0.3
    assert float(metrics["psnr"][1]) == 16.0
    assert all(np.isfinite(list(means.values())).all() for means in history)
    kernel = params["discriminator"]["conv_0"]["kernel"]
    assert not np.array_equal(fresh["conv_0"]["kernel"], kernel)


def test_each_player_has_its_own_gradient():
    images = jnp.asarray(make_shapes(2, 0) / np.float32(127.5) - 1.0)
    discriminator = Discriminator(LOSS.discriminator_channels, 2)
    params = nn.meta.unbox(jax.jit(discriminator.init)(KEY, images))["params"]

    @functools.partial(jax.jit, static_argnames="name")
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, recon, name):
        return adversarial_terms(LOSS, params, recon, images, 40)[name][1]

    own_params, own_recon = gradient(params, -images, name="discriminator")
    other_params, other_recon = gradient(params, -images, name="adversarial")
    assert norm(own_params) > 0.0 and norm(other_recon) > 0.0
    assert norm(own_recon) == 0.0 and norm(other_params) == 0.0


def test_bytes_become_the_range_of_the_network():
    pixels = jnp.asarray([0, 255], jnp.uint8)
    np.testing.assert_allclose(normalize_images(pixels), [-1.0, 1.0])
    floats = jnp.asarray([0.25, -0.5])
    np.testing.assert_array_equal(normalize_images(floats), floats)


def test_without_an_adversary_there_is_no_discriminator():
    shapes = jax.eval_shape(
        functools.partial(init_vqgan, CONFIG, VQGANLossConfig()), KEY
    )
    assert set(shapes) == {"vqgan"}


def test_a_negative_weight_is_named():
    with pytest.raises(ValueError, match="vqgan_loss.l1_weight must be >= 0; got -1"):
        VQGANLossConfig(l1_weight=-1)
