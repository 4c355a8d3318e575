"""Intervals for numbers that come from random runs. Arrays in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over independent replicates and its confidence interval.

    Attributes:
        mean: the mean of the replicates.
        low: lower end of the interval, None where there is one replicate only.
        high: upper end, or None.
        num_replicates: how many independent replicates there were.
    """

    mean: float
    low: float | None
    high: float | None
    num_replicates: int


def mean_interval(values: Sequence[float]) -> Interval:
    r"""The mean of independent replicates and Student's 95 % interval for it.

    $\bar v \pm t_{n-1} \, s / \sqrt n$ with $s^2 = \sum_i (v_i - \bar v)^2 / (n - 1)$.

    Args:
        values: one number from each replicate; where these are normal, 95 % of such intervals hold
            the true mean.

    Raises:
        ValueError: no values.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.484..., high=4.484..., num_replicates=3)
        >>> mean_interval([1.0])
        Interval(mean=1.0, low=None, high=None, num_replicates=1)
    """
    replicates = np.asarray(values, np.float64)
    count = len(replicates)
    if count == 0:
        raise ValueError("values must hold at least one replicate, got none.")
    mean = float(replicates.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    quantile = stats.t.ppf(0.975, count - 1)
    half_width = float(quantile * replicates.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half_width, mean + half_width, count)
