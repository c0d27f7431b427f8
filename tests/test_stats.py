"""Intervals over seeds: values by hand, and what counts as an effect."""

import math

import pytest

from experiments import stats


def test_the_interval_of_three_seeds_by_hand():
    """Mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.30265."""
    found = stats.interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    assert [found.low, found.high] == pytest.approx([2 - half, 2 + half], rel=1e-9)
    assert not found.effect


def test_one_seed_gives_a_value_and_never_an_effect():
    found = stats.interval([5.0])
    assert not found.effect
    assert found.text() == "5.00"
    with pytest.raises(ValueError, match="no values"):
        stats.interval([])


def test_pairs_remove_what_seeds_have_in_common():
    control = {0: 1.0, 1: 5.0, 2: 9.0}
    treatment = {1: 4.0, 2: 8.1, 0: 0.1, 7: 100.0}
    found = stats.paired(treatment, control)
    assert found.n == 3
    assert found.mean == pytest.approx(-2.8 / 3)
    assert found.effect
    assert not stats.interval(control.values()).effect
    with pytest.raises(ValueError, match="no values"):
        stats.paired({0: 1.0}, {1: 1.0})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-1.0, -1.0, -1.0], "-1.00 [-1.00, -1.00] (n=3)"),
        ([-1.0, 1.0], "no effect seen (n=2): +0.00 [-12.71, +12.71]"),
        ([-3.0], "no effect seen (n=1): -3.00"),
    ],
)
def test_the_text_of_an_effect_follows_from_its_interval(values, text):
    assert stats.effect_text(stats.interval(values)) == text


def test_sign_flips_of_n_equal_signs_have_the_known_p():
    """2 of the 2^n assignments are as extreme: collapse needs n >= 6 for p < 0.05."""
    assert stats.sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.0625)
    assert stats.sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(0.03125)


def test_holm_steps_down_and_stays_monotone():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]


def test_wilson_of_the_reports_severe_share():
    assert stats.wilson(57, 200) == pytest.approx((0.2269, 0.3512), abs=1e-4)
