# SPDX-License-Identifier: MIT
"""Intervals and tests for a few seeds, against scipy's and against simulations."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import stats

from lpsgd.experiments.statistics import bootstrap, difference, holm, paired_test, welch


def test_a_paired_difference_has_students_interval():
    found = difference([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    result = stats.ttest_rel([1.0, 2.0, 4.0], [1.0, 1.0, 2.0]).confidence_interval(0.95)
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx(
        (result.low, result.high)
    )
    assert not found.is_clear and found.text(2) == "+1.00 ± 2.48"
    assert difference([2.0, 3.1], [1.0, 2.0]).text(1) == "**+1.1 ± 0.6**"


def test_welch_finds_a_difference_only_where_there_is_one():
    assert welch([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]) < 0.001
    assert welch([1.0, 1.1, 0.9], [1.05, 1.0, 0.95]) > 0.5


def test_intervals_and_tests_of_seeds():
    values = np.arange(1.0, 6.0)
    low, high = bootstrap(5, lambda chosen: values[chosen].mean())
    assert (low, high) == pytest.approx((1.8, 4.2))
    assert paired_test([1.0, 2.0, 3.0], [1.1, 2.1, 3.11]) < 0.01
    assert paired_test([1.0, 2.0, 3.0], [3.0, 1.5, 2.0]) > 0.5
    assert paired_test([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_corrected_probabilities_keep_the_rate_of_false_alarms():
    """Of 300 families of five comparisons without a difference, about one in twenty alarms."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        ps = [paired_test(*generator.normal(size=(2, 5))) for _ in range(5)]
        alarms += min(holm(ps)) < 0.05
    assert 5 <= alarms <= 26  # binomial, expected below 15: these are beyond 2.5 deviations
