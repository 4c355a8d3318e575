"""How far chance may carry a statistic of n draws, so that no tolerance is chosen by eye."""

import math

from scipy import stats

FAILURE_RATE = 1e-9
"""How often one check fails by chance: a thousand of them, once in a million sets of keys."""


def binomial_bounds(n: int, probability: float) -> tuple[int, int]:
    """The counts of successes in `n` trials that chance allows."""
    low, high = stats.binom.interval(1 - FAILURE_RATE, n, probability)
    return int(low), int(high)


def mean_bound(variance: float, n: float) -> float:
    """The distance from its expectation that chance allows the mean of `n` draws, n large."""
    return stats.norm.isf(FAILURE_RATE / 2) * math.sqrt(variance / n)


def chi_square_bounds(degrees_of_freedom: int) -> tuple[float, float]:
    """The statistics that chance allows: above it the draws vary too much, below it too little."""
    tail = FAILURE_RATE / 2
    return stats.chi2.ppf(tail, degrees_of_freedom), stats.chi2.isf(tail, degrees_of_freedom)
