# SPDX-License-Identifier: MIT
"""Intervals and tests for a few paired seeds."""

import warnings
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


def bootstrap(seeds: int, statistic: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    """The 95 % interval of a statistic of the numbers of seeds: the percentiles over all resamples
    of the seeds, of which there are few enough (3125 of five) to need no chance.

    Example:
        >>> values = np.arange(5.0)
        >>> low, high = bootstrap(5, lambda chosen: float(values[chosen].mean()))
        >>> round(low, 3), round(high, 3)
        (0.8, 3.2)
    """
    values = [statistic(np.array(chosen)) for chosen in product(range(seeds), repeat=seeds)]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def paired_test(values: Sequence[float], others: Sequence[float]) -> float:
    """The probability, if their means were equal, of a difference like that between paired samples
    (the paired t-test, two-sided); 1 where it is not defined."""
    with warnings.catch_warnings():  # of values that are all but equal
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(stats.ttest_rel(values, others).pvalue) if len(values) > 1 else np.nan
    return 1.0 if np.isnan(p) else p


def holm(ps: Sequence[float]) -> list[float]:
    """The probabilities corrected for their number, after Holm (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(ps)
    scaled = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]
