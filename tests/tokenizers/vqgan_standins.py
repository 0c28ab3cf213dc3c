"""Random weights of image tokenizers, for tests that only need some."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import VQGANLossConfig, init_vqgan


def make_params(config: VQGANConfig):
    """Normal weights in every place, without compiling `init`."""
    shapes = jax.eval_shape(
        lambda key: init_vqgan(config, VQGANLossConfig(), key), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(np.float32),
        nn.meta.unbox(shapes["vqgan"]),
    )
