"""Skewed means: third cumulants by enumeration, and errors of intervals and tests by simulation."""

import itertools

import numpy as np
import pytest
from bounds import binomial_bounds
from scipy import stats

from jdrop.statistics import EnsembleCurve, crossed_interval, equivalence_test
from jdrop.statistics.estimate import Estimate, third_cumulant
from jdrop.statistics.intervals import skewness


def test_third_cumulants_equal_scipy():
    values = np.random.default_rng(0).exponential(size=(4, 9))
    deviations = values - values.mean(1, keepdims=True)
    expected = [stats.kstat(row, 3) for row in values]
    np.testing.assert_allclose(third_cumulant(deviations), expected)
    assert (third_cumulant(deviations[:, :2]) == 0).all()


def test_the_skewness_of_a_mean_is_that_of_all_possible_studies():
    """Replicates and examples drawn from populations of three and two: 3**3 * 2**3 studies."""
    replicate_population, example_population = np.array([0.0, 0.5, 3.0]), np.array([-1.0, 6.0])
    means, cumulants = [], []
    for replicates in itertools.product(replicate_population, repeat=3):
        for examples in itertools.product(example_population, repeat=3):
            losses = np.array(replicates)[:, None] + np.array(examples)
            deviations = [losses.mean(axis) - losses.mean() for axis in (1, 0)]
            # With an error of 1, twice the third cumulant of the mean.
            cumulants.append(skewness(*map(third_cumulant, deviations), np.float64(1), (3, 3)))
            means.append(losses.mean())
    means = np.array(means)
    assert np.mean(cumulants) == pytest.approx(2 * ((means - means.mean()) ** 3).mean())


def test_the_end_on_the_side_of_the_long_tail_lies_farther_out_and_the_other_does_not_move():
    losses = np.random.default_rng(0).exponential(size=(1, 50)) + 0.1 * np.arange(4)[:, None]
    interval = crossed_interval(losses)
    assert interval.high - interval.mean > 1.02 * (interval.mean - interval.low)
    mirrored = crossed_interval(-losses)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))
    # The replicates are symmetric. Without the examples' tail, the interval is Student's.
    symmetric = losses.mean(1, keepdims=True) + np.zeros(50)
    expected = stats.t.interval(0.95, 3, symmetric.mean(), stats.sem(symmetric[:, 0]))
    interval = crossed_interval(symmetric)
    assert (interval.low, interval.high) == pytest.approx(expected)


@pytest.mark.parametrize("skew", [-0.8, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("caution", [0.0, 0.9])
def test_a_p_value_is_the_level_whose_interval_ends_at_the_bound(skew, caution):
    estimate = Estimate(*map(np.float64, (1.0, 0.5, 4.0, skew, caution)))
    for tail in (1e-6, 0.01, 0.05, 0.3):
        low, high = estimate.ends(1 - 2 * tail)
        assert estimate.p_value(high, "below") == pytest.approx(tail)
        assert estimate.p_value(low, "above") == pytest.approx(tail)
    # Bounds on the wrong side of the mean.
    for distance in (0.0, 0.3, 3.0, 300.0):
        assert estimate.p_value(1.0 - distance, "below") >= 0.5
        assert estimate.p_value(1.0 + distance, "above") >= 0.5


def test_rare_large_losses_of_examples_make_few_wrong_verdicts():
    """One example in twenty carries an exponential loss: Student's t is wrong for 11 %."""
    rng, studies = np.random.default_rng(0), 2000
    wrong = 0
    for _ in range(studies):
        effects = rng.exponential(size=500) * (rng.random(500) < 0.05)
        differences = effects + 0.1 * rng.normal(size=(5, 500))
        result = equivalence_test(differences, margin=0.05)
        wrong += result.verdict in ("better", "equivalent", "not worse")
    assert wrong <= binomial_bounds(studies, 0.055)[1], wrong / studies


def test_skewed_replicates_make_few_wrong_verdicts():
    """Lognormal effects of three replicates: Student's t is wrong for 17 %."""
    rng, studies = np.random.default_rng(0), 2000
    wrong = 0
    for _ in range(studies):
        effects = np.exp(0.8 * rng.normal(size=(3, 1)))
        differences = effects + 0.1 * rng.normal(size=(3, 50))
        result = equivalence_test(differences, margin=np.exp(0.8**2 / 2))
        wrong += result.verdict in ("better", "equivalent", "not worse")
    assert wrong <= binomial_bounds(studies, 0.055)[1], wrong / studies


def test_the_skewness_between_two_sizes_is_that_of_interpolated_losses():
    """Where an end touches zero, between the sizes, for losses with long tails both ways."""
    rng = np.random.default_rng(0)
    curve = 1 / np.arange(1, 5)[:, None] + 0.1 * rng.exponential(size=(4, 1, 300)) ** 2
    method = 0.2 * rng.exponential(size=(4, 300)) ** 2
    method -= method.mean() - curve.mean((0, 2))[1:3].mean()
    equivalent = EnsembleCurve(curve).equivalent(method)
    for end, side in ((equivalent.low, "low"), (equivalent.high, "high")):
        assert 1 < end < 4
        left, share = int(end), end % 1
        losses = (1 - share) * curve[:, left - 1] + share * curve[:, left]
        touching = getattr(crossed_interval(losses - method), side)
        assert touching == pytest.approx(0, abs=1e-5)
