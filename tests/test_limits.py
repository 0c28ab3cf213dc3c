"""Settings out of their limits are refused with their name and value."""

import types

import pytest

from racm3_jax.limits import check_choices, check_range


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {"low": 1}, r"train.steps must be >= 1; got 0"),
        (float("nan"), {"low": 0}, r"train.steps must be >= 0; got nan"),
        (1.5, {"low": 0, "high": 1}, r"train.steps must be in 0\.\.1; got 1.5"),
        (-0.1, {"low": 0, "high": 0.5}, r"train.steps must be in 0\.\.0.5; got -0.1"),
    ],
)
def test_a_number_out_of_range_is_named(value, limits, message):
    settings = types.SimpleNamespace(rows=limits["low"], steps=value)
    with pytest.raises(ValueError, match=message):
        check_range(settings, "train", "rows", "steps", **limits)


def test_both_limits_are_allowed():
    settings = types.SimpleNamespace(low=0, high=0.5, many=10**12)
    check_range(settings, "train", "low", "high", low=0, high=0.5)
    check_range(settings, "train", "many", low=0)


def test_a_name_that_is_no_choice_is_named():
    settings = types.SimpleNamespace(order="as_main", kind="other")
    check_choices(settings, "train", order=("stored", "as_main"))
    with pytest.raises(ValueError, match="train.kind is 'other'; allowed: clip, vqgan"):
        check_choices(settings, "train", order=("as_main",), kind=["clip", "vqgan"])
