"""Initialises a codebook by k-means of latents, so that all codes are in use."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

_CHUNK = 16384


def fit_codebook(
    latents: Float32[np.ndarray, "latents d_code"],
    num_codes: int,
    *,
    seed: int = 0,
    num_iterations: int = 12,
) -> Float32[np.ndarray, "num_codes d_code"]:
    """Lloyd's k-means; an unused code moves to a badly coded latent.

    Args:
      latents: of many images; may have many duplicates.
      num_codes: at most `len(latents)`.
      seed: of the initial codes and of the moves.
      num_iterations: passes over the latents.

    Raises:
      ValueError: fewer latents than codes.
    """
    if not 1 <= num_codes <= len(latents):
        raise ValueError(
            f"fit_codebook needs at least num_codes={num_codes} latents; got "
            f"{len(latents)}"
        )
    rng = np.random.default_rng(seed)
    codes = latents[rng.choice(len(latents), num_codes, replace=False)].copy()
    for _ in range(num_iterations):
        chosen = nearest_codes(latents, codes)
        counts = np.bincount(chosen, minlength=num_codes)
        order = np.argsort(chosen, kind="stable")
        used = np.nonzero(counts)[0]
        starts = np.cumsum(counts[used]) - counts[used]
        sums = np.add.reduceat(latents[order], starts, axis=0)
        errors = np.square(latents - codes[chosen]).sum(-1, dtype=np.float64)
        codes[used] = sums / counts[used, None]
        unused = np.nonzero(counts == 0)[0]
        if len(unused) and errors.any():
            moved = rng.choice(len(latents), len(unused), p=errors / errors.sum())
            codes[unused] = latents[moved]
    return codes


def nearest_codes(
    latents: Float32[np.ndarray, "latents d_code"],
    codes: Float32[np.ndarray, "num_codes d_code"],
) -> Int64[np.ndarray, " latents"]:
    """The index of the nearest code, in Euclidean distance."""
    norms = np.square(codes).sum(-1)
    return np.concatenate(
        [
            np.argmax(2.0 * latents[i : i + _CHUNK] @ codes.T - norms, axis=-1)
            for i in range(0, len(latents), _CHUNK)
        ]
    )
