import numpy as np
import pytest

from racm3_jax.evaluation.intervals import (
    adjust_holm,
    compute_grouped_share,
    compute_share,
    difference_of_shares,
    paired_difference,
)


def test_wilson_interval_of_a_known_case():
    fraction = compute_share([True] * 8 + [False] * 2)
    assert fraction.value == 0.8
    low, high = fraction.interval
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)


def test_the_interval_stays_between_0_and_1():
    low, high = compute_share([True] * 20).interval
    assert 0.8 < low < 1.0
    assert high == pytest.approx(1.0)


def test_no_outcomes_is_an_error():
    with pytest.raises(ValueError, match="no outcomes"):
        compute_share([])


@pytest.mark.parametrize("same_questions", [False, True])
@pytest.mark.parametrize(("seed_effect", "num_seeds"), [(0.0, 3), (0.1, 3), (0.1, 8)])
def test_paired_intervals_cover_the_true_difference(
    same_questions, seed_effect, num_seeds
):
    """Runs of two models that differ by 0.3; questions are hard or easy for both."""
    rng, num_questions, covered = np.random.default_rng(0), 60, []
    for _ in range(400):
        rows = 1 if same_questions else num_seeds
        hard = rng.normal(0, 1.0, (rows, num_questions))
        gain = rng.normal(0.3, 0.5, (rows, num_questions))
        noise = rng.normal(0, 0.2, (2, num_seeds, num_questions))
        luck = rng.normal(0, seed_effect, (num_seeds, 1))
        first = hard + gain + luck + noise[0]
        second = hard + noise[1]
        found = paired_difference(first, second, same_questions=same_questions)
        low, high = found.interval
        covered.append(low <= 0.3 <= high)
    assert np.mean(covered) >= 0.93


def test_equal_seeds_keep_the_error_of_their_questions():
    """85 against 0 of 100 questions in each of three seeds is not exactly +0.85."""
    first = np.zeros((3, 100))
    first[:, :85] = 1
    found = paired_difference(first, np.zeros((3, 100)), same_questions=True)
    low, high = found.interval
    assert found.value == pytest.approx(0.85)
    expected = 1.98 * np.sqrt(0.85 * 0.15 / 99)
    assert high - low == pytest.approx(2 * expected, rel=0.01)
    apart = paired_difference(first, np.zeros((3, 100)))
    assert apart.interval[0] > low and found.p_value < 1e-6
    shares = [compute_share(row == 1) for row in first]
    counted = difference_of_shares(shares, [compute_share([False] * 100)] * 3)
    assert counted.value == pytest.approx(0.85)
    assert counted.interval[0] <= apart.interval[0]
    # Questions may differ in number from seed to seed.
    more = difference_of_shares(
        [compute_share([True] * 8 + [False] * n) for n in (2, 3)],
        [compute_share([False] * n) for n in (10, 11)],
    )
    assert more.value == pytest.approx((0.8 + 8 / 11) / 2) and more.num_questions == 10


def test_three_seeds_count_as_three_for_any_number_of_questions():
    rng = np.random.default_rng(1)
    by_seed = np.array([0.1, 0.5, 0.9])
    first = by_seed[:, None] + rng.normal(0, 0.01, (3, 5000))
    found = paired_difference(first, np.zeros((3, 5000)))
    reach = 4.303 * by_seed.std(ddof=1) / np.sqrt(3)  # Student's t of 2
    assert found.interval[1] - found.value == pytest.approx(reach, rel=0.01)
    assert found.p_value == pytest.approx(0.1613, abs=0.003)
    assert str(found).startswith("+0.5 [-0.49")
    fields = found.to_json()
    assert fields["interval95"] == list(found.interval) and "interval" not in fields
    assert (fields["num_seeds"], fields["num_questions"]) == (3, 5000)


def test_pairing_removes_the_difficulty_of_questions():
    rng = np.random.default_rng(2)
    hard = rng.random((3, 200)) < 0.5
    first, second = hard | (rng.random((3, 200)) < 0.1), hard
    paired = paired_difference(first, second)
    counted = difference_of_shares(
        [compute_share(row) for row in first], [compute_share(row) for row in second]
    )
    assert paired.value == pytest.approx(counted.value)
    width = [d.interval[1] - d.interval[0] for d in (paired, counted)]
    assert width[0] < width[1]


def test_equal_outcomes_have_no_difference():
    same = np.ones((2, 5))
    found = paired_difference(same, same)
    assert found.interval == (0.0, 0.0) and found.p_value == 1.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones((2, 5)), np.ones((2, 4)), "of the same shape"),
        (np.ones(5), np.ones(5), "of the same shape"),
        (np.ones((2, 1)), np.ones((2, 1)), "at least two"),
    ],
)
def test_unpaired_outcomes_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)
    with pytest.raises(ValueError, match="seed by seed"):
        difference_of_shares([compute_share([True])], [])


def test_holm_is_the_published_procedure():
    """Holm (1979): 0.01 * 4, 0.02 * 3, and none is below one before it."""
    found = adjust_holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02})
    expected = {"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06}
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
    assert adjust_holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert adjust_holm({}) == {}
    with pytest.raises(ValueError, match=r"'a' is 1.5; it must be in 0..1"):
        adjust_holm({"a": 1.5})


def test_holm_controls_the_family_wise_error():
    rng = np.random.default_rng(3)
    false = [
        min(adjust_holm({str(i): p for i, p in enumerate(rng.random(100))}).values())
        < 0.05
        for _ in range(1000)
    ]
    assert np.mean(false) < 0.07


def test_samples_of_one_question_are_not_independent():
    """Four samples that always agree count as one; four independent ones as four."""
    rng = np.random.default_rng(4)
    agree = np.repeat(rng.random(300) < 0.6, 4).reshape(300, 4)
    found = compute_grouped_share(agree.sum(1), [4] * 300)
    assert found.design_effect == pytest.approx(4.0, abs=0.05)
    alone = compute_share(agree[:, 0])
    assert found.value == alone.value and found.total == 1200
    assert found.interval == pytest.approx(alone.interval, abs=2e-3)
    assert found.to_json()["design_effect"] == found.design_effect
    free = rng.random((300, 4)) < 0.6
    found = compute_grouped_share(free.sum(1), [4] * 300)
    assert 1.0 <= found.design_effect < 1.2
    assert (
        compute_grouped_share([4, 4], [4, 4]).interval
        == compute_share([True] * 8).interval
    )
    assert "design_effect" not in compute_share([True]).to_json()


def test_grouped_intervals_cover_the_true_fraction():
    rng, covered = np.random.default_rng(5), []
    for _ in range(400):
        easy = rng.beta(1.2, 0.8, 100)  # mean 0.6, samples of a question are similar
        totals = rng.integers(1, 9, 100)
        found = compute_grouped_share(rng.binomial(totals, easy), totals)
        low, high = found.interval
        covered.append(low <= 0.6 <= high)
    assert np.mean(covered) >= 0.92


def test_invalid_grouped_outcomes_are_refused():
    with pytest.raises(ValueError, match="at least one in all"):
        compute_grouped_share([0], [0])
    with pytest.raises(ValueError, match="more successes than outcomes"):
        compute_grouped_share([3], [2])
