import math

import numpy as np
import pytest
from bounds import binomial_bounds, chi_square_bounds
from crossed import crossed_effects, interval_from_variance_components
from scipy import stats

from jdrop.statistics import (
    bootstrap_interval,
    bootstrap_weights,
    crossed_interval,
    equivalence_test,
    mean_interval,
)


def test_the_mean_interval_equals_scipy():
    values = np.random.default_rng(0).normal(size=8)
    interval = mean_interval(list(values))
    expected = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.num_replicates == 8


def test_the_mean_interval_covers_the_true_mean_at_its_level():
    """5,000 samples of 4: the share of intervals that hold the mean is within 5 sigma of 0.95."""
    samples = np.random.default_rng(0).normal(size=(5000, 4))
    intervals = [mean_interval(list(sample)) for sample in samples]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert abs(covered - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 5000), covered


def test_a_single_replicate_has_no_interval():
    interval = mean_interval([0.5])
    assert (interval.mean, interval.low, interval.high, interval.num_replicates) == (
        0.5,
        None,
        None,
        1,
    )


def test_the_mean_of_no_replicates_raises():
    with pytest.raises(ValueError, match="at least 1 replicate"):
        mean_interval([])


# The crossed interval of replicates and examples


@pytest.mark.parametrize(
    "scales", [(1, 1, 1), (0.1, 1, 0.2), (0, 0, 1), (1, 0.01, 0.1)], ids=lambda scales: str(scales)
)
@pytest.mark.parametrize("shape", [(2, 7), (5, 40), (3, 2)])
def test_the_crossed_interval_equals_the_interval_from_variance_components(shape, scales):
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = 3 + crossed_effects(rng, *shape, *scales)
        for level in (0.95, 0.9):
            interval = crossed_interval(values, level=level)
            assert (interval.low, interval.high) == pytest.approx(
                interval_from_variance_components(values, level)
            )
        assert interval.mean == pytest.approx(values.mean())
        assert interval.num_replicates == shape[0]


def test_the_crossed_interval_of_two_by_two_losses_by_hand():
    """The mean squares are 16 for replicates, 16 for examples and 4 for their interaction."""
    interval = crossed_interval(np.array([[0.0, 2.0], [2.0, 8.0]]))
    freedom = 28**2 / (16**2 + 16**2 + 4**2)
    assert interval.high - 3 == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(28 / 4))


def test_the_crossed_interval_of_equal_examples_equals_the_mean_interval():
    means = np.array([0.1, 0.4, 0.2, 0.3])
    expected = mean_interval(list(means))
    interval = crossed_interval(np.repeat(means[:, None], 6, axis=1))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_the_crossed_interval_stays_bounded_if_replicates_agree():
    """Satterthwaite's formula alone would give nearly 0 degrees of freedom."""
    rng = np.random.default_rng(0)
    values = crossed_effects(rng, 2, 500, 0, 0.2, 1)
    values -= values.mean(1, keepdims=True)
    interval = crossed_interval(values)
    assert interval.high < stats.t.ppf(0.975, 1) * math.sqrt((0.2**2 + 1) * 2 / 500)


@pytest.mark.parametrize("scales", [(0.1, 1, 0.1), (0.5, 1, 2), (0, 0, 1)], ids=str)
def test_the_crossed_interval_covers_the_mean_of_new_replicates_and_examples(scales):
    rng, studies = np.random.default_rng(0), 2000
    intervals = [crossed_interval(crossed_effects(rng, 5, 50, *scales)) for _ in range(studies)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    # Satterthwaite's approximation is no exact 95 %: simulated at length, 94 to 96 %.
    low, high = binomial_bounds(studies, 0.94)[0], binomial_bounds(studies, 0.965)[1]
    assert low <= covered <= high, covered / studies


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5), "at least 2 replicates and 2 examples, got the shape \\(5,\\)"),
        (np.zeros((1, 5)), "at least 2 replicates"),
        (np.zeros((5, 1)), "2 examples"),
        (np.array([[0.0, math.nan], [0.0, 1.0]]), "finite, got 1 of 4"),
        (np.array([[0.0, math.inf], [0.0, 1.0]]), "rules out the true class"),
    ],
)
def test_losses_without_a_crossed_interval_raise(values, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(values)
    with pytest.raises(ValueError, match=message):
        equivalence_test(values, 0.1)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_a_level_outside_0_to_1_raises(level):
    with pytest.raises(ValueError, match="level must lie in"):
        crossed_interval(np.zeros((2, 2)), level=level)


# Bootstrap


def test_bootstrap_weights_are_multinomial():
    num_examples, num_draws = 20, 4000
    weights = bootstrap_weights(np.random.default_rng(0), num_examples, num_draws)
    assert weights.shape == (num_draws, num_examples)
    assert weights.dtype == np.float32
    assert (weights.sum(1) == num_examples).all()
    for count in range(4):
        occurrences = (weights == count).sum(0)
        probability = stats.binom.pmf(count, num_examples, 1 / num_examples)
        low, high = binomial_bounds(num_draws, probability, checks=num_examples)
        assert ((low <= occurrences) & (occurrences <= high)).all(), count


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    draws = bootstrap_weights(rng, 400, 2000) @ values / 400
    statistic = ((draws - values.mean()) ** 2).sum() / (values.var() / 400)
    low, high = chi_square_bounds(2000)
    assert low <= statistic <= high


def test_the_bootstrap_interval_adds_the_variances_of_replicates_and_examples():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4)
    draws = rng.normal(size=(50, 1)) + 0.3 * rng.normal(size=(50, 4))
    interval = bootstrap_interval(scores, draws)
    variances = [stats.sem(scores) ** 2, np.var(draws.mean(1), ddof=1)]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 49)
    expected = stats.t.interval(0.95, freedom, scores.mean(), math.sqrt(sum(variances)))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert (interval.mean, interval.num_replicates) == (pytest.approx(scores.mean()), 4)


def test_the_bootstrap_interval_of_a_mean_is_close_to_the_crossed_interval():
    """The interaction is small, since the bootstrap interval counts it twice."""
    rng = np.random.default_rng(0)
    losses = crossed_effects(rng, 5, 400, 0.05, 1, 0.1)
    draws = bootstrap_weights(rng, 400, 4000) @ losses.T / 400
    actual, expected = bootstrap_interval(losses.mean(1), draws), crossed_interval(losses)
    # The tolerance is six standard errors of the width, from the variance of 4,000 draws.
    assert actual.high - actual.low == pytest.approx(expected.high - expected.low, rel=0.07)


def test_the_bootstrap_interval_without_variance_is_the_mean():
    interval = bootstrap_interval(np.full(3, 0.5), np.full((4, 3), 0.5))
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_scores_without_a_bootstrap_interval_raise():
    with pytest.raises(ValueError, match="at least 2 replicates, got the shape"):
        bootstrap_interval(np.zeros(1), np.zeros((5, 1)))
    for shape in ((1, 3), (5, 2), (5,)):
        with pytest.raises(ValueError, match="at least 2 draws and the 3 replicates"):
            bootstrap_interval(np.zeros(3), np.zeros(shape))
