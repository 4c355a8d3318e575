"""How many networks a method is worth: the size of the ensemble that scores as well."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jdrop.statistics.estimate import Estimate, third_cumulant
from jdrop.statistics.intervals import (
    checked_losses,
    scaled_deviations,
    skewness,
    standard_error,
)
from jdrop.statistics.refusals import refusal


@dataclass(frozen=True)
class EnsembleEquivalent:
    """The deep-ensemble equivalent (DEE): the ensemble size that scores as well as a method.

    It answers how many networks a method is worth. `EquivalenceTest` answers another question:
    whether the scores of two methods differ by less than a margin.

    Attributes:
        value: the ensemble size, a real number. It is 1 if a single network does as well or better,
            and `math.inf` if no measured ensemble does.
        low: the lower end of the 95 % interval; `math.inf` if even the largest ensemble is
            significantly worse than the method.
        high: the upper end; `math.inf` if the largest ensemble may be worse.
        largest: the largest ensemble size measured.
        refusal: why the data are too few for a claim, as a sentence; None if they are not.
    """

    value: float
    low: float
    high: float
    largest: int
    refusal: str | None = None

    @property
    def is_resolved(self) -> bool:
        """Whether anything is known: no refusal, and an interval other than [≤1, >largest]."""
        return self.refusal is None and not (self.low == 1 and self.high == math.inf)

    def __str__(self) -> str:
        """Such as "3.1 [2.4, >10]", or "not resolved"."""
        if not self.is_resolved:
            return "not resolved"
        value, low, high = (self._text(end) for end in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def _text(self, size: float) -> str:
        if size == math.inf:
            return f">{self.largest}"
        return "≤1" if size == 1 else f"{size:.1f}"


class EnsembleCurve:
    r"""The loss of an ensemble as a function of its size, from which it reads a method's DEE.

    The deep-ensemble equivalent (DEE) of a method with the mean loss $\bar m$ is

    $$\min \{l \ge 1 : \bar L(l) \le \bar m\}$$

    where $\bar L(l)$ is the mean loss of ensembles of size $l$, linear between the sizes given. The
    interval inverts a test, as Fieller's interval of a ratio does. It holds every $l$ at which a
    test at 5 % does not reject that the paired differences $L_{rn}(l) - m_{rn}$ have mean 0. So the
    equivalent need not be normal, and may lie beyond the largest ensemble.

    In studies simulated by `scripts/coverage.py`, with 3, 5 or 10 replicates, 94 to 99 % of the
    intervals held a truth of 1.5 to 10 networks. They held a truth of 1, which they can miss on one
    side only, in 93 % or more, and one beyond the largest ensemble in 98 % or more.

    Args:
        losses: `[replicate, size, example]`: the loss of an ensemble of that size on every example,
            averaged over groups of the replicate's networks.
        sizes: ensemble sizes, strictly increasing from 1; 1, 2, 3, ... by default.

    Raises:
        ValueError: if the shape is wrong, a loss is not finite, or sizes do not increase from 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> noise = 0.001 * rng.normal(size=(5, 4, 50))
        >>> curve = EnsembleCurve(1 / np.arange(1, 5)[None, :, None] + noise)
        >>> print(curve.equivalent(np.full((5, 50), 0.4)))
        2.6 [2.6, 2.6]

    Reference:
        Ashukha et al. 2020, arXiv:2002.06470, section 5, for the equivalent; the interval is ours.
    """

    def __init__(self, losses: np.ndarray, sizes: Sequence[int] | None = None) -> None:
        losses = checked_losses(losses, "losses", 3)
        self._sizes = np.arange(1, losses.shape[1] + 1) if sizes is None else np.asarray(sizes)
        if (
            self._sizes.shape != losses.shape[1:2]
            or self._sizes[0] != 1
            or (np.diff(self._sizes) <= 0).any()
        ):
            raise ValueError(
                f"sizes must increase from 1 and be as many as the {losses.shape[1]} of losses, "
                f"got {self._sizes.tolist()}."
            )
        self._shape = losses.shape[0], losses.shape[2]
        self._replicate_means, self._example_means = losses.mean(2), losses.mean(0)
        self._means = losses.mean((0, 2))
        by_size = [scaled_deviations(losses[:, size]) for size in range(losses.shape[1])]
        # For replicates, examples and interaction: `[size, deviation]`, and all scalar products.
        self._deviations = [np.stack(deviations) for deviations in zip(*by_size, strict=True)]
        self._products = [deviations @ deviations.T for deviations in self._deviations]

    def equivalent(self, losses: np.ndarray) -> EnsembleEquivalent:
        """The ensemble size at which the curve reaches a method's mean loss.

        Args:
            losses: `[replicate, example]`: the method's losses, in the curve's replicates and on
                the curve's examples.

        Raises:
            ValueError: if the shape differs from the curve's, or a loss is not finite.
        """
        losses = checked_losses(losses, "losses")
        if losses.shape != self._shape:
            raise ValueError(
                f"losses must have the {self._shape[0]} replicates and {self._shape[1]} examples "
                f"of the curve, got the shape {losses.shape}."
            )
        mean = losses.mean()
        differences = self._means - mean
        # Scores in single precision, averaged in another order, can make equal means differ.
        tolerance = 2.0**-23 * max(float(np.abs(self._means).max()), abs(float(mean)))
        estimates = self._estimates(losses, differences)

        def not_above(sizes: np.ndarray) -> np.ndarray:
            return np.asarray(estimates(sizes).ends(0.95)[0]) <= tolerance

        def not_below(sizes: np.ndarray) -> np.ndarray:
            return np.asarray(estimates(sizes).ends(0.95)[1]) >= -tolerance

        steps = [
            np.linspace(start, end, 50, endpoint=False)
            for start, end in zip(self._sizes, self._sizes[1:], strict=False)
        ]
        grid = np.concatenate([*steps, self._sizes[-1:].astype(np.float64)])
        largest = float(grid[-1])
        value = self._crossing(differences, tolerance)
        # Both ends at once, since the grid is long.
        low_ends, high_ends = map(np.asarray, estimates(grid).ends(0.95))
        low = _first(not_above, grid, low_ends <= tolerance)
        high = _first(not_below, grid[::-1], high_ends[::-1] >= -tolerance)
        if high_ends[0] < -tolerance:
            # A single network is significantly better already, whatever larger ensembles do.
            low = high = 1.0
        elif high == largest:
            high = math.inf
        low, high = min(low, value), max(high, value)
        means = self._example_means_at(min(value, largest)) - losses.mean(0)
        # An end excludes sizes at which the curve lies above or below the method.
        claims = [
            claim
            for claim, excludes in (("above", low > 1), ("below", high < math.inf))
            if excludes
        ]
        reason = refusal(len(losses), means, claims, tolerance)
        return EnsembleEquivalent(value, low, high, int(largest), reason)

    def _example_means_at(self, size: float) -> np.ndarray:
        """The mean losses `[example]` of ensembles of a size, linear between those measured."""
        left, right, share = self._neighbours(np.array([size]))
        start, end = self._example_means[left[0]], self._example_means[right[0]]
        return start + share[0] * (end - start)

    def _neighbours(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The indices of the measured sizes around each size, and its share of the way."""
        last = len(self._sizes) - 1
        left = np.searchsorted(self._sizes, sizes, side="right") - 1
        left = np.clip(left, 0, max(0, last - 1))
        right = np.minimum(left + 1, last)
        span = np.maximum(self._sizes[right] - self._sizes[left], 1)
        return left, right, (sizes - self._sizes[left]) / span

    def _estimates(
        self, losses: np.ndarray, differences: np.ndarray
    ) -> Callable[[np.ndarray], Estimate]:
        """A function of sizes that returns the estimates of the mean differences.

        Between two sizes with the losses `a` and `b` the curve is linear. With the method's losses
        `m`, the differences at the share `s` of the way are `d = (1 - s) * a + s * b - m`. Scaled
        deviations are linear in the losses, and a mean square is the sum of their squares. So the
        mean square of `d` is

            (1 - s)**2 * aa + s**2 * bb + mm + 2 * s * (1 - s) * ab - 2 * (1 - s) * am - 2 * s * bm

        where `ab` is the scalar product of the deviations of `a` and `b`. A sum of cubes over
        examples is a cubic in `s` in the same way. The products are computed once, so that a new
        share `s` needs no pass over the examples.
        """
        method_deviations = scaled_deviations(losses)
        products_with_method = [
            deviations @ method
            for deviations, method in zip(self._deviations, method_deviations, strict=True)
        ]
        method_squares = [deviations @ deviations for deviations in method_deviations]
        example_cumulants = self._example_cumulants(losses.mean(0))
        replicate_means = self._replicate_means - losses.mean(1)[:, None] - differences

        def estimates(sizes: np.ndarray) -> Estimate:
            left, right, share = self._neighbours(sizes)
            rest = 1 - share
            mean = rest * differences[left] + share * differences[right]
            mean_squares = [
                rest**2 * products[left, left]
                + share**2 * products[right, right]
                + 2 * share * rest * products[left, right]
                - 2 * (rest * with_method[left] + share * with_method[right])
                + method_square
                for products, with_method, method_square in zip(
                    self._products, products_with_method, method_squares, strict=True
                )
            ]
            # Rounding can make a mean square of 0 negative.
            error, freedom = standard_error(
                [np.maximum(square, 0) for square in mean_squares], self._shape
            )
            replicates = rest * replicate_means[:, left] + share * replicate_means[:, right]
            powers = share ** np.arange(4)[:, None]
            skew = skewness(
                third_cumulant(replicates.T),
                (example_cumulants[:, left] * powers).sum(0),
                error,
                self._shape,
            )
            return Estimate(mean, error, freedom, skew)

        return estimates

    def _example_cumulants(self, method_means: np.ndarray) -> np.ndarray:
        """Third cumulants of examples' mean differences: `[power, size]`, factors of `s**power`.

        `s` is the share of the way from a size to the next.
        """
        differences = self._example_means - method_means
        start = differences - differences.mean(1, keepdims=True)
        step = np.diff(start, axis=0, append=start[-1:])
        # The sum of (start + s * step)**3, of which `third_cumulant` is a multiple.
        start_squared, step_squared = start * start, step * step
        sums = np.stack(
            [
                (start_squared * start).sum(1),
                3 * (start_squared * step).sum(1),
                3 * (step_squared * start).sum(1),
                (step_squared * step).sum(1),
            ]
        )
        num_examples = self._shape[1]
        return sums * num_examples / max((num_examples - 1) * (num_examples - 2), 1)

    def _crossing(self, differences: np.ndarray, tolerance: float) -> float:
        """The first size at which the mean difference is not above 0."""
        reached = np.flatnonzero(differences <= tolerance)
        if len(reached) == 0:
            return math.inf
        index = int(reached[0])
        if index == 0:
            return 1.0
        before, after = differences[index - 1], min(differences[index], 0.0)
        share = before / (before - after)
        return float(self._sizes[index - 1] + share * (self._sizes[index] - self._sizes[index - 1]))


def _first(holds: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray, held: np.ndarray) -> float:
    """The first size, between the given sizes too, at which a condition holds; else infinity.

    Args:
        holds: the condition.
        sizes: sizes in the order of the search.
        held: whether the condition holds at these sizes.
    """
    for _ in range(3):
        indices = np.flatnonzero(held)
        if len(indices) == 0:
            return math.inf
        index = int(indices[0])
        if index == 0:
            return float(sizes[0])
        sizes = np.linspace(sizes[index - 1], sizes[index], 50)
        held = holds(sizes)
    return float(sizes[np.flatnonzero(held)[0]])
