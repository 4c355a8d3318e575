"""Estimates of means with a standard error, degrees of freedom and skewness: ends and p-values."""

from dataclasses import dataclass

import numpy as np
from scipy import special

Numbers = np.ndarray | np.float64
"""An array, or a scalar that NumPy makes of an array without axes."""


@dataclass(frozen=True)
class Estimate:
    r"""Means and what their intervals and tests need; all arrays have one shape.

    Student's t assumes a symmetric mean. With rare large losses the mean is skewed, and whenever it
    is too small, so is its standard error. By the Cornish-Fisher expansion of a studentised mean
    with the skewness $\kappa$, the interval's end on the side of the long tail lies

    $$\left(q + \frac{|\kappa|}{6} (2 q^2 + 1)\right) s$$

    from the mean, where $q$ is Student's quantile and $s$ the standard error. The expansion moves
    the other end towards the mean by as much. Here that end keeps its place: the skewness is too
    uncertain to make an interval narrower.

    Attributes:
        mean: the means.
        error: their standard errors $s$.
        freedom: the degrees of freedom of the standard errors.
        skewness: the skewness of the means $\kappa$, positive for a long tail of large values.
        caution: a skewness added for both ends, each as if the tail were on its side.

    Reference:
        Johnson 1978, doi:10.1080/01621459.1978.10480051; Hall 1992,
        doi:10.1111/j.2517-6161.1992.tb01872.x.
    """

    mean: Numbers
    error: Numbers
    freedom: Numbers
    skewness: Numbers
    caution: Numbers | float = 0.0

    def ends(self, level: float) -> tuple[Numbers, Numbers]:
        """The ends of the intervals that hold a share `level` of true means."""
        quantile = special.stdtrit(self.freedom, (1 + level) / 2)
        term = (2 * quantile**2 + 1) / 6
        low = self.mean - self.error * (quantile + self._tail("above") * term)
        return low, self.mean + self.error * (quantile + self._tail("below") * term)

    def p_value(self, bound: float, alternative: str) -> Numbers:
        """The p-values of the hypothesis that the true mean is not below, or above, a bound.

        A p-value is below `(1 - level) / 2` exactly where the interval of `ends(level)` lies wholly
        on that side of the bound.

        Args:
            bound: the bound.
            alternative: what a small p-value shows: the mean is "below" or "above" the bound.
        """
        distance = bound - self.mean if alternative == "below" else self.mean - bound
        has_error = self.error > 0
        tail = self._tail(alternative)
        # The quantile whose end is the bound: a solution of a quadratic equation.
        shifted = distance / np.where(has_error, self.error, 1) - tail / 6
        root = np.sqrt(np.maximum(1 + 4 / 3 * tail * shifted, 0))
        quantile = 2 * shifted / (1 + root)
        return np.where(has_error, special.stdtr(self.freedom, -quantile), distance <= 0)

    def _tail(self, alternative: str) -> Numbers:
        """The skewness that stands against a claim.

        A mean with a long tail of large values is often below the true mean, and then seems sure.
        """
        sign = 1 if alternative == "below" else -1
        return np.maximum(sign * self.skewness, 0) + self.caution


def third_cumulant(deviations: np.ndarray) -> Numbers:
    """Unbiased third cumulants of values from their deviations `[..., value]` from their mean.

    0 for 2 values, which show no skewness.
    """
    count = deviations.shape[-1]
    if count < 3:
        return np.zeros(deviations.shape[:-1])
    return count / ((count - 1) * (count - 2)) * (deviations * deviations * deviations).sum(-1)
