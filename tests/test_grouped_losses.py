"""Examples that belong together: values of groups, and bootstrap draws of whole groups."""

import numpy as np
import pytest
from bounds import binomial_bounds
from scipy import stats

from jdrop.statistics import (
    EnsembleCurve,
    bootstrap_weights,
    crossed_interval,
    group_losses,
)


def uneven_groups(num_examples=60):
    """Groups of different sizes whose examples do not stand together."""
    return np.random.default_rng(5).choice([3, 9, 10, 20, 41, 50, 77], num_examples)


def test_values_of_groups_have_the_mean_of_the_examples():
    losses = np.random.default_rng(0).normal(size=(3, 4, 60))
    values = group_losses(losses, uneven_groups())
    assert values.shape == (3, 4, 7)
    np.testing.assert_allclose(values.mean(-1), losses.mean(-1), atol=1e-14)


def test_values_of_groups_are_sums_of_deviations_over_each_group():
    losses, groups = np.random.default_rng(0).normal(size=(2, 60)), uneven_groups()
    for row, values in zip(losses, group_losses(losses, groups), strict=True):
        for name, value in zip(sorted(set(groups)), values, strict=True):
            deviations = [loss - row.mean() for loss in row[groups == name]]
            assert value == pytest.approx(row.mean() + 7 / 60 * sum(deviations))


def test_values_of_groups_of_equal_size_are_means_of_groups():
    losses = np.random.default_rng(0).normal(size=(2, 12))
    groups = np.tile(np.arange(4), 3)
    expected = losses.reshape(2, 3, 4).mean(1)
    np.testing.assert_allclose(group_losses(losses, groups), expected, atol=1e-14)


def test_groups_of_one_example_change_nothing():
    losses = np.random.default_rng(0).normal(size=(2, 12))
    np.testing.assert_allclose(group_losses(losses, np.arange(12)), losses, atol=1e-14)


def test_values_of_groups_are_linear_in_the_losses():
    first, second = np.random.default_rng(0).normal(size=(2, 3, 60))
    groups = uneven_groups()
    np.testing.assert_allclose(
        group_losses(2 * first - second, groups),
        2 * group_losses(first, groups) - group_losses(second, groups),
        atol=1e-13,
    )


def cluster_robust_error(losses, groups):
    """The CR1 standard error of the intercept of a regression on a constant.

    The sandwich formula with matrices: `bread @ (sum of score @ score.T) @ bread`.
    """
    design = np.ones((len(losses), 1))
    bread = np.linalg.inv(design.T @ design)
    residuals = losses - design @ (bread @ design.T @ losses)
    names = set(groups)
    scores = [design[groups == name].T @ residuals[groups == name] for name in names]
    variance = bread @ sum(np.outer(score, score) for score in scores) @ bread
    return np.sqrt(variance[0, 0] * len(names) / (len(names) - 1))


def test_the_error_of_values_of_groups_is_cluster_robust():
    losses, groups = np.random.default_rng(0).normal(size=60), uneven_groups()
    assert stats.sem(group_losses(losses, groups)) == pytest.approx(
        cluster_robust_error(losses, groups)
    )


def test_intervals_of_groups_cover_where_intervals_of_examples_do_not():
    """Examples of a group share half of the variance; a group has 1 to 15 examples."""
    rng, studies = np.random.default_rng(0), 1000
    covered = {"groups": 0, "examples": 0}
    for _ in range(studies):
        groups = np.repeat(np.arange(40), rng.integers(1, 16, 40))
        losses = (
            rng.normal(size=40)[groups]
            + rng.normal(size=len(groups))
            + 0.1 * rng.normal(size=(5, len(groups)))
        )
        values = {"groups": group_losses(losses, groups), "examples": losses}
        for name in covered:
            interval = crossed_interval(values[name])
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["groups"] >= binomial_bounds(studies, 0.92)[0]
    assert covered["examples"] < binomial_bounds(studies, 0.8)[1]


def test_a_method_has_the_same_worth_by_groups_as_by_examples():
    rng, groups = np.random.default_rng(0), uneven_groups()
    curve = 1 / np.arange(1, 5)[:, None] + 0.1 * rng.normal(size=(3, 4, 60))
    method = 0.4 + 0.1 * rng.normal(size=(3, 60))
    expected = EnsembleCurve(curve).equivalent(method)
    by_groups = EnsembleCurve(group_losses(curve, groups)).equivalent(group_losses(method, groups))
    assert by_groups.value == pytest.approx(expected.value)
    assert by_groups.high != expected.high


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(5), "one group for each of the 6 examples, got the shape \\(5,\\)"),
        (np.zeros((1, 6)), "got the shape \\(1, 6\\)"),
        (np.zeros(6), "at least 2 groups, got 1"),
    ],
)
def test_groups_that_do_not_fit_raise(groups, message):
    with pytest.raises(ValueError, match=message):
        group_losses(np.zeros((2, 6)), groups)


def test_bootstrap_weights_draw_whole_groups():
    groups, num_draws = uneven_groups(), 3000
    weights = bootstrap_weights(np.random.default_rng(0), 60, num_draws, groups)
    assert weights.shape == (num_draws, 60)
    assert weights.dtype == np.float32
    names, first = np.unique(groups, return_index=True)
    for name, index in zip(names, first, strict=True):
        assert (weights[:, groups == name] == weights[:, [index]]).all()
    # Each draw has as many groups as there are, and a group's count is binomial.
    assert (weights[:, first].sum(1) == 7).all()
    for count in range(4):
        occurrences = (weights[:, first] == count).sum(0)
        low, high = binomial_bounds(num_draws, stats.binom.pmf(count, 7, 1 / 7), checks=28)
        assert ((low <= occurrences) & (occurrences <= high)).all(), count


def test_bootstrap_weights_of_groups_of_one_example_are_those_without_groups():
    plain = bootstrap_weights(np.random.default_rng(0), 20, 50)
    single = bootstrap_weights(np.random.default_rng(0), 20, 50, np.arange(20))
    np.testing.assert_array_equal(plain, single)
    with pytest.raises(ValueError, match="one group for each of the 20 examples"):
        bootstrap_weights(np.random.default_rng(0), 20, 50, np.arange(19))
