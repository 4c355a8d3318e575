import math

import numpy as np
import pytest
from bounds import binomial_bounds, chi_square_bounds
from scipy import optimize, stats

from jdrop.statistics import (
    EnsembleCurve,
    EnsembleEquivalent,
    EquivalenceTest,
    Interval,
    bootstrap_interval,
    bootstrap_weights,
    crossed_interval,
    equivalence_test,
    mean_interval,
)
from jdrop.statistics.refusals import effective_examples


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


def crossed_effects(rng, replicates, examples, replicate_std, example_std, interaction_std):
    """Losses of mean 0 with normal effects of the given standard deviations."""
    return (
        replicate_std * rng.normal(size=(replicates, 1))
        + example_std * rng.normal(size=(1, examples))
        + interaction_std * rng.normal(size=(replicates, examples))
    )


def skewed_quantile(quantile, skewness):
    return quantile + max(skewness, 0) * (2 * quantile**2 + 1) / 6


def interval_from_variance_components(values, level=0.95):
    """The interval from variance components, each estimated by a difference of sums.

    Skewness is that of SciPy's unbiased k-statistics.
    """
    r, n = values.shape
    correction = values.sum() ** 2 / (r * n)
    between_r = sum(values[i].sum() ** 2 for i in range(r)) / n - correction
    between_n = sum(values[:, j].sum() ** 2 for j in range(n)) / r - correction
    within = (values**2).sum() - correction - between_r - between_n
    ms_r, ms_n = between_r / (r - 1), between_n / (n - 1)
    ms_rn = within / ((r - 1) * (n - 1))
    interaction = ms_rn
    replicate = (ms_r - ms_rn) / n
    example = (ms_n - ms_rn) / r
    variance = replicate / r + max(example, 0) / n + interaction / (r * n)
    terms = [(ms_r / (r * n), r - 1)]
    if example > 0:
        terms += [(ms_n / (r * n), n - 1), (ms_rn / (r * n), (r - 1) * (n - 1))]
    freedom = variance**2 / sum(term**2 / degrees for term, degrees in terms)
    quantile = stats.t.ppf((1 + level) / 2, max(freedom, min(r, n) - 1))
    cumulant = sum(
        stats.kstat(values.mean(axis), 3) / values.shape[1 - axis] ** 2
        for axis in (0, 1)
        if values.shape[1 - axis] > 2
    )
    skewness = 2 * cumulant / variance**1.5
    return (
        values.mean() - skewed_quantile(quantile, -skewness) * math.sqrt(variance),
        values.mean() + skewed_quantile(quantile, skewness) * math.sqrt(variance),
    )


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


# EnsembleCurve and EnsembleEquivalent


def exact_curve(means, replicates=3, examples=20, noise=1e-9):
    """Losses `[replicate, size, example]` of the given means, with hardly any noise."""
    rng = np.random.default_rng(0)
    shape = replicates, len(means), examples
    return np.asarray(means)[None, :, None] + noise * rng.normal(size=shape)


def constant_losses(value, replicates=3, examples=20):
    return np.full((replicates, examples), float(value))


MEANS = [1.0, 0.6, 0.5, 0.45]


@pytest.mark.parametrize(
    ("loss", "value"),
    [(0.8, 1.5), (0.6, 2.0), (0.55, 2.5), (0.46, 3.8), (0.99, 1.025)],
)
def test_without_noise_the_interval_of_an_equivalent_is_its_value(loss, value):
    equivalent = EnsembleCurve(exact_curve(MEANS)).equivalent(constant_losses(loss))
    assert (equivalent.low, equivalent.value, equivalent.high) == pytest.approx(
        [value] * 3, abs=1e-5
    )
    assert equivalent.low <= equivalent.value <= equivalent.high
    assert equivalent.largest == 4


@pytest.mark.parametrize("loss", [1.1, 5.0])
def test_a_method_worse_than_a_single_network_has_equivalent_1(loss):
    equivalent = EnsembleCurve(exact_curve(MEANS)).equivalent(constant_losses(loss))
    assert equivalent == EnsembleEquivalent(1.0, 1.0, 1.0, 4)
    assert str(equivalent) == "≤1 [≤1, ≤1]"


def test_a_method_better_than_the_largest_ensemble_has_an_infinite_equivalent():
    equivalent = EnsembleCurve(exact_curve(MEANS)).equivalent(constant_losses(0.4))
    assert equivalent == EnsembleEquivalent(math.inf, math.inf, math.inf, 4)
    assert str(equivalent) == ">4 [>4, >4]"


def test_the_equivalent_is_1_even_if_larger_ensembles_do_worse():
    curve = EnsembleCurve(exact_curve([0.5, 0.8, 0.8]))
    assert curve.equivalent(constant_losses(0.8)) == EnsembleEquivalent(1.0, 1.0, 1.0, 3)


def test_the_equivalent_is_the_first_crossing_and_its_interval_holds_all():
    equivalent = EnsembleCurve(exact_curve([1.0, 0.4, 0.8, 0.3])).equivalent(constant_losses(0.6))
    assert equivalent.value == pytest.approx(1 + 0.4 / 0.6)
    assert equivalent.low == pytest.approx(equivalent.value, abs=1e-5)
    assert equivalent.high == pytest.approx(3.4, abs=1e-5)


def test_rounding_does_not_keep_equal_means_from_crossing():
    means = [0.3, 0.1 + 0.2 - 0.1, 0.1]
    equivalent = EnsembleCurve(exact_curve(means, noise=0)).equivalent(constant_losses(0.2))
    assert (equivalent.low, equivalent.value, equivalent.high) == pytest.approx([2.0] * 3, abs=1e-5)
    # Means of losses in single precision, summed in another order, differ by as much as this.
    means = [0.5, 0.2, 0.1 + 3.8e-9]
    equivalent = EnsembleCurve(exact_curve(means, noise=0)).equivalent(constant_losses(0.1))
    assert equivalent.value == 3
    flat = EnsembleCurve(exact_curve([0.1 + 0.2] * 3, noise=0)).equivalent(constant_losses(0.3))
    assert flat == EnsembleEquivalent(1.0, 1.0, math.inf, 3)


def noisy_curve(rng, replicates=4, sizes=6, examples=60):
    """Losses of ensembles, and of a method on the same examples."""
    example_effects = 0.3 * rng.normal(size=(1, 1, examples))
    curve = (
        (1 + 1 / np.arange(1, sizes + 1))[None, :, None]
        + example_effects
        + 0.03 * rng.normal(size=(replicates, 1, 1))
        + 0.2 * rng.normal(size=(replicates, sizes, examples)) / np.arange(1, sizes + 1)[:, None]
    )
    return curve, example_effects[:, 0] + crossed_effects(
        rng, replicates, examples, 0.02, 0.05, 0.2
    )


def test_the_equivalent_of_an_ensemble_is_its_size():
    rng = np.random.default_rng(0)
    losses, _ = noisy_curve(rng)
    curve = EnsembleCurve(losses)
    for size in range(6):
        equivalent = curve.equivalent(losses[:, size])
        assert equivalent.value == pytest.approx(size + 1)
        assert equivalent.low <= equivalent.value <= equivalent.high


def test_interval_ends_are_where_the_crossed_interval_of_differences_reaches_zero():
    """Every size on a fine grid, from its losses themselves, without products of deviations."""
    rng = np.random.default_rng(0)
    losses, method = noisy_curve(rng)
    curve = EnsembleCurve(losses)
    sizes = np.linspace(1, 6, 251)
    censored = set()
    for level in np.linspace(1.1, 2.1, 21):
        equivalent = curve.equivalent(method + level)
        ends = []
        for size in sizes:
            left = min(int(size), 5)
            share = size - left
            curve_losses = (1 - share) * losses[:, left - 1] + share * losses[:, left]
            ends.append(interval_from_variance_components(curve_losses - method - level))
        lows, highs = np.transpose(ends)
        not_above, not_below = sizes[lows <= 0], sizes[highs >= 0]
        low = not_above[0] if len(not_above) else math.inf
        high = not_below[-1] if len(not_below) else 1.0
        if high == 6:
            high = math.inf
        if highs[0] < 0:
            low = high = 1.0
        # The first grid point inside the interval lies up to a step of 0.02 from its end.
        assert low == equivalent.low or low - 0.02 <= equivalent.low <= low
        assert high == equivalent.high or high <= equivalent.high <= high + 0.02
        assert equivalent.low <= equivalent.value <= equivalent.high
        censored.add((equivalent.low == 1, equivalent.high == math.inf))
    assert censored >= {(True, False), (False, False), (False, True)}


def test_the_crossed_interval_at_an_interval_end_touches_zero():
    rng = np.random.default_rng(0)
    losses, method = noisy_curve(rng)
    equivalent = EnsembleCurve(losses).equivalent(method + 1.4)
    for end, side in ((equivalent.low, 0), (equivalent.high, 1)):
        left = int(end)
        share = end - left
        curve_losses = (1 - share) * losses[:, left - 1] + share * losses[:, left]
        interval = crossed_interval(curve_losses - method - 1.4)
        assert (interval.low, interval.high)[side] == pytest.approx(0, abs=1e-6)


def test_an_equivalent_is_invariant_to_affine_maps_of_the_loss():
    losses, method = noisy_curve(np.random.default_rng(0))
    equivalent = EnsembleCurve(losses).equivalent(method + 1.4)
    scaled = EnsembleCurve(7 * losses - 3).equivalent(7 * (method + 1.4) - 3)
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(getattr(equivalent, name), abs=1e-6)


def test_a_monotone_map_of_the_loss_moves_an_equivalent_only_between_whole_sizes():
    for loss in (0.8, 0.6, 0.55, 0.47):
        plain = EnsembleCurve(exact_curve(MEANS)).equivalent(constant_losses(loss)).value
        squared = (
            EnsembleCurve(exact_curve(np.square(MEANS))).equivalent(constant_losses(loss**2)).value
        )
        assert math.ceil(plain) == math.ceil(squared)


def test_a_curve_may_skip_sizes():
    curve = EnsembleCurve(exact_curve([1.0, 0.6, 0.2]), sizes=(1, 5, 100))
    assert curve.equivalent(constant_losses(0.8)).value == pytest.approx(3.0)
    equivalent = curve.equivalent(constant_losses(0.4))
    assert (equivalent.low, equivalent.value, equivalent.high) == pytest.approx(
        [52.5] * 3, abs=1e-4
    )
    assert equivalent.largest == 100


def test_a_curve_of_a_single_size_tells_1_from_more():
    curve = EnsembleCurve(exact_curve([0.5]))
    assert curve.equivalent(constant_losses(0.6)) == EnsembleEquivalent(1.0, 1.0, 1.0, 1)
    assert curve.equivalent(constant_losses(0.4)) == EnsembleEquivalent(
        math.inf, math.inf, math.inf, 1
    )


def test_an_equivalent_is_printed_with_its_interval():
    assert str(EnsembleEquivalent(3.14, 2.4, 4.0, 10)) == "3.1 [2.4, 4.0]"
    assert str(EnsembleEquivalent(math.inf, 7.2, math.inf, 10)) == ">10 [7.2, >10]"
    assert str(EnsembleEquivalent(1.0, 1.0, 1.3, 10)) == "≤1 [≤1, 1.3]"


@pytest.mark.parametrize("value", [1.0, 3.0, math.inf])
def test_an_equivalent_that_may_be_anything_is_not_resolved(value):
    equivalent = EnsembleEquivalent(value, 1.0, math.inf, 10)
    assert not equivalent.is_resolved
    assert str(equivalent) == "not resolved"
    for low, high in ((1.0, 9.9), (1.1, math.inf), (math.inf, math.inf), (1.0, 1.0)):
        assert EnsembleEquivalent(value, low, high, 10).is_resolved


def test_an_equivalent_from_too_few_data_is_refused_and_keeps_its_interval():
    losses, method = noisy_curve(np.random.default_rng(0), replicates=2)
    equivalent = EnsembleCurve(losses).equivalent(method + 1.4)
    assert equivalent.refusal == "There are 2 replicates: a claim needs at least 3."
    assert 2 < equivalent.low < equivalent.value
    assert not equivalent.is_resolved
    assert str(equivalent) == "not resolved"
    losses, method = noisy_curve(np.random.default_rng(0), examples=9)
    assert "There are 9 test examples" in EnsembleCurve(losses).equivalent(method).refusal


def test_an_equivalent_is_refused_if_one_example_carries_the_difference_at_its_size():
    losses = exact_curve(MEANS, noise=0)
    method = constant_losses(0.55)
    assert EnsembleCurve(losses).equivalent(method).refusal is None
    method[:, 3] += 20
    method -= 1.0
    equivalent = EnsembleCurve(losses).equivalent(method)
    assert equivalent.value == pytest.approx(2.5)
    assert "A few test examples or groups carry the difference" in equivalent.refusal


def test_losses_and_sizes_that_make_no_curve_raise():
    losses = exact_curve(MEANS)
    with pytest.raises(ValueError, match=r"must be \[replicate, size, example\]"):
        EnsembleCurve(losses[0])
    with pytest.raises(ValueError, match="at least 2 replicates"):
        EnsembleCurve(losses[:1])
    with pytest.raises(ValueError, match="got the shape"):
        EnsembleCurve(losses[:, :0])
    with pytest.raises(ValueError, match="must be finite"):
        EnsembleCurve(np.where(losses > 0.9, np.nan, losses))
    for sizes in ((1, 2, 3), (1, 3, 2, 4), (2, 3, 4, 5), (1, 2, 2, 3)):
        with pytest.raises(ValueError, match="sizes must increase from 1 and be as many as the 4"):
            EnsembleCurve(losses, sizes)


def test_a_method_with_other_replicates_or_examples_than_the_curve_raises():
    curve = EnsembleCurve(exact_curve(MEANS))
    for shape in ((4, 20), (3, 19)):
        with pytest.raises(ValueError, match="the 3 replicates and 20 examples of the curve"):
            curve.equivalent(np.zeros(shape))
    with pytest.raises(ValueError, match="must be finite"):
        curve.equivalent(constant_losses(math.nan))


# EquivalenceTest


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


def test_a_difference_on_a_single_example_is_refused():
    differences = np.zeros((3, 100))
    differences[:, 5] = 1
    result = equivalence_test(differences, 1.0)
    assert "A few test examples or groups carry the difference, 1.0 effectively" in result.refusal
    differences[:, [6, 7, 8]] = 1
    assert equivalence_test(differences, 1.0).refusal is None
    # No example differs: nothing is carried by a few.
    assert equivalence_test(np.full((3, 100), 0.1), 1.0).verdict == "equivalent"
    # Rounding is no difference between examples.
    constant = np.full((3, 100), 0.1)
    constant[:, 5] += 1e-16
    assert equivalence_test(constant, 1.0).refusal is None


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
