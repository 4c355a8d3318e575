"""How sure a number is that comes from random runs: intervals, equivalents, tests.

Arrays in, numbers out, in double precision. Two things are random: the replicates (whole
repetitions of the training, with other seeds) and the test examples. Losses `[replicate, example]`
have every example in every replicate, so both effects are crossed, and an interval needs both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats


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


def crossed_interval(losses: np.ndarray, *, level: float = 0.95) -> Interval:
    r"""The mean over replicates and examples, and an interval for new ones of both.

    Two-way random effects: with the mean squares of replicates, examples and the rest,

    $\widehat{\mathrm{Var}}(\bar d) = \left(M_r + \max(M_n - M_{rn}, 0)\right) / (R N)$,

    and Student's t with Satterthwaite's degrees of freedom, at least $\min(R, N) - 1$. The
    variance is not less than that of the replicates' means alone. With normal effects 95 %
    intervals held the mean in 94 to 96 % of simulated studies of 5 or 10 replicates, in at least
    92 % with 3, 89 % with 2.

    Args:
        losses: `[replicate, example]`, at least 2 of each, finite; the loss of every example in
            every replicate, or the difference of two methods' losses.
        level: how many of such intervals hold the true mean, in (0, 1).

    Raises:
        ValueError: another shape; numbers that are not finite; a level out of (0, 1).

    Example:
        >>> crossed_interval(np.array([[1.0, 2.0, 3.0], [1.1, 2.1, 3.1]]))
        Interval(mean=2.05, low=-0.408..., high=4.508..., num_replicates=2)

    Reference:
        Satterthwaite 1946, doi:10.2307/3002019; Searle, Casella and McCulloch 1992, chapter 4.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}; 0.95 is usual.")
    losses = _checked(losses, "losses")
    mean, error, freedom = _mean_and_error(losses)
    half_width = float(special.stdtrit(freedom, (1 + level) / 2)) * error
    return Interval(mean, mean - half_width, mean + half_width, len(losses))


def _checked(losses: np.ndarray, name: str, ndim: int = 2) -> np.ndarray:
    losses = np.asarray(losses, np.float64)
    axes = "[replicate, example]" if ndim == 2 else "[replicate, size, example]"
    if losses.ndim != ndim or losses.size == 0 or len(losses) < 2 or losses.shape[-1] < 2:
        raise ValueError(
            f"{name} must be {axes} with at least 2 replicates and 2 examples, got the shape "
            f"{losses.shape}."
        )
    if not np.isfinite(losses).all():
        raise ValueError(
            f"{name} must be finite, got {int((~np.isfinite(losses)).sum())} of {losses.size} "
            "that are not: a method that rules out the true class has an infinite loss."
        )
    return losses


def _mean_squares(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What replicates, examples and the rest deviate by: `[replicate]`, `[example]`, both.

    Scaled so that the sums of their squares are the mean squares.
    """
    num_replicates, num_examples = losses.shape
    mean = losses.mean()
    of_replicate, of_example = losses.mean(1) - mean, losses.mean(0) - mean
    rest = losses - mean - of_replicate[:, None] - of_example[None]
    return (
        of_replicate * math.sqrt(num_examples / (num_replicates - 1)),
        of_example * math.sqrt(num_replicates / (num_examples - 1)),
        rest.ravel() / math.sqrt((num_replicates - 1) * (num_examples - 1)),
    )


def _error(squares: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of means, from the mean squares behind each."""
    of_replicates, of_examples, rest = squares
    num_replicates, num_examples = shape
    # Where examples vary by no more than the rest explains, they add nothing.
    adds = of_examples > rest
    total = of_replicates + np.where(adds, of_examples - rest, 0)
    spread = of_replicates**2 / (num_replicates - 1) + np.where(
        adds,
        of_examples**2 / (num_examples - 1) + rest**2 / ((num_replicates - 1) * (num_examples - 1)),
        0,
    )
    freedom = total**2 / np.where(spread > 0, spread, 1)
    # Of a difference of mean squares Satterthwaite's number may come near 0, and the quantile of
    # Student's t near infinity: no sum of mean squares has fewer degrees than its poorest part.
    freedom = np.maximum(freedom, min(num_replicates, num_examples) - 1)
    return np.sqrt(total / (num_replicates * num_examples)), freedom


def _mean_and_error(losses: np.ndarray) -> tuple[float, float, float]:
    squares = [np.array([part @ part]) for part in _mean_squares(losses)]
    error, freedom = _error(squares, losses.shape)
    return float(losses.mean()), float(error[0]), float(freedom[0])


@dataclass(frozen=True)
class EnsembleEquivalent:
    """How many averaged networks score as well as a method, with its 95 % interval.

    Attributes:
        value: a real number, 1 where one network does as well or better, `math.inf` where the
            largest average does not.
        low: lower end of the interval, `math.inf` where even the largest average is worse.
        high: upper end, `math.inf` where the largest average may not be enough.
        largest: the largest average that was looked at.
    """

    value: float
    low: float
    high: float
    largest: int

    def __str__(self) -> str:
        """Such as "3.1 [2.4, >10]"."""
        value, low, high = (self._text(end) for end in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def _text(self, number: float) -> str:
        if number == math.inf:
            return f">{self.largest}"
        return "≤1" if number == 1 else f"{number:.1f}"


class EnsembleCurve:
    r"""The loss of averages of networks against their number: what methods are measured by.

    The deep-ensemble equivalent of a method is
    $\min \{l \ge 1 : \bar L(l) \le \bar m\}$, with the mean loss $\bar L$ of an average of $l$
    networks, linear between the sizes given, and the method's mean loss $\bar m$. Its interval
    holds every $l$ at which the paired differences $L_{rn}(l) - m_{rn}$ have a mean that a test at
    5 % does not tell from 0: the inversion of the test, as Fieller's for ratios. It needs no
    normality of the equivalent itself, which may be far from it, or beyond the largest average. In
    studies simulated by `scripts/coverage.py` 93 to 96 % of the intervals held the truth with 5
    replicates, 92 to 96 % with 3, and nearly all where it was beyond the largest average.

    Args:
        losses: `[replicate, size, example]`: the loss of every example, averaged over groups of so
            many of the replicate's networks.
        sizes: rising from 1; 1, 2, 3, ... if not given.

    Raises:
        ValueError: another shape; numbers that are not finite; sizes that do not rise from 1.

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
        losses = _checked(losses, "losses", 3)
        self._sizes = np.arange(1, losses.shape[1] + 1) if sizes is None else np.asarray(sizes)
        if (
            self._sizes.shape != losses.shape[1:2]
            or self._sizes[0] != 1
            or (np.diff(self._sizes) <= 0).any()
        ):
            raise ValueError(
                f"sizes must rise from 1 and be as many as the {losses.shape[1]} of losses, "
                f"got {self._sizes.tolist()}."
            )
        self._shape = losses.shape[0], losses.shape[2]
        self._means = losses.mean((0, 2))
        parts = [_mean_squares(losses[:, size]) for size in range(losses.shape[1])]
        self._parts = [np.stack(of_size) for of_size in zip(*parts, strict=True)]
        self._grams = [part @ part.T for part in self._parts]

    def equivalent(self, losses: np.ndarray) -> EnsembleEquivalent:
        """The size at which the curve reaches these losses.

        Args:
            losses: `[replicate, example]` of the method, of the same replicates and examples.

        Raises:
            ValueError: another shape than the curve's; numbers that are not finite.
        """
        losses = _checked(losses, "losses")
        if losses.shape != self._shape:
            raise ValueError(
                f"losses must have the {self._shape[0]} replicates and {self._shape[1]} examples "
                f"of the curve, got the shape {losses.shape}."
            )
        differences = self._means - losses.mean()
        # Of means that are equal, rounding makes unequal ones.
        tolerance = 1e-9 * float(np.abs(self._means).max())
        gap = self._gap(losses, differences)

        def not_above(sizes: np.ndarray) -> np.ndarray:
            mean, needed = gap(sizes)
            return mean <= needed + tolerance

        def not_below(sizes: np.ndarray) -> np.ndarray:
            mean, needed = gap(sizes)
            return mean >= -needed - tolerance

        steps = [
            np.linspace(start, end, 50, endpoint=False)
            for start, end in zip(self._sizes, self._sizes[1:], strict=False)
        ]
        grid = np.concatenate([*steps, self._sizes[-1:].astype(np.float64)])
        largest = float(grid[-1])
        value = self._crossing(differences, tolerance)
        low, high = _first(not_above, grid), _first(not_below, grid[::-1])
        if not not_below(grid[:1])[0]:
            # Whatever larger averages do, one network is enough.
            low = high = 1.0
        elif high == largest:
            high = math.inf
        return EnsembleEquivalent(value, min(low, value), max(high, value), int(largest))

    def _gap(
        self, losses: np.ndarray, differences: np.ndarray
    ) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """At sizes, the mean difference, and from where on it is significant.

        Between whole sizes the differences are linear in the losses of three, so that every mean
        square is a quadratic form in their scalar products.
        """
        method = _mean_squares(losses)
        crosses = [part @ own for part, own in zip(self._parts, method, strict=True)]
        owns = [own @ own for own in method]
        last = len(differences) - 1

        def gap(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            left = np.searchsorted(self._sizes, sizes, side="right") - 1
            left = np.clip(left, 0, max(0, last - 1))
            right = np.minimum(left + 1, last)
            span = np.maximum(self._sizes[right] - self._sizes[left], 1)
            share = (sizes - self._sizes[left]) / span
            rest = 1 - share
            mean = rest * differences[left] + share * differences[right]
            squares = [
                rest**2 * gram[left, left]
                + share**2 * gram[right, right]
                + 2 * share * rest * gram[left, right]
                - 2 * (rest * cross[left] + share * cross[right])
                + own
                for gram, cross, own in zip(self._grams, crosses, owns, strict=True)
            ]
            # Rounding can make a square that is 0 negative.
            error, freedom = _error([np.maximum(square, 0) for square in squares], self._shape)
            return mean, special.stdtrit(freedom, 0.975) * error

        return gap

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


def _first(holds: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray) -> float:
    """The first of the sizes, and of all numbers between them, at which something holds."""
    for _ in range(4):
        found = np.flatnonzero(holds(sizes))
        if len(found) == 0:
            return math.inf
        index = int(found[0])
        if index == 0:
            return float(sizes[0])
        sizes = np.linspace(sizes[index - 1], sizes[index], 50)
    return float(sizes[-1])


@dataclass(frozen=True)
class EquivalenceTest:
    """Whether two methods score alike, by two one-sided tests.

    Attributes:
        difference: the mean difference, and its 90 % interval: both tests at 5 %.
        margin: the largest difference that is held to be none.
        p_value: of the two tests together; below 0.05 the methods are equivalent.
    """

    difference: Interval
    margin: float
    p_value: float

    @property
    def verdict(self) -> str:
        """Where the 90 % interval lies.

        "equivalent": within the margin on both sides. "better" or "worse": wholly beyond it.
        "not worse": wholly below the upper margin, whatever the lower. "undecided": none of these,
        which is no proof of anything.
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
    r"""Are two methods alike within a margin? Two one-sided tests (TOST).

    That a difference is not significant shows nothing. Here the hypotheses to be rejected are
    $\delta \ge \mu$ and $\delta \le -\mu$, each at 5 %, with the error of `crossed_interval`.

    Args:
        differences: `[replicate, example]`: the loss of the method less that of the other.
        margin: $\mu$, positive, in the unit of the loss.

    Raises:
        ValueError: a margin that is not positive; another shape; numbers that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> equivalence_test(0.001 * rng.normal(size=(5, 100)), margin=0.01).verdict
        'equivalent'

    Reference:
        Schuirmann 1987, doi:10.1007/BF01068419.
    """
    if not 0 < margin < math.inf:
        raise ValueError(
            f"margin must be positive and finite, got {margin}: the largest difference that "
            "you would call none."
        )
    differences = _checked(differences, "differences")
    mean, error, freedom = _mean_and_error(differences)
    interval = crossed_interval(differences, level=0.9)
    if error == 0:
        return EquivalenceTest(interval, margin, float(abs(mean) >= margin))
    p_values = (
        stats.t.cdf((mean - margin) / error, freedom),
        stats.t.sf((mean + margin) / error, freedom),
    )
    return EquivalenceTest(interval, margin, float(max(p_values)))


def bootstrap_weights(rng: np.random.Generator, num_examples: int, num_draws: int) -> np.ndarray:
    """How often each example is drawn when as many are drawn with replacement.

    Returns:
        float32 `[draw, example]`; every row sums to `num_examples`.

    Example:
        >>> bootstrap_weights(np.random.default_rng(0), 5, 2).sum(1)
        array([5., 5.], dtype=float32)

    Reference:
        Efron 1979, doi:10.1214/aos/1176344552.
    """
    drawn = rng.integers(num_examples, size=(num_draws, num_examples))
    counts = [np.bincount(row, minlength=num_examples) for row in drawn]
    return np.stack(counts).astype(np.float32)


def bootstrap_interval(scores: np.ndarray, draws: np.ndarray) -> Interval:
    r"""The mean score of replicates and its 95 % interval, for scores that are no means.

    For ECE, AUROC and the like, where an example has no loss of its own: the variance is that of
    the replicates' mean, $s^2 / R$, and that of its bootstrap over examples, added; what
    replicates and examples do together is counted in both, so the interval is rather too wide.

    Args:
        scores: `[replicate]`, at least 2.
        draws: `[draw, replicate]`, at least 2 draws: the scores with examples drawn anew, the same
            in each replicate.

    Raises:
        ValueError: another shape.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> draws = 0.5 + 0.01 * rng.normal(size=(1000, 1))
        >>> bootstrap_interval(np.array([0.5, 0.5, 0.5]), np.repeat(draws, 3, 1))
        Interval(mean=0.5, low=0.48..., high=0.51..., num_replicates=3)
    """
    scores, draws = np.asarray(scores, np.float64), np.asarray(draws, np.float64)
    num_replicates = scores.size
    if scores.ndim != 1 or num_replicates < 2:
        raise ValueError(
            f"scores must be [replicate] with at least 2 replicates, got the shape {scores.shape}."
        )
    if draws.shape[1:] != scores.shape or len(draws) < 2:
        raise ValueError(
            f"draws must be [draw, replicate] with at least 2 draws and the {num_replicates} "
            f"replicates of scores, got the shape {draws.shape}."
        )
    of_replicates = scores.var(ddof=1) / num_replicates
    of_examples = draws.mean(1).var(ddof=1)
    total = of_replicates + of_examples
    spread = of_replicates**2 / (num_replicates - 1) + of_examples**2 / (len(draws) - 1)
    freedom = total**2 / spread if spread > 0 else num_replicates - 1
    half_width = float(stats.t.ppf(0.975, freedom) * math.sqrt(total))
    mean = float(scores.mean())
    return Interval(mean, mean - half_width, mean + half_width, num_replicates)
