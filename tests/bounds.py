"""Bounds for statistics of n random draws, so that no tolerance is chosen by eye."""

import math

from scipy import stats

FAILURE_RATE = 1e-9
"""The probability that a check fails by chance.

A thousand checks, for instance, fail for one in a million sets of keys. A check of several
statistics divides this rate by their number, `checks`.
"""


def binomial_bounds(n: int, probability: float, checks: int = 1) -> tuple[int, int]:
    """The least and the largest plausible number of successes in `n` trials."""
    tail = FAILURE_RATE / checks / 2
    # `interval(1 - rate)` would round a small rate away.
    return int(stats.binom.ppf(tail, n, probability)), int(stats.binom.isf(tail, n, probability))


def mean_bound(variance: float, n: float) -> float:
    """The largest plausible distance of a mean of `n` draws from its expectation, `n` large."""
    return stats.norm.isf(FAILURE_RATE / 2) * math.sqrt(variance / n)


def bounded_mean_bound(variance: float, largest: float, n: int, checks: int = 1) -> float:
    """The same for any `n`, if no draw is farther than `largest` from its expectation.

    Reference:
        Bernstein's inequality; Boucheron, Lugosi and Massart 2013, "Concentration inequalities",
        corollary 2.11.
    """
    exponent = math.log(2 * checks / FAILURE_RATE)
    linear = exponent * largest / 3
    return (linear + math.sqrt(linear**2 + 2 * n * variance * exponent)) / n


def chi_square_bounds(degrees_of_freedom: int) -> tuple[float, float]:
    """The least and the largest plausible statistic: draws that vary too little, or too much."""
    tail = FAILURE_RATE / 2
    return stats.chi2.ppf(tail, degrees_of_freedom), stats.chi2.isf(tail, degrees_of_freedom)
