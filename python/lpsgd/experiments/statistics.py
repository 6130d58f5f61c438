# SPDX-License-Identifier: MIT
"""Intervals and tests for a few seeds."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev

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


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and half the width of its 95 % interval."""

    mean: float
    margin: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return abs(self.mean) > self.margin

    def text(self, digits: int) -> str:
        """In bold where it is clear."""
        text = f"{self.mean:+.{digits}f} ± {self.margin:.{digits}f}"
        return f"**{text}**" if self.is_clear else text


def difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Of the values minus those of the same seeds; its interval is that of Student's t.

    Example:
        >>> difference([1.0, 2.0, 4.0], [1.0, 1.0, 2.0]).text(2)
        '+1.00 ± 2.48'
    """
    differences = [a - b for a, b in zip(values, others, strict=True)]
    n = len(differences)
    quantile = float(stats.t.ppf(0.975, n - 1))
    return Difference(fmean(differences), quantile * stdev(differences) / math.sqrt(n))


def welch(values: Sequence[float], others: Sequence[float]) -> float:
    """The probability, if their means were equal, of a difference like that between two samples
    (Welch's t-test, two-sided); NaN if one has a single value."""
    if min(len(values), len(others)) < 2:
        return float("nan")
    if len({*values, *others}) == 1:
        return 1.0
    return float(stats.ttest_ind(values, others, equal_var=False).pvalue)


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
