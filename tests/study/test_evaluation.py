"""The evaluation of made-up predictions whose scores are known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from jdrop import metrics
from jdrop.statistics import Interval, bootstrap_weights, crossed_interval
from jdrop.study import report
from jdrop.study.data import Predictions
from jdrop.study.errors import UserError
from jdrop.study.evaluation import bootstrap, of_predictions
from jdrop.study.evaluation.losses import losses_by_size, losses_of_readings
from jdrop.study.evaluation.margins import regression_margins
from jdrop.study.evaluation.points import regression_profile
from jdrop.study.evaluation.ranges import possible
from jdrop.study.evaluation.readings import Reading, State, reading_of

N, C = 150, 3


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(0).integers(0, C, N).astype(np.int32)


def members(labels, count, noise, seed):
    """Networks that know the label, with noise of their own."""
    rng = np.random.default_rng(seed)
    signal = 2 * np.eye(C)[labels] + rng.normal(size=(1, N, C))
    return log_softmax(signal + noise * np.random.default_rng(seed + 1).normal(size=(count, N, C)))


@pytest.fixture(scope="module")
def predictions(labels):
    plain = members(labels, 12, 2.0, 1)
    average = np.log(np.exp(plain.astype(np.float64)).mean(0)).astype(np.float32)
    averages = np.stack([average] * 3)
    return Predictions(
        {"plain": plain, "all": averages, "monte_carlo": members(labels, 6, 3.0, 1)[None]}, labels
    )


@pytest.mark.slow
def test_given_networks_are_dealt_out_and_compared(predictions):
    comparison = of_predictions(predictions, "made up", replicates=3)
    assert comparison.replicates == 3
    assert [point.size for point in comparison.method("plain").points] == [1, 2, 3, 4]
    # The average of all twelve scores better than that of any four.
    point = comparison.method("all").points[0]
    assert point.worth["nll"].value == math.inf
    assert point.worth["nll"].largest == 4
    assert point.against_ensemble["nll"].verdict == "better"
    assert comparison.method("all").retrained
    assert not comparison.has_costs
    assert "cost" not in " ".join(report.answer(comparison))
    assert "On made up, dropout, 6 masks differs from one plain" in " ".join(
        report.answer(comparison)
    )


@pytest.mark.slow
def test_the_intervals_of_a_single_given_network_hold_for_it_alone(predictions):
    comparison = of_predictions(predictions, "made up", replicates=3)
    masks = comparison.method("monte-carlo")
    assert masks.unit == "masks"
    assert [point.size for point in masks.points] == [1, 2, 3, 5, 6]
    assert "monte_carlo is one network: its intervals hold for this" in " ".join(
        comparison.left_out
    )
    assert "for this one network, not for training it anew" in " ".join(report.answer(comparison))
    assert not masks.retrained
    assert masks.points[-1].over_seeds["nll"].low is None
    spread = {result.method: result.disagreement.low for result in comparison.diversity}
    assert spread["monte-carlo"] is None
    assert spread["plain"] is not None


def test_networks_in_no_replicate_are_listed(labels):
    plain, few = members(labels, 13, 2.0, 1), members(labels, 5, 2.0, 7)
    masks = np.stack([members(labels, 2, 3.0, seed) for seed in range(10)])
    log_probs = {"plain": plain, "dropout": few, "monte_carlo": masks}
    comparison = of_predictions(Predictions(log_probs, labels), "x", 9)
    assert comparison.replicates == 5
    notes = " ".join(comparison.left_out)
    assert "There are 5 replicates, not 9: each has at least two plain networks" in notes
    assert "The last 3 of plain are in none" in notes
    assert "The last 5 of monte_carlo are in none" in notes
    assert comparison.mask_curve is not None
    assert all(method.retrained for method in comparison.methods)


def test_masks_of_a_single_network_are_not_compared_with_weight_scaling_of_others(labels):
    log_probs = {
        "plain": members(labels, 13, 2.0, 1),
        "dropout": members(labels, 5, 2.0, 7),
        "monte_carlo": members(labels, 2, 3.0, 0)[None],
    }
    comparison = of_predictions(Predictions(log_probs, labels), "x", 5)
    assert comparison.mask_curve is None
    assert "How many masks score as well as weight scaling is not computed" in " ".join(
        comparison.left_out
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["my_net", "my-net"], "names of methods must differ in more than '_' and '-'"),
        (["monte-carlo"], "masks must be named 'monte_carlo', got 'monte-carlo'"),
    ],
)
def test_ambiguous_names_are_refused(predictions, names, message):
    given = {name: predictions.log_probs["all"] for name in names}
    log_probs = {"plain": predictions.log_probs["plain"], **given}
    with pytest.raises(UserError, match=message):
        of_predictions(Predictions(log_probs, predictions.labels), "x", 3)


@pytest.mark.slow
def test_calibrated_scores_that_say_nothing_are_marked(predictions, labels):
    """Of a method that is always right; of too few examples; and of all if of the plain ones."""
    right = log_softmax(30 * np.eye(C)[labels])
    plain = predictions.log_probs["plain"]
    log_probs = {"plain": plain, "right": np.stack([right] * 3), "same": plain}
    comparison = of_predictions(Predictions(log_probs, labels), "x", 3)
    assert comparison.method("right").points[0].unreliable == ["calibrated_nll"]
    for name in ("plain", "same"):
        assert comparison.method(name).points[0].unreliable == []
    few = {name: log_probs[:, :6] for name, log_probs in log_probs.items() if name != "right"}
    comparison = of_predictions(Predictions(few, labels[:6]), "x", 3)
    for name in ("plain", "same"):
        point = comparison.method(name).points[0]
        harm = point.scores["calibrated_nll"].mean - point.scores["nll"].mean
        assert harm > 0.01
        assert point.unreliable == ["calibrated_nll"]


def test_shared_members_are_scored_as_if_alone(predictions, labels):
    """Two readings that share a state have the losses that each has by itself."""
    first = State(predictions.log_probs["plain"][None])
    second = State(predictions.log_probs["all"][None])
    readings = [Reading("a", {1: first, 2: second, 3: first}), Reading("b", {1: first, 3: second})]
    for reading, losses in zip(readings, losses_of_readings(readings, labels), strict=True):
        for index, (size, state) in enumerate(reading.states.items()):
            alone = losses_by_size(Reading("alone", {size: state}), labels)
            for score, values in losses.items():
                np.testing.assert_array_equal(values[:, index], alone[score][:, 0])


def test_more_than_20_networks_are_averaged_in_groups_on_a_circle(labels):
    """At each size the losses are means over groups, each computed here with NumPy."""
    outputs = members(labels, 43, 2.0, 1)
    reading = reading_of("plain", outputs[None], table=(25,))
    assert reading.sizes == (*range(1, 21), 25, 30, 43)
    losses = losses_by_size(reading, labels)
    probs = np.exp(outputs.astype(np.float64))
    for size, num_groups in ((1, 43), (2, 21), (19, 20), (25, 20), (43, 20)):
        starts = [index * 43 // num_groups for index in range(num_groups)]
        groups = [np.arange(start, start + size) % 43 for start in starts]
        expected = np.mean(
            [-np.log(probs[group].mean(0)[np.arange(N), labels]) for group in groups], axis=0
        )
        # Up to 43 probabilities, and as many losses, are added, each rounded at 6e-8.
        np.testing.assert_allclose(
            losses["nll"][0, reading.sizes.index(size)], expected, rtol=1e-5, atol=1e-5
        )
        counts = np.bincount(np.concatenate(groups), minlength=43)
        assert counts.max() - counts.min() <= 1


def test_the_worth_of_many_networks_is_read_at_their_sizes(labels):
    """A method that is the average of 30 networks is worth 30 of 40."""
    plain = members(labels, 120, 2.0, 1)
    dealt = np.exp(plain.astype(np.float64)).reshape(40, 3, N, C)
    average = np.log(dealt[:30].mean(0)).astype(np.float32)
    comparison = of_predictions(Predictions({"plain": plain, "same": average}, labels), "x", 3)
    worth = comparison.method("same").points[0].worth["nll"]
    assert worth.low <= 30 <= worth.high
    assert worth.largest == 40
    assert [point.size for point in comparison.method("plain").points][-3:] == [20, 30, 40]
    assert [influence.against for influence in comparison.influence] == [1, 40]


def test_differences_are_of_the_same_replicates_and_examples(predictions):
    comparison = of_predictions(predictions, "x", 3)
    log_probs = predictions.log_probs
    labels = predictions.labels
    dealt = np.exp(log_probs["plain"].astype(np.float64)).reshape(4, 3, N, C)
    correct = np.arange(N), labels
    single = -np.log(dealt[..., *correct]).mean(0)
    ensemble = -np.log(dealt.mean(0)[..., *correct])
    method = -log_probs["all"].astype(np.float64)[..., *correct]
    point = comparison.method("all").points[0]
    for found, expected in (
        (point.minus_single, method - single),
        (point.minus_ensemble, method - ensemble),
    ):
        interval = crossed_interval(expected)
        assert dataclasses.astuple(found["nll"]) == pytest.approx(
            dataclasses.astuple(interval), abs=1e-6
        )
    masks = comparison.method("monte-carlo").points[-1]
    assert comparison.headline == (comparison.method("monte-carlo"), masks)
    assert masks.minus_headline["nll"].mean == 0


def test_intervals_of_proportions_stay_within_them(labels):
    nearly_right = members(labels, 12, 0.5, 1)
    wrong = np.roll(nearly_right, 1, axis=-1)
    log_probs = {"plain": nearly_right, "wrong": wrong}
    comparison = of_predictions(Predictions(log_probs, labels), "x", 3)
    for method in comparison.methods:
        for point in method.points:
            for score, largest in (("error", 1), ("brier", 2), ("nll", math.inf)):
                assert 0 <= point.scores[score].low <= point.scores[score].high <= largest


def test_the_calibrated_score_of_targets_may_be_negative():
    interval = Interval(-3.2, -3.4, -3.0, 5)
    assert possible("calibrated_nll", interval) == interval
    assert possible("mse", Interval(0.1, -0.2, 0.4, 5)).low == 0
    assert possible("auroc_entropy", Interval(0.99, 0.97, 1.02, 5)).high == 1
    assert possible("error", Interval(0.1, None, None, 1)).low is None


@pytest.mark.slow
def test_examples_of_a_group_count_once(predictions, labels):
    """An example that is repeated, in a group of its own copies, changes no interval."""
    alone = of_predictions(predictions, "x", 3)
    copies = {name: np.repeat(values, 3, -2) for name, values in predictions.log_probs.items()}
    groups = np.repeat(np.arange(N), 3).astype(np.int32)
    repeated = of_predictions(Predictions(copies, np.repeat(labels, 3), groups), "x", 3)
    naive = of_predictions(Predictions(copies, np.repeat(labels, 3)), "x", 3)
    for name in ("plain", "all", "monte-carlo"):
        point, other, narrow = (
            comparison.method(name).points[0] for comparison in (alone, repeated, naive)
        )
        for score in ("nll", "error"):
            interval, again = point.scores[score], other.scores[score]
            assert (again.low, again.high) == pytest.approx((interval.low, interval.high), rel=1e-5)
            assert narrow.scores[score].high < interval.high
            test, same = point.against_ensemble[score], other.against_ensemble[score]
            assert same.verdict == test.verdict
            assert same.difference.high == pytest.approx(test.difference.high, rel=1e-4, abs=1e-7)
            worth, same = point.worth[score], other.worth[score]
            assert (same.low, same.high) == pytest.approx((worth.low, worth.high), rel=1e-3)


def test_a_method_that_is_the_ensemble_is_worth_the_ensemble(labels):
    """Each replicate's method is the average of its own plain networks."""
    plain = members(labels, 12, 2.0, 1)
    dealt = np.exp(plain.astype(np.float64)).reshape(4, 3, N, C)
    average = np.log(dealt.mean(0)).astype(np.float32)
    comparison = of_predictions(Predictions({"plain": plain, "same": average}, labels), "x", 3)
    point = comparison.method("same").points[0]
    assert point.worth["nll"].value == pytest.approx(4, abs=1e-3)
    assert point.against_ensemble["brier"].verdict == "equivalent"
    assert comparison.method("plain").points[0].worth["nll"].value == 1


def test_unknown_margins_are_refused(predictions):
    with pytest.raises(UserError, match=r"margins .* must be of nll, .* got one of crps"):
        of_predictions(predictions, "x", 3, {"crps": 0.1})


def test_calibration_is_of_the_average_and_not_of_its_members(predictions, labels):
    plain = predictions.log_probs["plain"]
    reading = Reading("plain", dict.fromkeys((1, 12), State(plain[None])))
    losses = losses_by_size(reading, labels)
    average = np.log(np.exp(plain.astype(np.float64)).mean(0))
    key = jax.random.key(0)
    expected = metrics.calibrated_losses(
        key, jnp.asarray(average, jnp.float32), jnp.asarray(labels)
    )
    np.testing.assert_allclose(losses["calibrated_nll"][0, 1], expected, rtol=1e-3, atol=1e-4)
    assert losses["calibrated_nll"].shape == (1, 2, N)


def test_regression_is_scored_by_mixtures():
    """One member's calibrated loss is that of a normal distribution fitted on the other half."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80).astype(np.float32)
    outputs = (targets + 0.5 * rng.normal(size=(1, 4, 80))).astype(np.float32)
    reading = Reading("plain", dict.fromkeys((1, 4), State(outputs)))
    losses = losses_by_size(reading, targets)
    assert losses["mse"][0, 1] == pytest.approx((outputs[0].mean(0) - targets) ** 2, rel=1e-4)
    singles = ((outputs[0] - targets) ** 2).mean(0)
    assert losses["mse"][0, 0] == pytest.approx(singles, rel=1e-4)
    residuals = outputs[0] - targets
    likely = [-stats.norm.logpdf(row, 0, np.sqrt((row**2).mean())).mean() for row in residuals]
    # The scale is of another half of 40, so it differs by chance: by some 11 % each.
    assert losses["calibrated_nll"][0, 0].mean() == pytest.approx(np.mean(likely), abs=0.1)
    assert losses["crps"][0, 1].mean() < losses["crps"][0, 0].mean()


def test_the_margin_of_the_mse_is_one_of_its_root():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80)
    outputs = targets + 30 + rng.normal(size=(2, 4, 80))
    plain = Reading("plain", dict.fromkeys((1, 4), State(outputs)))
    margins = regression_margins(plain, targets, scale=5.0)
    mse = ((outputs.mean(1) - targets) ** 2).mean()
    assert np.sqrt(mse + margins["mse"]) - np.sqrt(mse) == pytest.approx(0.05, rel=0.01)
    assert (margins["crps"], margins["calibrated_nll"]) == (0.05, 0.01)


def test_rmse_and_coverage_of_regression():
    """The RMSE is the root of the MSE and its ends; coverage is of intervals fitted elsewhere."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80)
    outputs = targets + 0.5 * rng.standard_t(3, size=(3, 1, 80))
    residuals = (outputs - targets)[:, 0]
    mse = crossed_interval(residuals**2)
    float32_arrays = outputs.astype(np.float32), targets.astype(np.float32)
    profile = regression_profile(mse, *float32_arrays, None)
    assert dataclasses.astuple(profile["rmse"])[:3] == pytest.approx(
        np.sqrt([mse.mean, mse.low, mse.high])
    )
    covered = np.zeros((3, 5, 80))
    for split, key in enumerate(jax.random.split(jax.random.key(0), 5)):
        first, second = np.split(np.asarray(jax.random.permutation(key, 80)), 2)
        for fitted, scored in ((first, second), (second, first)):
            scale = np.sqrt((residuals[:, fitted] ** 2).mean(1, keepdims=True))
            covered[:, split, scored] = abs(residuals[:, scored]) <= 1.959964 * scale
    expected = crossed_interval(covered.mean(1))
    assert dataclasses.astuple(profile["coverage"]) == pytest.approx(
        dataclasses.astuple(expected), rel=1e-5
    )
    wide = regression_profile(Interval(0.1, -0.2, 0.4, 3), *float32_arrays, None)["rmse"]
    assert wide.low == 0


def test_bootstrap_draws_equal_scores_of_the_drawn_examples(predictions, labels):
    """The draws equal the scores of a data set that repeats each example as often as drawn."""
    plain = predictions.log_probs["plain"][None, :3]
    ood = log_softmax(np.random.default_rng(5).normal(size=(1, 3, 70, C)))
    weights = bootstrap_weights(np.random.default_rng(0), N, 20)
    intervals, curves = bootstrap.scores(
        np.repeat(plain, 2, 0), np.repeat(ood, 2, 0), labels, weights
    )
    pooled = np.log(np.exp(plain[0].astype(np.float64)).mean(0))
    confidence, right = np.exp(pooled.max(1)), pooled.argmax(1) == labels
    log_probs = jnp.asarray(pooled, jnp.float32)
    values, _ = bootstrap._average_scores(log_probs, jnp.asarray(labels), jnp.asarray(weights))
    edges = np.linspace(0, 1, 16)
    for draw in range(3):
        again = np.repeat(np.arange(N), weights[draw].astype(int))
        which = np.digitize(confidence[again], edges[1:-1], right=True)
        gaps = [abs((right[again] - confidence[again])[which == b].sum()) / N for b in range(15)]
        assert float(values["ece"][1][draw]) == pytest.approx(sum(gaps), rel=1e-4)
    entropy = -(np.exp(pooled) * pooled).sum(1)
    others = np.log(np.exp(ood[0].astype(np.float64)).mean(0))
    other_entropy = -(np.exp(others) * others).sum(1)
    truth = np.r_[np.zeros(N), np.ones(70)]
    expected = sklearn_metrics.roc_auc_score(truth, np.r_[entropy, other_entropy])
    assert intervals["auroc_entropy"].mean == pytest.approx(expected, abs=1e-4)
    ood_weights = bootstrap_weights(np.random.default_rng(1), 70, 20)
    _, draws = bootstrap._auroc(
        *(jnp.asarray(a, jnp.float32) for a in (entropy, other_entropy, weights, ood_weights))
    )
    sample_weight = np.r_[weights[0], ood_weights[0]]
    expected = sklearn_metrics.roc_auc_score(
        truth, np.r_[entropy, other_entropy], sample_weight=sample_weight
    )
    assert float(draws[0]) == pytest.approx(expected, abs=1e-4)
    assert curves["share"].sum(1) == pytest.approx([1, 1])
