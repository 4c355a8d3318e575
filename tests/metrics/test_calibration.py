import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import sklearn.calibration

from jdrop import metrics


def bins_in_float64(log_probs, labels, num_bins, binning):
    """For each bin that is not empty: the confidences, and whether each is correct."""
    probs = np.exp(np.asarray(log_probs, np.float64))
    confidence, correct = probs.max(1), probs.argmax(1) == np.asarray(labels)
    if binning == "equal mass":
        order = np.argsort(confidence, kind="stable")
        bins = np.array_split(order, num_bins)
    else:
        edges = np.linspace(0, 1, num_bins + 1)
        bins = [
            np.flatnonzero((confidence > low) & (confidence <= high))
            for low, high in itertools.pairwise(edges)
        ]
    return [(confidence[examples], correct[examples]) for examples in bins if len(examples)]


def ece_in_float64(*arguments):
    bins = bins_in_float64(*arguments)
    num_examples = sum(len(correct) for _, correct in bins)
    return sum(
        len(correct) / num_examples * abs(correct.mean() - confidence.mean())
        for confidence, correct in bins
    )


def debiased_ece_in_float64(log_probs, labels, num_bins):
    total = 0.0
    for confidence, correct in bins_in_float64(log_probs, labels, num_bins, "equal mass"):
        square = (correct.mean() - confidence.mean()) ** 2
        if len(correct) > 1:
            square -= correct.mean() * (1 - correct.mean()) / (len(correct) - 1)
        total += len(correct) / len(labels) * square
    return math.sqrt(max(total, 0))


@pytest.mark.parametrize(
    ("num_bins", "binning"), [(1, "equal width"), (15, "equal width"), (15, "equal mass")]
)
def test_ece_equals_its_definition_in_float64(predictions, num_bins, binning):
    log_probs, labels = predictions
    expected = ece_in_float64(log_probs[0], labels, num_bins, binning)
    actual = metrics.ece(log_probs[0], labels, num_bins=num_bins, binning=binning)
    assert float(actual) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_bins", [15, 299, 400])
def test_debiased_ece_equals_its_definition_in_float64(informed, num_bins):
    """With many bins, some hold a single example or none."""
    log_probs, labels = informed
    expected = debiased_ece_in_float64(log_probs[0], labels, num_bins)
    assert expected > 0
    actual = metrics.debiased_ece(log_probs[0], labels, num_bins=num_bins)
    assert float(actual) == pytest.approx(expected, rel=1e-4)


def test_the_debiased_ece_of_calibrated_predictions_is_often_zero(rng):
    """Labels are drawn from the predictions.

    The corrected squares are near a chi-square of 15 degrees less 15, which is negative with
    probability 0.55. Fewer than 40 or more than 180 of 200 sets occur with probability 1e-20.
    """
    log_probs = scipy.special.log_softmax(2 * rng.normal(size=(300, 3)), -1)
    labels = (log_probs + rng.gumbel(size=(200, 300, 3))).argmax(-1)
    errors = jax.vmap(metrics.debiased_ece, (None, 0))(jnp.asarray(log_probs), jnp.asarray(labels))
    assert 40 <= int((errors == 0).sum()) <= 180


def test_bins_of_equal_mass_equal_array_split(rng):
    confidence = jnp.asarray(rng.uniform(size=17))
    for num_bins in (1, 5, 6, 16, 17, 20):
        bins = np.asarray(metrics.confidence_bins(confidence, num_bins, "equal mass"))
        expected = np.array_split(np.argsort(confidence), num_bins)
        for index, examples in enumerate(expected):
            np.testing.assert_array_equal(np.sort(examples), np.flatnonzero(bins == index))


def test_the_reliability_curve_equals_scikit_learn(predictions):
    log_probs, labels = predictions
    confidence, accuracy, share = metrics.reliability_curve(log_probs[0], labels)
    probs = np.exp(np.asarray(log_probs[0]))
    expected_accuracy, expected_confidence = sklearn.calibration.calibration_curve(
        probs.argmax(1) == labels, probs.max(1), n_bins=15
    )
    nonempty = np.asarray(share) > 0
    # The largest of 5 probabilities is at least 0.2, so some bins are empty.
    assert nonempty.sum() == len(expected_accuracy) < 15
    np.testing.assert_allclose(accuracy[nonempty], expected_accuracy, rtol=1e-5)
    np.testing.assert_allclose(confidence[nonempty], expected_confidence, rtol=1e-5)
    assert np.isnan(accuracy[~nonempty]).all()
    assert np.isnan(confidence[~nonempty]).all()


@pytest.mark.parametrize("binning", ["equal width", "equal mass"])
def test_the_ece_is_the_mean_gap_of_the_reliability_curve(predictions, binning):
    log_probs, labels = predictions
    curve = metrics.reliability_curve(log_probs[0], labels, binning=binning)
    confidence, accuracy, share = (np.asarray(values) for values in curve)
    assert share.sum() == pytest.approx(1, rel=1e-5)
    expected = np.nansum(share * np.abs(accuracy - confidence))
    actual = metrics.ece(log_probs[0], labels, binning=binning)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_the_last_bin_holds_a_confidence_of_exactly_one():
    log_probs = jnp.array([[0.0, -math.inf], [0.0, -math.inf]])
    assert float(metrics.ece(log_probs, jnp.array([0, 1]))) == 0.5
    assert float(metrics.ece(log_probs, jnp.array([1, 1]))) == 1.0
    assert float(metrics.ece(log_probs, jnp.array([0, 1]), binning="equal mass")) == 0.5
    assert float(metrics.debiased_ece(log_probs, jnp.array([1, 1]), num_bins=1)) == 1.0
    confidence, accuracy, share = metrics.reliability_curve(log_probs, jnp.array([0, 1]))
    assert (confidence[-1], accuracy[-1], share[-1]) == (1, 0.5, 1)


def test_bins_are_closed_on_the_right():
    edges = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert metrics.confidence_bins(edges, 4, "equal width").tolist() == [0, 0, 1, 2, 3]
    log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    # Bins (.25, .5] and (.5, .75]: |0 - .5| / 2 + |1 - .75| / 2.
    assert float(metrics.ece(log_probs, jnp.array([1, 0]), num_bins=4)) == pytest.approx(0.375)


@pytest.mark.parametrize("score", [metrics.ece, metrics.debiased_ece, metrics.reliability_curve])
def test_fewer_than_one_bin_raises(predictions, score):
    log_probs, labels = predictions
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        score(log_probs[0], labels, num_bins=0)


def test_an_unknown_binning_raises():
    with pytest.raises(ValueError, match="binning must be 'equal width' or 'equal mass', got 'a'"):
        metrics.confidence_bins(jnp.ones(3), 2, "a")


def losses_in_float64(log_probs, labels, temperature):
    tempered = np.asarray(log_probs, np.float64) / temperature
    label_values = tempered[np.arange(len(labels)), np.asarray(labels)]
    return scipy.special.logsumexp(tempered, 1) - label_values


def best_temperature(log_probs, labels):
    log_probs, labels = np.asarray(log_probs, np.float64), np.asarray(labels)
    minimum = scipy.optimize.minimize_scalar(
        lambda log_temperature: losses_in_float64(
            log_probs, labels, math.exp(log_temperature)
        ).mean(),
        bounds=(-math.log(20), math.log(20)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(minimum.x)


def test_the_temperature_equals_scipy(predictions, rng):
    """For logits from 10 times too small to 9 times too large, and for sets of 10 examples."""
    logits = np.asarray(predictions[0][:6])
    labels = jnp.asarray((logits / 1.5 + rng.gumbel(size=logits.shape)).argmax(-1))
    factors = np.array([0.1, 0.3, 0.9, 1.1, 3.0, 9.0])
    several = jnp.asarray(scipy.special.log_softmax(factors[:, None, None] * logits, -1))
    actual = jax.vmap(metrics.fit_temperature)(several, labels)
    expected = [best_temperature(*one_set) for one_set in zip(several, labels, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    few = several[:, :60].reshape(36, 10, 5), labels[:, :60].reshape(36, 10)
    actual = np.asarray(jax.vmap(metrics.fit_temperature)(*few))
    assert ((actual >= 1 / 20) & (actual <= 20)).all()
    for temperature, *one_set in zip(actual, *map(np.asarray, few), strict=True):
        expected = best_temperature(*one_set)
        # If all examples are classified correctly, many temperatures may have the least NLL.
        least = losses_in_float64(*one_set, expected).mean()
        is_least = losses_in_float64(*one_set, temperature).mean() <= least + 1e-6
        assert is_least or temperature == pytest.approx(expected, rel=2e-4)


def test_the_temperature_does_not_depend_on_the_start(informed):
    """From far away, where Newton's steps fail, and from the solution, where they vanish."""
    log_probs, labels = informed[0][0], informed[1]
    solution = best_temperature(log_probs, labels)
    starts = jnp.array([1 / 20, 0.1, 0.5, solution, 5.0, 20.0])
    starts = jnp.concatenate([starts, jnp.float32(solution) * (1 + jnp.linspace(-3e-4, 3e-4, 40))])
    temperatures = jax.vmap(lambda start: metrics.calibration._fit(log_probs, labels, start))(
        starts
    )
    np.testing.assert_allclose(temperatures, solution, rtol=1e-4)


@pytest.mark.parametrize("truth", [0.25, 1.0, 4.0])
def test_the_temperature_is_the_factor_by_which_logits_are_too_large(truth, rng):
    logits = 2 * rng.normal(size=(20_000, 4))
    labels = jnp.asarray((logits + rng.gumbel(size=logits.shape)).argmax(-1))
    log_probs = jnp.asarray(scipy.special.log_softmax(logits * truth, -1))
    temperature = metrics.fit_temperature(log_probs, labels)
    assert float(temperature) == pytest.approx(truth, rel=0.05)


def test_the_temperature_is_bounded_finite_or_nan_in_the_extremes():
    log_probs = jnp.log(jnp.array([[0.6, 0.4], [0.4, 0.6]]))
    for labels, end in [([0, 1], 1 / 20), ([1, 0], 20)]:
        temperature = metrics.fit_temperature(log_probs, jnp.array(labels))
        assert float(temperature) == pytest.approx(end, rel=1e-3)
    impossible = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    assert jnp.isfinite(metrics.fit_temperature(impossible, jnp.array([0, 1])))
    assert jnp.isfinite(metrics.fit_temperature(impossible, jnp.array([1, 0])))
    assert jnp.isnan(metrics.fit_temperature(log_probs, jnp.array([0, 2])))
    assert jnp.isnan(metrics.fit_temperature(log_probs.at[0].set(jnp.nan), jnp.array([0, 1])))


@pytest.mark.slow
def test_calibration_fits_on_one_half_and_scores_the_other(informed, getkey):
    """The number of examples is odd."""
    num_examples = 299
    log_probs, labels = informed[0][0, :num_examples], informed[1][:num_examples]
    key = getkey()
    (split_key,) = jax.random.split(jax.random.clone(key), 1)
    order = np.asarray(jax.random.permutation(split_key, num_examples))
    halves = order[: num_examples // 2], order[num_examples // 2 :]
    expected, arrays = np.empty(num_examples), (np.asarray(log_probs), np.asarray(labels))
    for fitted, scored in (halves, halves[::-1]):
        temperature = best_temperature(*(array[fitted] for array in arrays))
        expected[scored] = losses_in_float64(*(array[scored] for array in arrays), temperature)
    actual = metrics.calibrated_losses(key, log_probs, labels, num_repeats=1)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
    mean = metrics.calibrated_nll(jax.random.clone(key), log_probs, labels, num_repeats=1)
    assert float(mean) == pytest.approx(float(actual.mean()), rel=1e-6)
    # Calibration undoes a factor of 3 of the logits.
    thrice = jax.nn.log_softmax(3 * log_probs)
    again = metrics.calibrated_losses(jax.random.clone(key), thrice, labels, num_repeats=1)
    np.testing.assert_allclose(again, actual, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_temperature_for_an_example_does_not_depend_on_its_label(informed, getkey):
    """So the losses of all possible labels of an example are a prediction, with sum 1."""
    log_probs, labels = informed[0][0, :21], informed[1][:21]
    key = getkey()

    def probability(example, label):
        changed = labels.at[example].set(label)
        losses = metrics.calibrated_losses(jax.random.clone(key), log_probs, changed, num_repeats=1)
        return jnp.exp(-losses[example])

    examples, classes = jnp.repeat(jnp.arange(21), 5), jnp.tile(jnp.arange(5), 21)
    probabilities = jax.vmap(probability)(examples, classes).reshape(21, 5)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-4)


def test_every_split_fits_on_each_half_and_scores_the_other(getkey):
    values, key = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), getkey()
    expected = np.zeros(5)
    for split_key in jax.random.split(jax.random.clone(key), 3):
        order = np.asarray(jax.random.permutation(split_key, 5))
        expected[order[:2]] += np.sum(np.asarray(values)[order[2:]]) / 3
        expected[order[2:]] += np.sum(np.asarray(values)[order[:2]]) / 3
    actual = metrics.calibration.mean_over_splits(
        key, lambda fitted, scored: jnp.full(len(scored), values[fitted].sum()), 5, 3
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(("examples", "repeats"), [(1, 5), (4, 0)])
def test_calibrating_too_few_examples_or_repeats_raises(examples, repeats, getkey):
    log_probs, labels = jnp.log(jnp.full((examples, 2), 0.5)), jnp.zeros(examples, int)
    with pytest.raises(ValueError, match="must"):
        metrics.calibrated_nll(getkey(), log_probs, labels, num_repeats=repeats)
