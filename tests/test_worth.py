"""The ensemble equivalent: values, intervals, and what is not resolved."""

import math

import numpy as np
import pytest
from crossed import crossed_effects, interval_from_variance_components

from jdrop.statistics import EnsembleCurve, EnsembleEquivalent, crossed_interval


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("loss_of_one", "is_refused"),
    [
        (1e-7, False),
        (0.3, True),
        (-0.3, True),
        # The upper end is infinite: nothing is claimed that one example stands against.
        (-3.0, False),
    ],
)
def test_an_equivalent_is_refused_if_one_example_stands_against_an_end(loss_of_one, is_refused):
    method = constant_losses(0.55)
    method[:, 3] += loss_of_one
    method -= loss_of_one / 20
    equivalent = EnsembleCurve(exact_curve(MEANS, noise=0)).equivalent(method)
    assert equivalent.value == pytest.approx(2.5, abs=1e-4)
    if is_refused:
        assert "A few test examples or groups carry the difference" in equivalent.refusal
        assert 1 < equivalent.low < equivalent.high < math.inf
    else:
        assert equivalent.refusal is None


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
