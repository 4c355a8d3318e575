"""How far chance may carry a statistic of n draws, so that no tolerance is chosen by eye."""

import math

from scipy import stats

FAILURE_RATE = 1e-9
"""How often one check fails by chance: a thousand of them, once in a million sets of keys.

Where a check looks at many statistics at once, `checks` of them, each has its share of that rate.
"""


def binomial_bounds(n: int, probability: float, checks: int = 1) -> tuple[int, int]:
    """The counts of successes in `n` trials that chance allows."""
    tail = FAILURE_RATE / checks / 2
    # Not as `interval(1 - rate)`, which rounds a small rate away.
    return int(stats.binom.ppf(tail, n, probability)), int(stats.binom.isf(tail, n, probability))


def mean_bound(variance: float, n: float) -> float:
    """The distance from its expectation that chance allows the mean of `n` draws, n large."""
    return stats.norm.isf(FAILURE_RATE / 2) * math.sqrt(variance / n)


def bounded_mean_bound(variance: float, largest: float, n: int, checks: int = 1) -> float:
    """The same for any n, where no draw is farther than `largest` from its expectation.

    Reference:
        Bernstein's inequality; Boucheron, Lugosi and Massart 2013, "Concentration inequalities",
        corollary 2.11.
    """
    exponent = math.log(2 * checks / FAILURE_RATE)
    linear = exponent * largest / 3
    return (linear + math.sqrt(linear**2 + 2 * n * variance * exponent)) / n


def chi_square_bounds(degrees_of_freedom: int) -> tuple[float, float]:
    """The statistics that chance allows: above it the draws vary too much, below it too little."""
    tail = FAILURE_RATE / 2
    return stats.chi2.ppf(tail, degrees_of_freedom), stats.chi2.isf(tail, degrees_of_freedom)
