import importlib.util
import json
import pathlib

import numpy as np
import pytest

from racm3_jax.evaluation.features import kernel_distance, precision_and_recall
from racm3_jax.evaluation.frechet import (
    FeatureStatistics,
    add_statistics,
    frechet_distance,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "evaluation"
SETTINGS = {"network": "n", "resizing": "clean"}


def sample_features(count, d=6, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(d, d))
    return rng.normal(size=(count, d)) @ mixing * scale + shift


def test_statistics_equal_numpys():
    x = sample_features(50)
    found = FeatureStatistics.of(x)
    np.testing.assert_allclose(found.mean, x.mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False))


def test_shards_in_any_order_give_the_whole():
    x = sample_features(50)
    parts = [FeatureStatistics.of(x[i::3]) for i in range(3)]
    whole, merged = FeatureStatistics.of(x), add_statistics(parts[::-1])
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.covariance, whole.covariance, atol=1e-12)
    assert frechet_distance(whole, merged) < 1e-10


def test_distance_of_independent_gaussians_is_the_formula():
    # Diagonal covariances commute: |dm|^2 + sum (s1 - s2)^2.
    a = np.array([[1.0, 2], [-1, -2], [1, -2], [-1, 2]])
    b = 3 * a + np.array([5.0, 0])
    first, second = (FeatureStatistics.of(x) for x in (a, b))
    deviations = np.sqrt(np.diag(first.covariance))
    wanted = 25 + ((3 * deviations - deviations) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-12)


def test_singular_covariances_are_exact():
    # 3 images in 6 dimensions: rank 2. The distance to a shifted copy is the shift.
    x = sample_features(3)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(x + 2.0)
    assert np.linalg.matrix_rank(a.covariance) == 2
    # The accuracy is limited by the root of a zero eigenvalue's rounding error.
    assert frechet_distance(a, b) == pytest.approx(6 * 4, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_saved_statistics_can_be_loaded_and_refuse_other_settings(tmp_path):
    found, path = FeatureStatistics.of(sample_features(20)), tmp_path / "real.npz"
    found.save(path, SETTINGS)
    loaded = FeatureStatistics.load(path, SETTINGS)
    assert loaded.fingerprint() == found.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["real.npz"]
    with pytest.raises(ValueError, match="resizing='clean', this run has 'legacy'"):
        FeatureStatistics.load(path, SETTINGS | {"resizing": "legacy"})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="holds no feature statistics"):
        FeatureStatistics.load(path, SETTINGS)


def test_features_that_are_not_finite_are_refused():
    x = sample_features(5)
    x[2, 3] = np.nan
    with pytest.raises(ValueError, match="1 that are not finite"):
        FeatureStatistics.of(x)
    with pytest.raises(ValueError, match="different networks"):
        FeatureStatistics.of(sample_features(5)) + FeatureStatistics.of(
            sample_features(5, d=4)
        )
    with pytest.raises(ValueError, match="needs 2 images"):
        _ = FeatureStatistics.of(sample_features(1)).covariance


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = sample_features(7), sample_features(7, seed=1, shift=0.5)

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    within = [
        kernel(a[i], a[j]) for a in (x, y) for i in range(7) for j in range(7) if i != j
    ]
    across = [kernel(a, b) for a in x for b in y]
    wanted = sum(within) / 42 - 2 * np.mean(across)
    found = kernel_distance(x, y, num_subsets=3)
    assert found.value == pytest.approx(wanted, rel=1e-10)
    assert found.standard_deviation == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, y, subset_size=4, seed=1) == kernel_distance(
        x, y, subset_size=4, seed=1
    )


def test_precision_and_recall_of_a_collapsed_generator():
    real = np.concatenate(
        [
            sample_features(30, scale=0.1),
            sample_features(30, scale=0.1, shift=50, seed=3),
        ]
    )
    half = sample_features(40, scale=0.09, seed=4)
    found = precision_and_recall(real, half)
    assert found.precision > 0.9
    assert 0.3 < found.recall <= 0.5
    same = precision_and_recall(real, real)
    assert same == (1.0, 1.0)
    far = precision_and_recall(real, half + 1e3)
    assert far == (0.0, 0.0)
    with pytest.raises(ValueError, match="at least 4 images"):
        precision_and_recall(real[:3], real)


def load_golden():
    path = GOLDEN / "make_frechet.py"
    spec = importlib.util.spec_from_file_location("make_frechet", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(wanted):
    golden = load_golden()
    for (a, b), distance in zip(golden.SIZES, wanted["distances"], strict=True):
        x, y = golden.make_features(a, 0), golden.make_features(b, 1)
        found = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
        tolerance = 1e-9 if min(a, b) > golden.D else 1e-4  # theirs has a constant
        assert found == pytest.approx(distance, rel=tolerance)
    x, y = golden.make_features(20, 0), golden.make_features(20, 1)
    found = kernel_distance(x, y, num_subsets=1).value
    assert found == pytest.approx(wanted["kernel"], rel=1e-9)


def test_distances_equal_scipys():
    check(json.loads((GOLDEN / "frechet.json").read_text()))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_distances_equal_scipys_live():
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    check(load_golden().compute())
