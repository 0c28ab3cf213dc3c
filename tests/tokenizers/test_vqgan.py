"""Shape of the network, convolutions, quantizers, axis names."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax import sharding
from racm3_jax.tokenizers.scalar_quantization import (
    codes_of_grid,
    grid_of_codes,
    round_to_grid,
)
from racm3_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from racm3_jax.tokenizers.vqgan_layers import Conv, GroupNorm, patchify, unpatchify
from racm3_jax.tokenizers.vqgan_loss import (
    VQGANLossConfig,
    init_vqgan,
    init_vqgan_from_images,
)

TINY = VQGANConfig(
    image_size=16,
    stem_patch=2,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=8,
    num_codes=24,
    d_code=4,
    quantizer="cosine",
    norm_groups=4,
)
FSQ = VQGANConfig(
    **{
        **TINY.__dict__,
        "quantizer": "fsq",
        "fsq_levels": (4, 3, 2),
        "d_code": 3,
    }
)
TAMING_F8 = VQGANConfig()


def init(config: VQGANConfig):
    shape = (2, config.image_size, config.image_size, 3)
    images = jax.random.uniform(jax.random.key(1), shape, minval=-1.0)
    # Shapes without running `init`, which dispatches every operation on its own.
    tree = jax.eval_shape(VQGAN(config).init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(np.float32),
        nn.meta.unbox(tree),
    )
    return variables, images


PATCH = VQGANConfig(
    **{
        **TINY.__dict__,
        "stem_patch": 4,
        "encoder": "patch",
        "channel_multipliers": (1,),
        "quantizer": "euclidean",
        "z_channels": 48,
        "d_code": 48,
    }
)


@pytest.mark.parametrize(
    "config", [TINY, FSQ, PATCH], ids=["cosine", "fsq", "patch encoder"]
)
def test_codes_decode_to_the_reconstruction(config):
    variables, images = init(config)
    model = VQGAN(config)
    recon, codes, _ = jax.jit(model.apply)(variables, images)
    assert recon.shape == images.shape
    assert codes.shape == (2, config.image_length) and codes.dtype == jnp.int32
    apply = jax.jit(model.apply, static_argnames="method")
    alone = apply(variables, images, method="encode_codes")
    np.testing.assert_array_equal(alone, codes)
    decoded = apply(variables, codes, method="decode_codes")
    np.testing.assert_allclose(decoded, recon, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["cosine", "euclidean"])
def test_the_nearest_code_is_chosen(quantizer):
    config = VQGANConfig(**{**TINY.__dict__, "quantizer": quantizer})
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    codebook = rng.normal(size=(24, 4)).astype(np.float32)
    variables = {"params": {"codebook": codebook}}
    quantize = jax.jit(VQGAN(config).apply, static_argnames="method")
    if quantizer == "cosine":
        z /= np.linalg.norm(z, axis=-1, keepdims=True)
        codebook = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    found = quantize(variables, z, method="quantize")
    distances = np.square(z.reshape(-1, 1, 4) - codebook).sum(-1)
    np.testing.assert_array_equal(found.codes.reshape(-1), distances.argmin(-1))
    np.testing.assert_allclose(
        found.z_q, codebook[found.codes].reshape(z.shape), atol=1e-6
    )
    expected = distances.min(-1).mean()
    np.testing.assert_allclose(found.commitment_loss, expected, rtol=1e-4)


def test_the_entropy_term_moves_unused_codes():
    codebook = jax.random.normal(jax.random.key(0), (24, 4))
    z = jnp.broadcast_to(codebook[0], (1, 2, 2, 4))

    def entropy_loss(codebook):
        variables = {"params": {"codebook": codebook}}
        return VQGAN(TINY).apply(variables, z, method="quantize").entropy_loss

    gradient = np.asarray(jax.jit(jax.grad(entropy_loss))(codebook))
    assert np.isfinite(gradient).all() and (np.abs(gradient).sum(-1) > 0).sum() > 1


@pytest.mark.parametrize("levels", [(8, 8, 8), (4, 3, 2), (5, 5)])
def test_grid_and_codes_are_inverse_and_every_code_is_reached(levels):
    round_, encode, decode = (
        jax.jit(function, static_argnums=1)
        for function in (round_to_grid, codes_of_grid, grid_of_codes)
    )
    num_codes = int(np.prod(levels))
    codes = jnp.arange(num_codes)
    grid = decode(codes, levels)
    np.testing.assert_array_equal(encode(grid, levels), codes)
    steps = np.array(levels)
    offset, half_range = np.where(steps % 2, 0.0, 0.5), (steps - 1) * 1.001 / 2
    bounded = (np.asarray(grid) * (steps // 2) + offset) / half_range
    z = np.arctanh(bounded) - np.arctanh(offset / half_range)
    reached = encode(round_(jnp.asarray(z), levels), levels)
    np.testing.assert_array_equal(reached, codes)
    zero = round_(jnp.zeros((1, len(levels))), levels)
    np.testing.assert_array_equal(zero, np.zeros((1, len(levels))))


def test_rounding_lets_the_gradient_through():
    gradient = jax.grad(lambda z: round_to_grid(z, (8, 8)).sum())(jnp.zeros((1, 2)))
    assert (np.asarray(gradient) > 0.1).all()


@pytest.mark.parametrize(
    ("size", "padding", "side"), [(3, (0, 1), 8), (4, (1, 1), 8), (3, (1, 1), 7)]
)
def test_a_folded_stride_equals_the_strided_convolution(size, padding, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side, 5))
    conv = Conv(7, size=size, stride=2, padding=padding)
    variables = nn.meta.unbox(jax.jit(conv.init)(jax.random.key(1), x))
    expected = jax.lax.conv_general_dilated(
        x,
        variables["params"]["kernel"],
        (2, 2),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(conv.apply(variables, x), expected, atol=1e-5)


def test_group_norm_equals_flax():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 8)) * 3.0 + 1.0
    ours, theirs = GroupNorm(4), nn.GroupNorm(4, epsilon=1e-6)
    variables = nn.meta.unbox(jax.jit(ours.init)(jax.random.key(1), x))
    np.testing.assert_allclose(
        jax.jit(ours.apply)(variables, x),
        jax.jit(theirs.apply)(variables, x),
        atol=1e-5,
    )


def test_patchify_is_a_diagram_of_blocks():
    image = jnp.arange(16).reshape(1, 4, 4, 1)
    folded = patchify(image, 2)
    assert folded[0, 0, 0].tolist() == [0, 1, 4, 5]
    assert folded[0, 1, 1].tolist() == [10, 11, 14, 15]
    np.testing.assert_array_equal(unpatchify(folded, 2), image)


def test_the_structure_is_tamings():
    """With stem_patch=1 every module of vqgan f8 exists, with its shape."""
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    tree = jax.eval_shape(VQGAN(TAMING_F8).init, jax.random.key(0), images)
    params = nn.meta.unbox(tree)["params"]
    assert set(params) == {
        "encoder",
        "decoder",
        "quant_conv",
        "post_quant_conv",
        "codebook",
    }
    down = {f"down_{i}_block_{j}" for i in range(4) for j in range(2)}
    up = {f"up_{i}_block_{j}" for i in range(4) for j in range(3)}
    ends = {"conv_in", "mid_block_1", "mid_attn_1", "mid_block_2"}
    ends |= {"norm_out", "conv_out"}
    assert set(params["encoder"]) == (
        down
        | ends
        | {f"down_{i}_downsample" for i in range(3)}
        | {f"down_3_attn_{j}" for j in range(2)}
    )
    assert set(params["decoder"]) == (
        up
        | ends
        | {f"up_{i}_upsample" for i in (1, 2, 3)}
        | {f"up_3_attn_{j}" for j in range(3)}
    )
    assert set(params["encoder"]["mid_attn_1"]) == {"norm", "q", "k", "v", "proj_out"}
    block = params["encoder"]["down_2_block_0"]
    assert set(block) == {"norm1", "conv1", "norm2", "conv2", "nin_shortcut"}
    assert block["conv1"]["kernel"].shape == (3, 3, 128, 256)
    assert params["encoder"]["conv_in"]["kernel"].shape == (3, 3, 3, 128)
    assert params["decoder"]["conv_out"]["kernel"].shape == (3, 3, 128, 3)
    assert params["codebook"].shape == (8192, 256)
    assert TAMING_F8.image_length == 1024


@pytest.mark.parametrize("config", [TINY, FSQ, TAMING_F8], ids=["tiny", "fsq", "f8"])
def test_every_parameter_has_a_sharding(config):
    loss = VQGANLossConfig(adversarial_weight=0.1)
    boxed = jax.eval_shape(lambda key: init_vqgan(config, loss, key), jax.random.key(0))
    for leaf in jax.tree.leaves(
        boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    ):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    found = sharding.shardings_for(boxed, mesh)
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(nn.meta.unbox(boxed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, "image_size must be a multiple of 4"),
        ({"norm_groups": 3}, "multiple of norm_groups=3"),
        ({"quantizer": "magic"}, "quantizer must be"),
        ({"fsq_levels": (2, 2)}, "needs quantizer='fsq'"),
        ({"quantizer": "fsq"}, "fsq_levels must be numbers"),
        ({"quantizer": "fsq", "fsq_levels": (8, 8)}, "num_codes=64"),
    ],
)
def test_a_wrong_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**TINY.__dict__, **change})


def test_lists_from_json_make_the_same_config():
    assert VQGANConfig(**{**TINY.__dict__, "channel_multipliers": [1, 2]}) == TINY
    assert hash(TINY)


def test_equal_patches_have_equal_codes_in_all_positions():
    """With the patch encoder; taming's sees the surroundings too."""
    rng = np.random.default_rng(0)
    patch = rng.uniform(-1.0, 1.0, (4, 4, 3))
    image = rng.uniform(-1.0, 1.0, (1, 16, 16, 3))
    image[0, :4, 4:8] = image[0, 8:12, 12:] = patch
    variables, _ = init(PATCH)
    apply = jax.jit(VQGAN(PATCH).apply, static_argnames="method")
    codes = apply(variables, image, method="encode_codes").reshape(4, 4)
    assert codes[0, 1] == codes[2, 3]
    latents = np.asarray(apply(variables, image, method="encode"))
    np.testing.assert_allclose(latents[0, 0, 1], latents[0, 2, 3], rtol=1e-5)


def test_the_first_codebook_is_the_k_means_of_patches():
    """Latents keep the distances of pixels, and the codes lie among them."""
    rng = np.random.default_rng(0)
    tones = rng.integers(0, 256, (12, 3))
    images = tones[rng.integers(0, 12, (20, 4, 4))].repeat(4, 1).repeat(4, 2)
    params = init_vqgan_from_images(
        PATCH, VQGANLossConfig(), jax.random.key(0), images.astype(np.uint8)
    )
    pixels = images[:2] / 127.5 - 1.0
    variables = {"params": params["vqgan"]}
    encode = jax.jit(functools.partial(VQGAN(PATCH).apply, method="encode"))
    flat = np.asarray(encode(variables, pixels)).reshape(32, 48)
    patches = np.asarray(patchify(pixels, 4)).reshape(32, 48)
    np.testing.assert_allclose(
        np.linalg.norm(flat[0] - flat, axis=-1),
        np.linalg.norm(patches[0] - patches, axis=-1),
        rtol=1e-3,
        atol=1e-3,
    )
    errors = np.square(flat[:, None] - params["vqgan"]["codebook"]).sum(-1).min(1)
    assert errors.max() < 1e-3  # twelve tones, twenty-four codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "vit"}, "must be 'conv' or 'patch'"),
        ({"channel_multipliers": (1, 2)}, "has one level"),
    ],
)
def test_wrong_encoders_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**PATCH.__dict__, **change})
