"""What predictions say: made-up ones, of which the answer is known."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from jdrop.statistics import Interval, bootstrap_weights, crossed_interval
from jdrop.study import bootstrap, evaluation, figures, report
from jdrop.study.evaluation import Reading, losses_by_size, of_predictions
from jdrop.study.results import COSTS
from jdrop.study.tables import Predictions

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
    fresh = np.stack([average] * 3)
    return Predictions(
        {"plain": plain, "all": fresh, "monte_carlo": members(labels, 6, 3.0, 1)[None]}, labels
    )


def test_given_predictions_are_dealt_out_and_compared(predictions):
    found = of_predictions(predictions, "made up", replicates=3)
    assert found.replicates == 3
    assert [point.size for point in found.method("plain").points] == [1, 2, 3, 4]
    # The average of all twelve does better than that of any four.
    worth = found.method("all").points[0].worth["nll"]
    assert worth.value == math.inf
    assert worth.largest == 4
    assert found.method("all").points[0].against_ensemble["nll"].verdict == "better"
    masks = found.method("monte-carlo")
    assert masks.unit == "masks"
    assert [point.size for point in masks.points] == [1, 2, 3, 5, 6]
    assert "monte_carlo is one network: its intervals hold for that" in " ".join(found.left_out)
    assert "for this one network, not for training it anew" in report.sentence(found)
    assert not masks.retrained
    assert masks.points[-1].over_seeds["nll"].low is None
    spread = {one.method: one.disagreement.low for one in found.diversity}
    assert spread["monte-carlo"] is None
    assert spread["plain"] is not None
    assert "A row without ± is of one given network" in report.table_note(found)
    assert found.method("all").retrained
    assert not report.costs_known(found)
    assert "cost" not in report.sentence(found)
    assert "On made up dropout, 6 masks is worth" in report.sentence(found)


def test_what_is_in_no_replicate_is_said(labels):
    plain, few = members(labels, 13, 2.0, 1), members(labels, 5, 2.0, 7)
    masks = np.stack([members(labels, 2, 3.0, seed) for seed in range(10)])
    log_probs = {"plain": plain, "dropout": few, "monte_carlo": masks}
    found = of_predictions(Predictions(log_probs, labels), "x", 9)
    assert found.replicates == 5
    said = " ".join(found.left_out)
    assert "There are 5 replicates, not 9: each has two plain networks at least" in said
    assert "The last 3 of plain are in none" in said
    assert "The last 5 of monte_carlo are in none" in said
    assert found.mask_curve is not None
    assert all(method.retrained for method in found.methods)
    one = {**log_probs, "monte_carlo": masks[:1]}
    found = of_predictions(Predictions(one, labels), "x", 5)
    assert found.mask_curve is None
    assert "How many masks reach weight scaling is not said" in " ".join(found.left_out)


def test_costs_that_are_not_known_are_blank(predictions):
    found = of_predictions(predictions, "x", 3)
    assert all(point.cost is None for method in found.methods for point in method.points)
    read = json.loads(found.to_json())
    assert read["methods"][0]["points"][0]["cost"] is None
    assert type(found).from_json(found.to_json()).to_json() == found.to_json()
    for row in csv.DictReader(report.scores_csv(found).splitlines()):
        assert {row[name] for name in COSTS} == {""}
    assert figures.score_against_cost(found) is None
    assert figures.score_against_other_costs(found) is None
    for template in ("report.md.jinja", "report.html.jinja"):
        text = report._render(template, found, [])
        assert "FLOPs" not in text
        assert "each stands alone" in text
    assert "training FLOPs" not in report.score_table(found)[0]
    assert report.terminal(found).columns[-1].header.strip() == "enough?"


def test_a_temperature_at_a_bound_is_said(predictions, labels):
    right = log_softmax(30 * np.eye(C)[labels])
    log_probs = {"plain": predictions.log_probs["plain"], "right": np.stack([right] * 3)}
    said = of_predictions(Predictions(log_probs, labels), "x", 3).left_out[-1]
    assert said.startswith("The calibrated scores of right, one are unreliable: ")
    said = of_predictions(predictions, "x", 3).left_out
    assert "unreliable" not in " ".join(said)


def test_a_method_that_is_the_ensemble_is_worth_the_ensemble(labels):
    """Each replicate's method is the average of its own plain networks."""
    plain = members(labels, 8, 2.0, 1)
    dealt = np.exp(plain.astype(np.float64)).reshape(4, 2, N, C)
    average = np.log(dealt.mean(0)).astype(np.float32)
    found = of_predictions(Predictions({"plain": plain, "same": average}, labels), "x", 2)
    point = found.method("same").points[0]
    assert point.worth["nll"].value == pytest.approx(4, abs=1e-3)
    assert point.against_ensemble["brier"].verdict == "equivalent"
    assert found.method("plain").points[0].worth["nll"].value == 1


def test_unknown_margins_are_refused(predictions):
    with pytest.raises(ValueError, match=r"margins must be of nll, .* got one of crps"):
        of_predictions(predictions, "x", 3, {"crps": 0.1})


def test_calibration_is_of_the_average_and_not_of_its_members(predictions, labels):
    plain = predictions.log_probs["plain"]
    reading = Reading("plain", plain[None], None, "networks", None, (), (1, 12))
    found = losses_by_size(reading, labels)
    average = np.log(np.exp(plain.astype(np.float64)).mean(0))
    key = jax.random.key(0)
    expected = evaluation.metrics.calibrated_losses(
        key, jnp.asarray(average, jnp.float32), jnp.asarray(labels)
    )
    np.testing.assert_allclose(found["calibrated_nll"][0, 1], expected, rtol=1e-3, atol=1e-4)
    assert found["calibrated_nll"].shape == (1, 2, N)


def test_regression_is_scored_by_mixtures():
    """One member's calibrated loss is that of a normal distribution fitted on the other half."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80).astype(np.float32)
    outputs = (targets + 0.5 * rng.normal(size=(1, 4, 80))).astype(np.float32)
    reading = Reading("plain", outputs, None, "networks", None, (), (1, 4))
    found = losses_by_size(reading, targets)
    assert found["mse"][0, 1] == pytest.approx((outputs[0].mean(0) - targets) ** 2, rel=1e-4)
    singles = ((outputs[0] - targets) ** 2).mean(0)
    assert found["mse"][0, 0] == pytest.approx(singles, rel=1e-4)
    residuals = outputs[0] - targets
    likely = [-stats.norm.logpdf(row, 0, np.sqrt((row**2).mean())).mean() for row in residuals]
    # The scale is of another half of 40, so it differs by chance: by some 11 % each.
    assert found["calibrated_nll"][0, 0].mean() == pytest.approx(np.mean(likely), abs=0.1)
    assert found["crps"][0, 1].mean() < found["crps"][0, 0].mean()


def test_the_margin_of_the_mse_is_one_of_its_root():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80)
    outputs = targets + 30 + rng.normal(size=(2, 4, 80))
    plain = Reading("plain", outputs, None, "networks", None, (), (1, 4))
    found = evaluation._regression_margins(plain, targets, scale=5.0)
    mse = ((outputs.mean(1) - targets) ** 2).mean()
    assert np.sqrt(mse + found["mse"]) - np.sqrt(mse) == pytest.approx(0.05, rel=0.01)
    assert (found["crps"], found["calibrated_nll"]) == (0.05, 0.01)


def test_rmse_and_coverage_of_regression():
    """The interval of the MSE, its root taken; and a 95 % interval of what is not in the fit."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80)
    outputs = targets + 0.5 * rng.standard_t(3, size=(3, 1, 80))
    residuals = (outputs - targets)[:, 0]
    mse = crossed_interval(residuals**2)
    given = outputs.astype(np.float32), targets.astype(np.float32)
    found = evaluation._regression_profile(mse, *given)
    assert dataclasses.astuple(found["rmse"])[:3] == pytest.approx(
        np.sqrt([mse.mean, mse.low, mse.high])
    )
    inside = np.zeros((3, 5, 80))
    for halving, key in enumerate(jax.random.split(jax.random.key(0), 5)):
        first, second = np.split(np.asarray(jax.random.permutation(key, 80)), 2)
        for fitted, scored in ((first, second), (second, first)):
            scale = np.sqrt((residuals[:, fitted] ** 2).mean(1, keepdims=True))
            inside[:, halving, scored] = abs(residuals[:, scored]) <= 1.959964 * scale
    expected = crossed_interval(inside.mean(1))
    assert dataclasses.astuple(found["coverage"]) == pytest.approx(
        dataclasses.astuple(expected), rel=1e-5
    )
    wide = evaluation._regression_profile(Interval(0.1, -0.2, 0.4, 3), *given)["rmse"]
    assert wide.low == 0


def test_draws_of_scores_are_the_scores_of_what_was_drawn(predictions, labels):
    """Against the examples repeated as often as they were drawn."""
    plain = predictions.log_probs["plain"][None, :3]
    ood = log_softmax(np.random.default_rng(5).normal(size=(1, 3, 70, C)))
    weights = bootstrap_weights(np.random.default_rng(0), N, 20)
    intervals, curves = bootstrap.scores(
        np.repeat(plain, 2, 0), np.repeat(ood, 2, 0), labels, weights
    )
    pooled = np.log(np.exp(plain[0].astype(np.float64)).mean(0))
    confidence, right = np.exp(pooled.max(1)), pooled.argmax(1) == labels
    log_probs = jnp.asarray(pooled, jnp.float32)
    found, _ = bootstrap._of_average(log_probs, jnp.asarray(labels), jnp.asarray(weights))
    edges = np.linspace(0, 1, 16)
    for draw in range(3):
        again = np.repeat(np.arange(N), weights[draw].astype(int))
        which = np.digitize(confidence[again], edges[1:-1], right=True)
        gaps = [abs((right[again] - confidence[again])[which == b].sum()) / N for b in range(15)]
        assert float(found["ece"][1][draw]) == pytest.approx(sum(gaps), rel=1e-4)
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
