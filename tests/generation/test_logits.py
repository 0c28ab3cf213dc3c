"""Filters and sampled tokens against NumPy references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.generation import logits as L
from racm3_jax.generation.settings import SamplingConfig, SamplingSettings

TRACES = []


@jax.jit
def SAMPLE(keys, rows, *settings):
    return L.sample_tokens(keys, rows, L.LogitSettings(*settings))


@jax.jit
def run_filter(rows, temperature, top_k, top_p, min_p=0.0):
    TRACES.append(1)
    return L.filter_logits(rows, L.LogitSettings(temperature, top_k, top_p, min_p))


def reference_filter(row, temperature, top_k, top_p, min_p):
    """By sorting, as in the definitions; -inf where a token is dropped."""
    row = row.astype(np.float64)
    if temperature == 0:
        return np.where(row == row.max(), row, -np.inf)
    row = row / temperature
    if top_k:
        row = np.where(row >= np.sort(row)[-min(top_k, len(row))], row, -np.inf)
    if top_p < 1:
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        dropped = order[before >= top_p]
        row[dropped] = -np.inf
    if min_p:
        probabilities = np.exp(row) / np.exp(row).sum()
        row[probabilities < min_p * probabilities.max()] = -np.inf
    return row


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 0.4, 1.0])
def test_filter_equals_the_sorting_reference(temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 3, (32, 47)).astype(np.float32)
    rows[:, 7] = -np.inf  # what a grammar forbids stays forbidden
    got = np.asarray(run_filter(rows, temperature, top_k, top_p, min_p))
    for row, out in zip(rows, got, strict=True):
        expected = reference_filter(row, temperature, top_k, top_p, min_p)
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
        kept = np.isfinite(expected)
        if temperature:
            np.testing.assert_allclose(out[kept], expected[kept], rtol=1e-5)


def test_changing_the_settings_does_not_recompile():
    rows = np.zeros((32, 47), np.float32)
    for given in [(1.0, 0, 1.0, 0.0), (0.0, 3, 0.5, 0.1), (0.7, 9, 0.9, 1.0)]:
        run_filter(rows, *given)
    assert len(TRACES) == 1


def test_order_bits_keeps_the_order_of_floats():
    values = np.array([-np.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 2.0, np.inf])
    bits = np.asarray(L.order_bits(jnp.asarray(values, jnp.float32)))
    assert (np.diff(bits.astype(np.int64)) > 0).all()


def test_ties_are_kept_together_and_the_best_always():
    rows = np.full((32, 47), -np.inf, np.float32)
    rows[:, :5] = np.log([0.4, 0.2, 0.2, 0.1, 0.1])
    for top_p, num_kept in [(1e-6, 1), (0.39, 1), (0.5, 3), (0.79, 3), (0.85, 5)]:
        kept = np.isfinite(np.asarray(run_filter(rows, 1.0, 0, top_p)))
        assert kept.sum(-1).tolist() == [num_kept] * 32
    kept = np.isfinite(np.asarray(run_filter(rows, 1.0, 2, 1.0)))
    assert kept[0].tolist() == [True] * 3 + [False] * 44


def test_min_p_0_changes_no_bit_and_0_3_drops_what_is_below_its_fraction():
    rows = np.random.default_rng(4).normal(0, 9, (8, 33)).astype(np.float32)
    rows[:, 3] = -np.inf
    assert np.array_equal(np.asarray(L.keep_min_p(jnp.asarray(rows), 0.0)), rows)
    rows = np.log(np.array([[0.5, 0.2, 0.14, 0.16], [0.25] * 4], np.float32))
    kept = np.isfinite(np.asarray(L.keep_min_p(jnp.asarray(rows), 0.3)))
    assert kept.tolist() == [[True, True, False, True], [True] * 4]


def test_every_traced_setting_is_one_of_the_config_with_its_default():
    defaults = SamplingConfig()
    for name, default in L.LogitSettings._field_defaults.items():
        assert getattr(defaults, name) == default
        assert type(getattr(defaults, name)) is type(default)
    assert set(L.LogitSettings._fields) <= set(SamplingSettings.__annotations__)


def test_frequencies_follow_the_probabilities():
    """Chi-square over 40,000 samples; 6 tokens, of which top-p drops two."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    num_samples = 40_000
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (num_samples, 6))
    keys = jax.random.split(jax.random.key(1), num_samples)
    tokens = np.asarray(SAMPLE(keys, rows, 1.0, 0, 0.85))
    counts = np.bincount(tokens, minlength=6)
    expected = np.append(probabilities[:4] / 0.9, [0, 0]) * num_samples
    assert counts[4:].sum() == 0
    chi_square = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001

    tokens = np.asarray(SAMPLE(keys, rows, 0.5, 0, 1.0))
    expected = probabilities**2 / (probabilities**2).sum() * num_samples
    chi_square = ((np.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 20.52  # 5 degrees of freedom, p = 0.001


def test_a_token_depends_on_its_own_key_only():
    rng = np.random.default_rng(2)
    rows = jnp.asarray(rng.normal(size=(8, 33)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    together = SAMPLE(keys, rows, 0.9, 0, 0.9)
    alone = [
        int(SAMPLE(keys[i : i + 1], rows[i : i + 1], 0.9, 0, 0.9)[0]) for i in range(8)
    ]
    assert together.tolist() == alone


def test_temperature_zero_takes_the_first_maximum():
    rows = np.zeros((8, 33), np.float32)
    rows[:, [4, 9]] = 2.0
    keys = jax.random.split(jax.random.key(3), 8)
    assert SAMPLE(keys, rows, 0.0, 0, 1.0).tolist() == [4] * 8
