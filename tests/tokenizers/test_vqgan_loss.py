"""The training loss: it learns, and its two players do not touch each other."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import VQGANLossConfig, init_vqgan, vqgan_loss

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
ADVERSARIAL = VQGANLossConfig(
    l1_weight=1.0,
    adversarial_weight=0.1,
    adversarial_start=5,
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


@functools.cache
def init(config: VQGANConfig, loss: VQGANLossConfig):
    return nn.meta.unbox(jax.jit(functools.partial(init_vqgan, config, loss))(KEY))


@functools.cache
def compute_gradients():
    return jax.jit(jax.grad(vqgan_loss(CONFIG, ADVERSARIAL), has_aux=True))


@functools.cache
def gradients(step: int):
    batch = {"images": jnp.asarray(make_shapes(4, 0))}
    params = init(CONFIG, ADVERSARIAL)
    return compute_gradients()(params, batch, KEY, jnp.asarray(step))


def norm(tree) -> float:
    return float(optax.global_norm(tree))


def test_a_short_training_learns_and_uses_the_codes():
    loss = VQGANLossConfig(l2_weight=1.0, edge_weight=0.5)
    params = init(CONFIG, loss)
    assert set(params) == {"vqgan"}
    loss_fn, optimizer = vqgan_loss(CONFIG, loss), optax.adam(3e-3)

    @jax.jit
    def train(params, opt_state, images, step):
        gradient, metrics = jax.grad(loss_fn, has_aux=True)(
            params, {"images": images}, KEY, step
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics

    opt_state, psnr = optimizer.init(params), []
    for step in range(80):
        images = jnp.asarray(make_shapes(16, step))
        params, opt_state, metrics = train(params, opt_state, images, jnp.asarray(step))
        total, weight = metrics["psnr"]
        psnr.append(float(total / weight))
    assert np.mean(psnr[-5:]) > psnr[0] + 4.0
    total, weight = metrics["codebook_usage"]
    assert float(weight) == 16.0 and float(total / weight) > 0.3


def test_the_discriminator_starts_at_its_step():
    before, metrics_before = gradients(4)
    after, metrics_after = gradients(5)
    assert norm(before["discriminator"]) == 0.0
    assert norm(after["discriminator"]) > 0.0
    assert norm(jax.tree.map(jnp.subtract, before["vqgan"], after["vqgan"])) > 0.0
    assert float(metrics_after["loss"][0]) != float(metrics_before["loss"][0])


def test_each_player_has_its_own_gradient():
    """The discriminator's gradient does not depend on the VQGAN's adversarial weight."""
    params = init(CONFIG, ADVERSARIAL)
    stronger = dataclasses.replace(ADVERSARIAL, adversarial_weight=10.0)
    batch = {"images": jnp.asarray(make_shapes(4, 0))}
    other, _ = jax.jit(jax.grad(vqgan_loss(CONFIG, stronger), has_aux=True))(
        params, batch, KEY, jnp.asarray(5)
    )
    mine, _ = gradients(5)
    for a, b in zip(
        jax.tree.leaves(mine["discriminator"]),
        jax.tree.leaves(other["discriminator"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert norm(other["vqgan"]) > norm(mine["vqgan"])


def test_bytes_and_floats_are_the_same_images():
    params = init(CONFIG, VQGANLossConfig())
    loss_fn = jax.jit(vqgan_loss(CONFIG, VQGANLossConfig()))
    pixels = make_shapes(4, 1)
    scaled = pixels.astype(np.float32) / 127.5 - 1.0
    step = jnp.asarray(0)
    a, _ = loss_fn(params, {"images": jnp.asarray(pixels)}, KEY, step)
    b, _ = loss_fn(params, {"images": jnp.asarray(scaled)}, KEY, step)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_learned_codebooks_have_codebook_gradients():
    config = dataclasses.replace(
        CONFIG, quantizer="cosine", fsq_levels=(), d_code=4, num_codes=32
    )
    loss = VQGANLossConfig(entropy_weight=0.1)
    params = init(config, loss)
    batch = {"images": jnp.asarray(make_shapes(4, 0))}
    gradient, metrics = jax.jit(jax.grad(vqgan_loss(config, loss), has_aux=True))(
        params, batch, KEY, jnp.asarray(0)
    )
    moved = np.abs(np.asarray(gradient["vqgan"]["codebook"])).sum(-1)
    # The entropy term moves every code, also those that no latent chose.
    assert (moved > 0).all()
    assert np.isfinite([float(v) for v, _ in metrics.values()]).all()


def test_a_negative_weight_is_named():
    with pytest.raises(ValueError, match="vqgan_loss.l1_weight must be >= 0; got -1"):
        VQGANLossConfig(l1_weight=-1)
