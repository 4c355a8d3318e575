"""Whether two methods differ by less than a margin: two one-sided tests (TOST)."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jdrop.statistics.intervals import (
    Interval,
    checked_losses,
    crossed_interval,
    mean_and_error,
)


@dataclass(frozen=True)
class EquivalenceTest:
    """The result of two one-sided tests (TOST): do two methods differ by less than a margin?

    `EnsembleEquivalent` answers another question: the ensemble size that scores as well as a
    method.

    Attributes:
        difference: the mean difference and its 90 % interval, which belongs to two tests at 5 %.
        margin: the smallest difference that matters.
        p_value: the larger p-value of the two tests; below 0.05 the methods are equivalent.
    """

    difference: Interval
    margin: float
    p_value: float

    @property
    def verdict(self) -> str:
        """The verdict, by where the 90 % interval lies.

        "equivalent": between -margin and margin. "better": wholly below -margin. "worse": wholly
        above margin. "not worse": contains -margin but not margin. "undecided": contains margin, so
        that nothing is shown.
        """
        low, high = self.difference.low, self.difference.high
        assert low is not None
        assert high is not None
        if high < -self.margin:
            return "better"
        if low > self.margin:
            return "worse"
        if high < self.margin:
            return "equivalent" if low > -self.margin else "not worse"
        return "undecided"


def equivalence_test(differences: np.ndarray, margin: float) -> EquivalenceTest:
    r"""Tests whether two methods differ by less than a margin, by two one-sided tests (TOST).

    A difference that is not significant does not show that methods are equivalent. TOST rejects
    both $\delta \ge \mu$ and $\delta \le -\mu$ at 5 %, with the standard error of
    `crossed_interval`.

    Args:
        differences: `[replicate, example]`: the losses of the first method less those of the
            second.
        margin: $\mu$, positive, in the unit of the loss.

    Raises:
        ValueError: if the margin is not positive and finite, the shape is wrong, or a difference is
            not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> equivalence_test(0.001 * rng.normal(size=(5, 100)), margin=0.01).verdict
        'equivalent'

    Reference:
        Schuirmann 1987, doi:10.1007/BF01068419.
    """
    if not 0 < margin < math.inf:
        raise ValueError(
            f"margin must be positive and finite, got {margin}; it is the smallest difference that "
            "matters."
        )
    differences = checked_losses(differences, "differences")
    mean, error, freedom = mean_and_error(differences)
    interval = crossed_interval(differences, level=0.9)
    if error == 0:
        return EquivalenceTest(interval, margin, float(abs(mean) >= margin))
    p_values = (
        stats.t.cdf((mean - margin) / error, freedom),
        stats.t.sf((mean + margin) / error, freedom),
    )
    return EquivalenceTest(interval, margin, float(max(p_values)))
