import pytest

from racm3_jax.evaluation.intervals import compute_share


def test_wilson_interval_of_a_known_case():
    share = compute_share([True] * 8 + [False] * 2)
    assert share.value == 0.8
    low, high = share.interval
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)


def test_interval_stays_inside_at_the_ends():
    low, high = compute_share([True] * 20).interval
    assert 0.8 < low < 1.0
    assert high == pytest.approx(1.0)


def test_no_outcomes_is_an_error():
    with pytest.raises(ValueError, match="no outcomes"):
        compute_share([])
