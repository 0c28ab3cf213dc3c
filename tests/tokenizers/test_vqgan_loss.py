"""The training loss: it learns, and its two players do not touch each other."""

from __future__ import annotations

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from racm3_jax.tokenizers import vqgan_loss as vqgan_loss_lib
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
    return float(sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(tree)))


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


def test_codes_follow_the_mean_of_their_latents_and_unused_ones_move():
    """a a b: code 0 is chosen twice, 1 once, 2 never; the gradient is old less new."""
    codebook = jnp.array([[0.0, 0.0], [8.0, 0.0], [50.0, 50.0]])
    means = {"counts": jnp.array([1.0, 1.0, 0.1]), "sums": codebook * 1.0}
    params = {"vqgan": {"codebook": codebook}, "codebook_means": means}
    latents = jnp.array([[1.0, 0.0], [3.0, 0.0], [8.0, 6.0]])
    quantized = types.SimpleNamespace(
        latents=latents[None, None], codes=jnp.array([[0, 0, 1]])
    )
    settings = VQGANLossConfig(codebook_decay=0.5, revive_below=0.1)

    def moved(params):
        return vqgan_loss_lib._move_codes(settings, params, quantized, KEY)

    differentiate = jax.jit(jax.value_and_grad(moved, has_aux=True))
    (zero, facts), gradient = differentiate(params)
    assert float(zero) == 0 and float(facts["codes_revived"]) == 1
    assert float(facts["codes_in_use"]) == pytest.approx(2 / 3)
    new = jax.tree.map(lambda old, g: old - g, params, gradient)
    # Counts are 1/2 · 1 + 1/2 · 2 and 1/2 · 1 + 1/2 · 1; sums (0 + 4) / 2, (8 + 8) / 2, 3.
    np.testing.assert_allclose(new["codebook_means"]["counts"], [1.5, 1.0, 0.2])
    found = np.asarray(new["vqgan"]["codebook"])
    np.testing.assert_allclose(found[:2], [[4 / 3, 0], [8, 3]], rtol=1e-6)
    assert any(np.allclose(found[2], latent, atol=1e-5) for latent in latents)


def test_a_codebook_that_is_a_grid_cannot_follow():
    with pytest.raises(ValueError, match="quantizer is 'fsq': set it to 0"):
        init_vqgan(CONFIG, VQGANLossConfig(codebook_decay=0.9), KEY)
