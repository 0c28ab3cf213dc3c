"""k-means: finds clusters, leaves no code unused, refuses too few latents."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.tokenizers.codebook import fit_codebook, nearest_codes


def make_clusters(num: int = 40, each: int = 25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(0.0, 4.0, (num, 6)).astype(np.float32)
    noise = rng.normal(0.0, 0.05, (num, each, 6)).astype(np.float32)
    return centres, (centres[:, None] + noise).reshape(-1, 6)


def test_every_cluster_has_a_code_and_the_error_falls():
    """With as many codes as clusters, Lloyd's algorithm ends in a local minimum."""
    centres, latents = make_clusters()

    def fit(num_codes: int, num_iterations: int) -> tuple[np.ndarray, float]:
        codes = fit_codebook(latents, num_codes, num_iterations=num_iterations)
        chosen = codes[nearest_codes(latents, codes)]
        return codes, float(np.square(latents - chosen).sum(-1).mean())

    codes, error = fit(2 * len(centres), 40)
    distances = np.linalg.norm(centres[:, None] - codes[None], axis=-1)
    assert distances.min(axis=1).max() < 0.5 and error < 0.05
    errors = [fit(len(centres), n)[1] for n in (1, 3, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_no_code_is_unused_when_latents_repeat():
    rng = np.random.default_rng(1)
    common = np.zeros((5000, 3), np.float32)  # as the flat sky of many images
    rare = rng.normal(0.0, 3.0, (200, 3)).astype(np.float32)
    latents = np.concatenate([common, rare])
    codes = fit_codebook(latents, 32)
    used = np.unique(nearest_codes(latents, codes))
    assert len(used) >= 30


def test_the_nearest_code_is_found():
    rng = np.random.default_rng(2)
    latents, codes = rng.normal(size=(50, 4)), rng.normal(size=(9, 4))
    latents, codes = latents.astype(np.float32), codes.astype(np.float32)
    expected = np.linalg.norm(latents[:, None] - codes[None], axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest_codes(latents, codes), expected)


def test_too_few_latents_are_refused():
    with pytest.raises(ValueError, match="at least num_codes=8 latents; got 5"):
        fit_codebook(np.zeros((5, 2), np.float32), 8)
