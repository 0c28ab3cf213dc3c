"""The vendors' kernels: Splash interpreted; the arguments and lowering of cuDNN."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from racm3_jax import sharding
from racm3_jax.model import attention_kernels
from racm3_jax.model.attention import attention, choose_implementation
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import (
    Transformer,
    abstract_params,
    init_params,
    prepare_decoding,
)

SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 2, 2, 2]], 40, axis=1)


def make_qkv(heads=4, kv_heads=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(*SEGMENTS.shape, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(implementation, q, k, v, direction):
    def loss(q, k, v):
        out = attention(q, k, v, jnp.asarray(SEGMENTS), implementation)
        return (out * direction).sum(), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


def test_the_diagram_of_find_segments():
    find_segments = jax.jit(attention_kernels.find_segments, static_argnums=1)
    starts, lengths, counts = find_segments(jnp.asarray([[1, 1, 1, 2, 2, 0]]), 4)
    assert starts.tolist() == [[0, 3, 5, -1, -1]]
    assert lengths.tolist() == [[3, 2, 1, -1]]
    assert counts.tolist() == [3]
    _, lengths, counts = find_segments(jnp.asarray([[1, 2, 3]]), 2)
    assert (lengths.tolist(), counts.tolist()) == ([[1, 1]], [3])
    starts, lengths, _ = find_segments(jnp.asarray([[7, 7]]), 3)  # fewer ids than slots
    assert starts.tolist() == [[0, -1, -1, -1]] and lengths.tolist() == [[2, -1, -1]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 1, 2)])
def test_splash_equals_plain_and_does_not_leak(mesh_shape):
    """Interpreted; on a mesh its rows and heads are split."""
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: np.prod(mesh_shape)])
    q, k, v = make_qkv()
    everything = jnp.broadcast_to(jnp.cos(jnp.arange(8.0)), q.shape)
    expected = outputs_and_gradients("plain", q, k, v, everything)
    with jax.set_mesh(mesh):
        run = functools.partial(outputs_and_gradients, "splash")
        actual = run(q, k, v, everything)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6),
            actual,
            expected,
        )
        perturbed = (SEGMENTS == 2)[..., None, None]
        others = everything * ~perturbed
        out, gradients = run(q, k, v, others)
        changed, _ = run(*(x + perturbed * 3.0 for x in (q, k, v)), others)
    kept = ~perturbed[..., 0, 0]
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(changed)[kept])
    for gradient in gradients:
        assert not np.any(np.asarray(gradient)[~kept])
        assert np.any(np.asarray(gradient)[kept])


def read_packed(
    q, k, v, *, q_seqlen, q_offsets, kv_seqlen, kv_offsets, scale, mask_type, qkv_layout
):
    """The documented behaviour of cuDNN: every segment is a separate sequence."""
    assert mask_type == cudnn.MaskType.PADDING_CAUSAL and qkv_layout == "BTNH"
    assert q.shape == k.shape == v.shape and scale == 1.0
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
    out = np.full(q.shape, 7.0, np.float32)
    for row in range(len(q)):
        for start, length in zip(q_offsets[row], q_seqlen[row], strict=False):
            if length > 0:
                own = slice(int(start), int(start + length))
                queries, keys, values = (np.asarray(x)[row, own] for x in (q, k, v))
                scores = np.einsum("qhd,khd->hqk", queries, keys)
                weights = np.exp(scores) * np.tri(int(length))
                weights /= weights.sum(-1, keepdims=True)
                out[row, own] = np.einsum("hqk,khd->qhd", weights, values)
    return jnp.asarray(out)


def test_cudnn_is_given_the_segments(monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", read_packed)
    q, k, v = make_qkv()
    segments = jnp.asarray(SEGMENTS)
    expected = jax.jit(attention, static_argnums=4)(q, k, v, segments, "plain")
    actual = attention(q, k, v, segments, "cudnn", 4)
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    # A row with too many segments becomes NaN; the other row is not affected.
    actual = attention(q, k, v, segments, "cudnn", 3)
    assert np.isnan(actual[0]).all()
    np.testing.assert_allclose(actual[1], expected[1], atol=2e-6)


def test_cudnn_is_lowered_to_its_own_kernels(monkeypatch):
    """For an absent GPU, forward and backward, without a row's scores."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda c: False)
    shape = jax.ShapeDtypeStruct((2, 4096, 20, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)

    def loss(q, k, v, ids):
        return attention(q, k, v, ids, "cudnn").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert text.count("PADDING_CAUSAL") == 2
    assert "4096x4096" not in text


def devices_elsewhere(platform, kind):
    """A mesh of devices that this process does not have."""
    device = jax.sharding.AbstractDevice(kind, None, platform)
    axes = {"abstract_device": device}
    mesh = jax.sharding.AbstractMesh((2,), ("data",), **axes)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "expected"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", "cudnn"),
        ("gpu", "NVIDIA GB200", "bfloat16", "cudnn"),
        ("gpu", "NVIDIA H100 80GB HBM3", "float32", "plain"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "bfloat16", "plain"),
        ("tpu", "TPU v5 lite", "float32", "splash"),
        ("cpu", "cpu", "float32", "plain"),
    ],
)
def test_the_devices_of_the_mesh_decide(platform, kind, dtype, expected):
    with devices_elsewhere(platform, kind):
        assert choose_implementation(dtype) == expected
    assert choose_implementation(dtype) == "blocked"  # what this process runs on


def test_a_jax_without_the_packed_kernel_falls_back(monkeypatch):
    monkeypatch.delattr(cudnn, "dot_product_attention")
    with devices_elsewhere("gpu", "NVIDIA H100 80GB HBM3"):
        assert choose_implementation("bfloat16") == "plain"
    q, k, v = make_qkv(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match='set config.model.attention="plain"'):
        attention(q, k, v, jnp.asarray(SEGMENTS), "cudnn", 4)


def zero_params(config):
    """For tests of dtypes: nothing is computed with them."""
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes
    )


def test_decoding_is_prepared_for_the_devices_of_the_mesh():
    config = tiny(compute_dtype="bfloat16")
    params = zero_params(config)
    assert prepare_decoding(config, params)[0].compute_dtype == "float32"
    with devices_elsewhere("tpu", "TPU v6 lite"):
        assert prepare_decoding(config, params)[0].compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ("fpu avx2 avx512f", "float32"),
        ("fpu avx512_bf16 avx2", "bfloat16"),
        ("fpu amx_bf16", "bfloat16"),
        ("fp asimd bf16", "bfloat16"),
        ("", "float32"),
    ],
)
def test_auto_uses_the_dtype_of_the_device(monkeypatch, features, dtype):
    monkeypatch.setattr(sharding, "_cpu_features", features.split)
    config = tiny(compute_dtype="auto")
    params = zero_params(config)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def hidden_dtype():
        # A new function each time, so that no cached trace is used.
        found = jax.eval_shape(
            lambda i: Transformer(config).apply({"params": params}, i, i, i), ids
        )
        return found.dtype

    assert hidden_dtype() == dtype
    with devices_elsewhere("tpu", "TPU v6 lite"):
        assert hidden_dtype() == "bfloat16"
        # Models trained on a CPU decode on an accelerator like those trained there.
        assert prepare_decoding(config, params)[0].compute_dtype == "bfloat16"


def test_the_features_of_the_cpu_are_those_that_linux_lists(monkeypatch):
    listed = "processor : 0\nflags\t\t: fpu amx_bf16\nbugs : none\n"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: listed)
    assert sharding._cpu_features.__wrapped__() == {"fpu", "amx_bf16"}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_splash_is_built_in_every_trace(scan_layers, remat):
    """A kernel contains arrays of its trace: reusing it in another one is an error."""
    config = tiny(attention="splash", scan_layers=scan_layers, remat=remat)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(params, ids):
        hidden = Transformer(config).apply({"params": params}, ids, ids, ids)
        return hidden.astype(jnp.float32).sum()

    for _ in range(2):
        boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        params = nn.unbox(boxed)
        gradients = jax.jit(jax.grad(loss)).trace(params, ids).out_info
        assert jax.tree.structure(gradients) == jax.tree.structure(params)
