"""Intervals of means over replicates, over replicates and examples, and over bootstrap draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jdrop.statistics.estimate import Estimate, Numbers, third_cumulant
from jdrop.statistics.groups import group_indices


@dataclass(frozen=True)
class Interval:
    """A mean over independent replicates and its confidence interval.

    Attributes:
        mean: the mean of the replicates.
        low: the lower end of the interval; None if there is a single replicate.
        high: the upper end; None if there is a single replicate.
        num_replicates: how many independent replicates the mean is over.
    """

    mean: float
    low: float | None
    high: float | None
    num_replicates: int


def mean_interval(values: Sequence[float]) -> Interval:
    r"""The mean of independent replicates and Student's 95 % interval for it.

    $\bar v \pm t_{n-1} \, s / \sqrt n$ with $s^2 = \sum_i (v_i - \bar v)^2 / (n - 1)$.

    Args:
        values: a value from each replicate. If they are normal, 95 % of such intervals hold the
            true mean.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.484..., high=4.484..., num_replicates=3)
        >>> mean_interval([1.0])
        Interval(mean=1.0, low=None, high=None, num_replicates=1)
    """
    replicates = np.asarray(values, np.float64)
    count = len(replicates)
    if count == 0:
        raise ValueError("values must hold at least 1 replicate, got 0.")
    mean = float(replicates.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    quantile = stats.t.ppf(0.975, count - 1)
    half_width = float(quantile * replicates.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half_width, mean + half_width, count)


def crossed_interval(losses: np.ndarray, *, level: float = 0.95) -> Interval:
    r"""The mean over replicates and examples, and its interval for new replicates and new examples.

    The model has two-way random effects. It estimates the variance of the mean by

    $$\widehat{\mathrm{Var}}(\bar d) = \left(M_r + \max(M_n - M_{rn}, 0)\right) / (R N)$$

    with the mean squares $M_r$ of the $R$ replicates, $M_n$ of the $N$ examples, and $M_{rn}$ of
    their interaction. The interval uses Student's t with Satterthwaite's degrees of freedom, at
    least $\min(R, N) - 1$. It is at least the variance that replicates alone give the mean.

    With the standard error $s$ and Student's quantile $t$, the ends are

    $$\bar d \pm \left(t + \frac{\max(\pm \kappa, 0)}{6} (2 t^2 + 1)\right) s, \qquad
    \kappa = \frac{2}{s^3} \left(\frac{k_r}{R^2} + \frac{k_n}{N^2}\right)$$

    with unbiased third cumulants $k_r$ of the means of replicates and $k_n$ of those of examples.
    So the end on the side of the longer tail lies farther out than without skewness.

    Args:
        losses: `[replicate, example]`, finite, with at least 2 replicates and 2 examples: the
            losses of a method, or the differences between two methods' losses.
        level: the share of such intervals that hold the true mean, in (0, 1).

    Raises:
        ValueError: if the shape is wrong, a loss is not finite, or the level is not in (0, 1).

    Example:
        >>> crossed_interval(np.array([[1.0, 2.0, 3.0], [1.1, 2.1, 3.1]]))
        Interval(mean=2.05, low=-0.408..., high=4.508..., num_replicates=2)

    Reference:
        Satterthwaite 1946, doi:10.2307/3002019; Searle, Casella and McCulloch 1992, chapter 4;
        for the skewness, Johnson 1978, doi:10.1080/01621459.1978.10480051.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}; 0.95 is usual.")
    losses = checked_losses(losses, "losses")
    return to_interval(estimate(losses), level, len(losses))


def to_interval(estimated: Estimate, level: float, num_replicates: int) -> Interval:
    """The interval of a single mean."""
    low, high = estimated.ends(level)
    return Interval(float(estimated.mean), float(low), float(high), num_replicates)


def checked_losses(losses: np.ndarray, name: str, ndim: int = 2) -> np.ndarray:
    """The losses in double precision.

    Raises:
        ValueError: if the shape is wrong, or a loss is not finite.
    """
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
            "infinite or NaN: a method that rules out the true class has an infinite loss."
        )
    return losses


def scaled_deviations(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The deviations due to replicates `[R]`, to examples `[N]` and to their interaction `[R * N]`.

    They are scaled so that the sum of squares of each is its mean square.
    """
    num_replicates, num_examples = losses.shape
    mean = losses.mean()
    replicate_effects, example_effects = losses.mean(1) - mean, losses.mean(0) - mean
    interaction = losses - mean - replicate_effects[:, None] - example_effects[None]
    return (
        replicate_effects * math.sqrt(num_examples / (num_replicates - 1)),
        example_effects * math.sqrt(num_replicates / (num_examples - 1)),
        interaction.ravel() / math.sqrt((num_replicates - 1) * (num_examples - 1)),
    )


def standard_error(
    mean_squares: Sequence[Numbers], shape: tuple[int, int]
) -> tuple[Numbers, Numbers]:
    """The standard errors of means and their degrees of freedom.

    Args:
        mean_squares: for each mean, the mean squares of replicates, examples and interaction.
        shape: the numbers of replicates and of examples.
    """
    replicates, examples, interaction = mean_squares
    num_replicates, num_examples = shape
    # Examples add variance only beyond what the interaction already explains.
    examples_add = examples > interaction
    total = replicates + np.where(examples_add, examples - interaction, 0)
    spread = replicates**2 / (num_replicates - 1) + np.where(
        examples_add,
        examples**2 / (num_examples - 1)
        + interaction**2 / ((num_replicates - 1) * (num_examples - 1)),
        0,
    )
    freedom = total**2 / np.where(spread > 0, spread, 1)
    # For a difference of mean squares, Satterthwaite's formula can give degrees of freedom near 0,
    # and so a huge quantile. A sum of mean squares never has fewer than its least term.
    freedom = np.maximum(freedom, min(num_replicates, num_examples) - 1)
    return np.sqrt(total / (num_replicates * num_examples)), freedom


def skewness(
    replicate_cumulants: Numbers,
    example_cumulants: Numbers,
    error: Numbers,
    shape: tuple[int, int],
) -> Numbers:
    """Twice the skewness of means, from the third cumulants of replicates' and of examples' means.

    The third cumulant of a mean of `n` independent values is theirs divided by `n**2`, and those of
    independent effects add up. It is twice the estimate, since small samples show too little
    skewness: the large values that make it are rare.
    """
    num_replicates, num_examples = shape
    cumulant = replicate_cumulants / num_replicates**2 + example_cumulants / num_examples**2
    return 2 * cumulant / np.where(error > 0, error, np.inf) ** 3


def estimate(losses: np.ndarray, replicate_skewness: float = 0.0) -> Estimate:
    """The mean of losses `[replicate, example]` with its standard error and skewness.

    Args:
        losses: `[replicate, example]`.
        replicate_skewness: a skewness of the effects of replicates, in the direction that stands
            against a claim, beyond that estimated.
    """
    mean_squares = [effect @ effect for effect in scaled_deviations(losses)]
    error, freedom = standard_error(mean_squares, losses.shape)
    mean = losses.mean()
    replicates, examples = (third_cumulant(losses.mean(axis) - mean) for axis in (1, 0))
    skew = skewness(replicates, examples, error, losses.shape)
    of_replicates, _, of_interaction = mean_squares
    variance = max(of_replicates - of_interaction, 0) / losses.size
    share = variance / error**2 if error > 0 else 0.0
    caution = replicate_skewness * share**1.5 / math.sqrt(len(losses))
    return Estimate(mean, error, freedom, skew, caution)


def bootstrap_weights(
    rng: np.random.Generator,
    num_examples: int,
    num_draws: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Bootstrap weights: how often each example occurs in a resample with replacement.

    Args:
        rng: NumPy's generator.
        num_examples: how many examples there are, and each resample has.
        num_draws: how many resamples.
        groups: `[example]`: the group of each example, as integers or names. Whole groups are then
            drawn, as many as there are.

    Returns:
        float32 `[draw, example]`; every row sums to `num_examples`. With groups of unequal sizes it
        does not: a weighted mean then needs the sum of its row.

    Raises:
        ValueError: if there is not one group for each example.

    Example:
        >>> bootstrap_weights(np.random.default_rng(0), 5, 2).sum(1)
        array([5., 5.], dtype=float32)
        >>> bootstrap_weights(np.random.default_rng(1), 4, 2, np.array([3, 3, 8, 8]))
        array([[1., 1., 1., 1.],
               [0., 0., 2., 2.]], dtype=float32)

    Reference:
        Efron 1979, doi:10.1214/aos/1176344552; for groups, Davison and Hinkley 1997, section 3.8.
    """
    if groups is None:
        groups = np.arange(num_examples)
    index, num_groups = group_indices(groups, num_examples)
    drawn = rng.integers(num_groups, size=(num_draws, num_groups))
    counts = [np.bincount(row, minlength=num_groups) for row in drawn]
    return np.stack(counts).astype(np.float32)[:, index]


def bootstrap_interval(scores: np.ndarray, draws: np.ndarray) -> Interval:
    r"""The mean score of replicates and its 95 % interval, for scores that are no example means.

    ECE and AUROC, for instance, give an example no loss of its own. The variance is the sum of two:
    that of the replicates' mean, $s^2 / R$, and that of the mean's bootstrap over examples. The
    replicate-by-example interaction is counted twice, so the interval is conservative.

    Args:
        scores: `[replicate]`, at least 2 replicates.
        draws: `[draw, replicate]`, at least 2 draws: the scores on resampled examples. Each draw
            resamples the same examples in every replicate.

    Raises:
        ValueError: if a shape is wrong.

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
    replicate_variance = scores.var(ddof=1) / num_replicates
    example_variance = draws.mean(1).var(ddof=1)
    total = replicate_variance + example_variance
    spread = replicate_variance**2 / (num_replicates - 1) + example_variance**2 / (len(draws) - 1)
    freedom = total**2 / spread if spread > 0 else num_replicates - 1
    half_width = float(stats.t.ppf(0.975, freedom) * math.sqrt(total))
    mean = float(scores.mean())
    return Interval(mean, mean - half_width, mean + half_width, num_replicates)
