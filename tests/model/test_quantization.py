"""8-bit weights: within half a step, and used by the model without conversion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.model.config import tiny_chameleon
from racm3_jax.model.contract import to_panels
from racm3_jax.model.quantization import SCALE, quantize_kernel, quantize_weights
from racm3_jax.model.transformer import (
    Transformer,
    init_params,
    prepare_decoding,
    stack_layers,
)


def test_a_kernel_is_within_half_a_step():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3, 5)).astype(np.float32)
    kernel[:, :, 2] = 0.0  # a channel without weights
    for num_inputs in (1, 2):
        steps, scale = quantize_kernel(jnp.asarray(kernel), num_inputs)
        assert steps.dtype == jnp.int8 and scale.shape == kernel.shape[num_inputs:]
        error = np.abs(np.asarray(steps) * np.asarray(scale) - kernel)
        assert (error <= np.asarray(scale) / 2 + 1e-6).all()
        full = np.abs(np.asarray(steps)).max(tuple(range(num_inputs)))
        assert set(full.reshape(-1).tolist()) == {0, 127}


def test_the_model_computes_with_the_quantized_values():
    """8-bit weights give the logits of the same weights converted to float32."""
    config = tiny_chameleon(num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    quantize = jax.jit(quantize_weights, static_argnames="outputs_first")
    quantized = quantize(params)
    prepared, turned = prepare_decoding(config, params)
    assert prepared.outputs_first  # the tests run on a CPU
    turned = quantize(turned, outputs_first=True)
    for name, inputs in (("out", 2), ("query", 1)):
        plain = quantized["layers_0"]["attention"][name]
        other = turned["layers_0"]["attention"][name]
        np.testing.assert_array_equal(
            other[SCALE].reshape(-1), plain[SCALE].reshape(-1)
        )
        kernel = to_panels(plain["kernel"], inputs)
        np.testing.assert_array_equal(other["kernel"], kernel)

    def write_out(tree):
        if "kernel" in tree:
            rest = {k: v for k, v in tree.items() if k not in ("kernel", SCALE)}
            return {
                "kernel": np.asarray(tree["kernel"]) * np.asarray(tree[SCALE]),
                **rest,
            }
        return {k: write_out(v) if isinstance(v, dict) else v for k, v in tree.items()}

    tokens = np.arange(12)[None]

    @jax.jit
    def logits(params):
        lengths = jnp.array([12])
        return Transformer(config).apply(
            {"params": params}, tokens, lengths, 16, method="prefill"
        )[0]

    got, expected = logits(quantized), logits(write_out(quantized))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(got) != np.asarray(logits(params))).any()


def test_stacked_layers_are_refused():
    config = tiny_chameleon(num_layers=1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    with pytest.raises(ValueError, match="quantise what prepare_decoding returns"):
        quantize_weights(
            stack_layers(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
        )
