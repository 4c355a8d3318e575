"""Estimates of means with a standard error, degrees of freedom and skewness: ends and p-values."""

from dataclasses import dataclass

import numpy as np
from scipy import special

Numbers = np.ndarray | np.float64
"""An array, or a scalar that NumPy makes of an array without axes."""


@dataclass(frozen=True)
class Estimate:
    r"""Means and what their intervals and tests need; all arrays have one shape.

    Student's t assumes a symmetric mean. The mean of losses with rare large values is skewed, and
    its standard error is small whenever the mean is: for the skewness $\kappa$ of the mean,

    $$P\left(\frac{\bar d - \delta}{s} \le x\right) \approx F(g(x)), \qquad
    g(x) = x + \frac{\kappa}{3} x^2 + \frac{\kappa^2}{27} x^3 + \frac{\kappa}{6}$$

    with Student's distribution $F$. The first two terms in $\kappa$ are those of the Edgeworth
    expansion of a studentised mean; the cubic term makes $g$ increase everywhere.

    Attributes:
        mean: the means $\bar d$.
        error: their standard errors $s$.
        freedom: the degrees of freedom of the standard errors.
        skewness: the skewness of the means $\kappa$.

    Reference:
        Johnson 1978, doi:10.1080/01621459.1978.10480051; Hall 1992,
        doi:10.1111/j.2517-6161.1992.tb01872.x.
    """

    mean: Numbers
    error: Numbers
    freedom: Numbers
    skewness: Numbers

    def ends(self, level: float) -> tuple[Numbers, Numbers]:
        """The ends of the intervals that hold a share `level` of true means."""
        quantile = special.stdtrit(self.freedom, (1 + level) / 2)
        low = self.mean - self.error * self._untransformed(quantile)
        return low, self.mean - self.error * self._untransformed(-quantile)

    def p_value(self, bound: float, alternative: str) -> Numbers:
        """The p-values of the hypothesis that the true mean is not below, or above, a bound.

        Args:
            bound: the bound.
            alternative: what a small p-value shows: the mean is "below" or "above" the bound.
        """
        distance = self.mean - bound
        has_error = self.error > 0
        statistic = self._transformed(distance / np.where(has_error, self.error, 1))
        if alternative == "above":
            statistic, distance = -statistic, -distance
        return np.where(has_error, special.stdtr(self.freedom, statistic), distance >= 0)

    def _transformed(self, statistic: Numbers) -> Numbers:
        skewness = self.skewness
        return (
            statistic * (1 + skewness / 3 * statistic * (1 + skewness / 9 * statistic))
            + skewness / 6
        )

    def _untransformed(self, transformed: Numbers) -> Numbers:
        """The inverse: `(1 + skewness * x / 3)**3 = 1 + skewness * (g(x) - skewness / 6)`."""
        skewness = self.skewness
        shifted = transformed - skewness / 6
        root = np.cbrt(1 + skewness * shifted)
        # (root - 1) / skewness without cancellation: root**3 - 1 is skewness * shifted.
        return 3 * shifted / (1 + root + root**2)


def third_cumulant(deviations: np.ndarray) -> Numbers:
    """Unbiased third cumulants of values from their deviations `[..., value]` from their mean.

    0 for 2 values, which show no skewness.
    """
    count = deviations.shape[-1]
    if count < 3:
        return np.zeros(deviations.shape[:-1])
    return count / ((count - 1) * (count - 2)) * (deviations**3).sum(-1)
