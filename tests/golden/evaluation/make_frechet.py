"""Makes frechet.json: scipy's Fréchet distances, and scikit-learn's kernel, in float64.

PYTHONPATH=. python tests/golden/evaluation/make_frechet.py     (the [parity] extra)
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
D = 40
# Images per side: more than features, fewer on one side, fewer on both (singular).
SIZES = [(400, 300), (400, 20), (20, 12)]


def make_features(count: int, seed: int) -> np.ndarray:
    """Correlated features whose mean and spread depend on the seed."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(D, D))
    return rng.normal(size=(count, D)) @ mixing * (1 + 0.2 * seed) + 0.3 * seed


def reference_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The formula with `scipy.linalg.sqrtm`, as in the FID tools.

    For singular covariances they add a constant to the diagonals; smaller is closer to the
    limit, and with 1e-9 the root is still found.
    """
    from scipy import linalg

    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    offset = np.eye(D) * (1e-9 if min(len(x), len(y)) <= D else 0)
    root = linalg.sqrtm((first + offset) @ (second + offset)).real
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(first + second - 2 * root))


def reference_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of equally many images with the cubic kernel."""
    from sklearn.metrics.pairwise import polynomial_kernel

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return polynomial_kernel(a, b, degree=3, gamma=1 / D, coef0=1)

    n = len(x)
    within = sum(kernel(a, a).sum() - np.trace(kernel(a, a)) for a in (x, y))
    return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def compute() -> dict[str, object]:
    sets = [(make_features(a, 0), make_features(b, 1)) for a, b in SIZES]
    return {
        "distances": [reference_distance(x, y) for x, y in sets],
        "kernel": reference_kernel_distance(make_features(20, 0), make_features(20, 1)),
    }


if __name__ == "__main__":
    path = HERE / "frechet.json"
    path.write_text(json.dumps(compute(), indent=0) + "\n")
    print(path, path.read_text())
