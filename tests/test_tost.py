"""The equivalence test: verdicts, their p-values, and what is refused."""

import math

import numpy as np
import pytest
from crossed import crossed_effects, skewed_quantile
from scipy import optimize, stats

from jdrop.statistics import EquivalenceTest, Interval, crossed_interval, equivalence_test
from jdrop.statistics.refusals import effective_examples


def one_sided_p_value(statistic, freedom, skewness):
    """The tail of Student's t beyond the quantile whose skewed quantile is the statistic."""
    quantile = optimize.brentq(lambda x: skewed_quantile(x, skewness) - statistic, 0, 1e4)
    return stats.t.sf(quantile, freedom)


def test_the_p_value_of_equal_examples_is_that_of_a_skewed_t_test_of_replicates():
    """The replicates have all the variance, and so a further skewness of 2 / sqrt(4)."""
    means = np.array([0.02, -0.01, 0.03, 0.01])
    differences = np.repeat(means[:, None], 12, axis=1)
    error, skewness = stats.sem(means), 2 * stats.kstat(means, 3) / 4**2 / stats.sem(means) ** 3
    assert skewness < 0
    for margin in (0.04, 0.1):
        result = equivalence_test(differences, margin)
        below = one_sided_p_value((margin - means.mean()) / error, 3, 1)
        above = one_sided_p_value((means.mean() + margin) / error, 3, 1 - skewness)
        words = {"equivalent": max(below, above), "not worse": below, "undecided": None}
        assert result.p_value == pytest.approx(words[result.verdict])
        quantile = stats.t.ppf(0.95, 3)
        low = means.mean() - error * skewed_quantile(quantile, 1 - skewness)
        high = means.mean() + error * skewed_quantile(quantile, 1)
        assert (result.difference.low, result.difference.high) == pytest.approx((low, high))
    for shift, verdict, skew in ((-0.3, "better", 1), (0.3, "worse", 1 - skewness)):
        result = equivalence_test(differences + shift, 0.1)
        statistic = (abs(means.mean() + shift) - 0.1) / error
        assert result.verdict == verdict
        assert result.p_value == pytest.approx(one_sided_p_value(statistic, 3, skew))


def test_the_interval_of_an_equivalence_test_is_the_crossed_interval_without_replicate_variance():
    values = crossed_effects(np.random.default_rng(0), 4, 50, 0, 1, 1)
    values -= values.mean(1, keepdims=True) - 0.1
    expected = crossed_interval(values, level=0.9)
    difference = equivalence_test(values, 0.1).difference
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_the_p_value_is_small_exactly_where_the_verdict_says_something():
    """Moving the margin across an end of the interval changes the word, and p passes 0.05."""
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(300):
        differences = rng.normal() * 0.05 + rng.exponential() * crossed_effects(
            rng, 4, 20, 0.01, 0.05, 0.1
        )
        result = equivalence_test(differences, 0.05)
        says_something = result.verdict != "undecided"
        assert (result.p_value is not None) == says_something
        if says_something:
            assert 0 <= result.p_value < 0.05
        verdicts.add(result.verdict)
        # At a margin beside the end that a word needs, its p-value is 0.05.
        low, high = result.difference.low, result.difference.high
        words = {"better": -high, "worse": low, "not worse": high}
        for word, margin in words.items():
            if margin <= 1e-6:
                continue
            inside = margin * (1 + (1e-9 if word == "not worse" else -1e-9))
            near = equivalence_test(differences, inside)
            if near.verdict == word:
                assert near.p_value == pytest.approx(0.05, rel=1e-5)
    assert verdicts == {"equivalent", "better", "worse", "not worse", "undecided"}


def test_too_few_replicates_or_examples_are_refused():
    rng = np.random.default_rng(0)
    few = crossed_effects(rng, 2, 50, 0, 1, 1)
    result = equivalence_test(few - 100, 1.0)
    assert (result.verdict, result.p_value) == ("refused", None)
    assert result.refusal == "There are 2 replicates: a claim needs at least 3."
    assert result.difference.high < -90
    result = equivalence_test(crossed_effects(rng, 3, 9, 0, 1, 1) - 100, 1.0)
    assert "There are 9 test examples or groups: a claim needs at least 10" in result.refusal
    assert equivalence_test(crossed_effects(rng, 3, 10, 0, 1, 1) - 100, 1.0).refusal is None


def on_one_example(loss):
    differences = np.zeros((3, 100))
    differences[:, 5] = loss
    return differences


@pytest.mark.parametrize(
    ("loss", "shift", "verdict"),
    [
        # One example stands against the claim: other test sets may hold more of its kind.
        (1.0, 0.0, "refused"),
        (9.0, -9.0, "refused"),
        (-9.0, 9.0, "refused"),
        (-1.0, 0.0, "refused"),
        # It stands against the claim less than the others, and beyond the margin like them.
        (1.0, -9.0, "better"),
        (-1.0, 9.0, "worse"),
        # One example stands for it, and the claim holds without it.
        (-1.0, -9.0, "better"),
        (1.0, 9.0, "worse"),
        (-10.0, -0.9, "not worse"),
        # Nothing is claimed.
        (100.0, 0.0, "undecided"),
    ],
)
def test_a_claim_against_which_a_single_example_stands_is_refused(loss, shift, verdict):
    result = equivalence_test(on_one_example(loss) + shift, 1.0)
    assert result.verdict == verdict
    if verdict == "refused":
        assert "A few test examples or groups carry the difference, 1.0 effect" in result.refusal
        assert result.p_value is None


def test_a_claim_is_not_refused_if_enough_examples_or_none_differ():
    differences = on_one_example(1.0)
    differences[:, [6, 7, 8]] = 1
    assert equivalence_test(differences, 1.0).refusal is None
    # No example differs: nothing is carried by a few.
    assert equivalence_test(np.full((3, 100), 0.1), 1.0).verdict == "equivalent"
    # Nor do differences by rounding matter, which may be on a single example.
    rounded = np.zeros((3, 100))
    rounded[:, 5] = 1e-6
    result = equivalence_test(rounded, 0.01)
    assert (result.verdict, result.refusal) == ("equivalent", None)


def test_effective_examples_are_those_that_deviate_equally():
    means = np.zeros(100_000)
    means[:7] = 3.0
    assert effective_examples(means) == pytest.approx(7, rel=1e-3)
    assert effective_examples(1e-90 * means) == pytest.approx(7, rel=1e-3)
    # Of normal deviations the fourth moment is three times the squared second.
    normal = stats.norm.ppf((np.arange(9999) + 0.5) / 9999)
    assert effective_examples(normal) == pytest.approx(9999 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.05, "equivalent"),
        (-0.3, -0.2, "better"),
        (-0.2, 0.05, "not worse"),
        (0.2, 0.3, "worse"),
        (-0.05, 0.2, "undecided"),
        (-0.2, 0.2, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_margin(low, high, verdict):
    test = EquivalenceTest(Interval((low + high) / 2, low, high, 5), 0.1, 0.5)
    assert test.verdict == verdict


def test_the_p_value_without_noise_is_0():
    for margin, verdict in ((0.5, "equivalent"), (0.125, "worse")):
        result = equivalence_test(np.full((3, 16), 0.25), margin)
        assert (result.verdict, result.p_value) == (verdict, 0)
    assert equivalence_test(np.full((3, 16), -0.25), 0.125).verdict == "better"
    # On the border nothing is shown.
    result = equivalence_test(np.full((3, 16), 0.25), 0.25)
    assert (result.verdict, result.p_value) == ("undecided", None)


@pytest.mark.parametrize("margin", [0.0, -0.1, math.inf, math.nan])
def test_a_margin_that_is_not_positive_and_finite_raises(margin):
    with pytest.raises(ValueError, match="margin must be positive"):
        equivalence_test(np.zeros((2, 2)), margin)
