"""Simple models beside the networks, against other implementations of the same formulas."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from jdrop.study import baselines
from jdrop.study.baselines import PENALTIES, baselines_part, linear_is_left_out
from jdrop.study.data import NUM_FOLDS, folds, from_arrays
from jdrop.study.parts import BaselinesPart
from jdrop.study.run_folder import RunFolder


def print_nothing(what, done, total):
    pass


def fit(data, seed=0):
    """The baselines by name."""
    part = baselines_part(data, seed, print_nothing)
    return {baseline.name: baseline for baseline in part.baselines}


def classes(num_classes=3, num_train=60, num_features=4):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(num_train + 30, num_features)).astype("float32")
    logits = inputs @ rng.normal(size=(num_features, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    labels[:num_classes] = np.arange(num_classes)
    train, test = slice(num_train), slice(num_train, None)
    return from_arrays("x", inputs[train], labels[train], inputs[test], labels[test])


def targets(num_train=60):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(num_train + 30, 5)).astype("float32") * [1, 2, 3, 4, 5] + 7
    values = inputs @ rng.normal(size=5) + 8 * rng.normal(size=len(inputs))
    train, test = slice(num_train), slice(num_train, None)
    return from_arrays("x", inputs[train], values[train], inputs[test], values[test])


def scaled(inputs, train):
    train = train.astype(np.float64)
    return (inputs - train.mean(0)) / np.sqrt(train.var(0).mean())


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_logistic_regression_minimises_its_formula(num_classes):
    data = classes(num_classes)
    linear = fit(data)["logistic-regression"]
    train, test = (
        scaled(part, data.train_inputs) for part in (data.train_inputs, data.test_inputs)
    )
    labels, size = data.train_labels, train.shape[1]

    def logits(parameters, inputs):
        weights = parameters.reshape(size + 1, -1)
        logits = inputs @ weights[:-1] + weights[-1]
        # Of two classes, the first has the logit 0.
        return np.pad(logits, ((0, 0), (1, 0))) if num_classes == 2 else logits

    def objective(parameters):
        log_probs = log_softmax(logits(parameters, train), 1)
        weights = parameters.reshape(size + 1, -1)[:-1]
        nll = -log_probs[np.arange(len(labels)), labels].sum()
        return nll + linear.penalty / 2 * (weights**2).sum()

    start = np.zeros((size + 1) * (1 if num_classes == 2 else num_classes))
    best = minimize(objective, start, method="BFGS", options={"gtol": 1e-6}).x
    expected = log_softmax(logits(best, test), 1)
    assert linear.outputs.dtype == np.float32
    np.testing.assert_allclose(linear.outputs, expected, atol=2e-3)


def ridge(inputs, values, penalty, test):
    """Predictions by the normal equations, with an intercept that has no penalty."""
    train, test = scaled(inputs, inputs), scaled(test, inputs)
    gram = train.T @ train + penalty * np.eye(train.shape[1])
    return test @ np.linalg.solve(gram, train.T @ (values - values.mean())) + values.mean()


def test_the_ridge_regression_solves_the_normal_equations():
    data = targets()
    linear = fit(data)["ridge-regression"]
    expected = ridge(data.train_inputs, data.train_labels, linear.penalty, data.test_inputs)
    np.testing.assert_allclose(linear.outputs, expected, atol=1e-5)
    assert linear.outputs.shape == (30,)


def test_cross_validation_on_training_examples_chooses_the_penalty():
    data = targets()
    fold = folds(data.train_labels, None, None, NUM_FOLDS, 0)
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for index in range(NUM_FOLDS):
            train, held_out = fold != index, fold == index
            predicted = ridge(
                data.train_inputs[train], data.train_labels[train], penalty,
                data.train_inputs[held_out],
            )  # fmt: skip
            error += ((predicted - data.train_labels[held_out]) ** 2).sum()
        errors.append(error)
    best = int(np.argmin(errors))
    assert 0 < best < len(PENALTIES) - 1  # Else a fault at the ends would pass.
    assert fit(data)["ridge-regression"].penalty == PENALTIES[best]


def test_the_choice_of_the_penalty_is_made_on_part_of_many_examples(monkeypatch):
    seen = []
    fit_ridge = baselines._fit_ridge

    def spy(inputs, *arguments):
        seen.append(len(inputs))
        return fit_ridge(inputs, *arguments)

    monkeypatch.setattr(baselines, "_fit_ridge", spy)
    monkeypatch.setattr(baselines, "MAX_SELECTION_EXAMPLES", 40)
    fit(targets(num_train=200))
    *selection, final = seen
    assert sum(selection) == len(PENALTIES) * (NUM_FOLDS - 1) * 40
    assert final == 200


def test_the_constant_is_the_share_of_each_class_with_one_more_of_each():
    inputs = np.arange(10.0)[:, None]
    labels = np.repeat([0, 1, 2], [1, 2, 7])
    constant = fit(from_arrays("x", inputs, labels, inputs[:4], labels[:4]))["constant"]
    assert np.exp(constant.outputs) == pytest.approx(np.tile([2 / 13, 3 / 13, 8 / 13], (4, 1)))
    assert constant.penalty is None


def test_the_constant_of_a_regression_is_the_mean_of_the_training_targets():
    data = targets()
    constant = fit(data)["constant"]
    in_target_unit = constant.outputs * data.target_scale + data.target_mean
    assert in_target_unit == pytest.approx(np.full(30, data.target_mean))


@pytest.mark.parametrize("make_data", [classes, targets])
def test_the_unit_and_the_shape_of_the_inputs_change_nothing(make_data):
    data = make_data()
    labels = [
        part if data.num_classes else part.astype(np.float64)
        for part in (data.train_labels, data.test_labels)
    ]
    width = data.train_inputs.shape[1]
    changed = [
        (1000 * part + 3).reshape(-1, 1, width) for part in (data.train_inputs, data.test_inputs)
    ]
    other = from_arrays("x", changed[0], labels[0], changed[1], labels[1])
    first, second = (next(iter(fit(one).values())) for one in (data, other))
    assert first.penalty == second.penalty
    np.testing.assert_allclose(first.outputs, second.outputs, atol=2e-3)


def test_a_class_that_a_fold_lacks_has_a_small_probability_there():
    labels = np.array([0] * 10 + [1] * 9 + [2])
    inputs = labels[:, None] + np.random.default_rng(0).normal(size=(20, 2))
    predict, converged = baselines._fit_logistic(inputs[:19], labels[:19], 3, 1.0)
    probs = np.exp(predict(inputs))
    assert converged
    assert probs.sum(1) == pytest.approx(np.ones(20))
    assert probs[:, 2] == pytest.approx(np.full(20, 1 / 22))
    only_zeros, _ = baselines._fit_logistic(inputs[:10], labels[:10], 3, 1.0)
    assert np.exp(only_zeros(inputs[:1])) == pytest.approx(np.array([[11, 1, 1]]) / 13)
    outputs = fit(from_arrays("x", inputs, labels, inputs, labels))["logistic-regression"].outputs
    assert np.isfinite(outputs).all()


def test_separable_classes_have_finite_log_probabilities():
    inputs = 1e4 * np.where(np.arange(40) % 2, 1.0, -1.0)[:, None]
    labels = np.arange(40) % 2
    data = from_arrays("x", inputs, labels, 1e6 * inputs, labels)
    assert np.isfinite(fit(data)["logistic-regression"].outputs).all()


def test_equal_inputs_are_fitted_as_a_constant():
    data = from_arrays("x", np.ones((20, 2)), np.arange(20) % 2, np.ones((4, 2)), [0, 1, 0, 1])
    outputs = fit(data)["logistic-regression"].outputs
    assert np.exp(outputs) == pytest.approx(np.full((4, 2), 0.5), abs=1e-3)


def test_the_test_labels_have_no_effect():
    data = classes()
    other = from_arrays(
        "x", data.train_inputs, data.train_labels, data.test_inputs, data.test_labels[::-1]
    )
    for name, baseline in fit(data).items():
        np.testing.assert_array_equal(baseline.outputs, fit(other)[name].outputs)


def test_a_fit_that_did_not_converge_says_so(monkeypatch):
    assert "converge" not in fit(classes())["logistic-regression"].explanation
    monkeypatch.setattr(baselines, "MAX_STEPS", 1)
    assert "did not converge in 1 steps" in fit(classes())["logistic-regression"].explanation


def test_inputs_that_are_too_many_leave_the_constant_and_a_sentence(monkeypatch):
    data = classes()
    assert linear_is_left_out(data) is None
    monkeypatch.setattr(baselines, "MAX_TRAIN_VALUES", data.train_inputs.size - 1)
    assert list(fit(data)) == ["constant"]
    assert "hold 240 numbers, more than 239" in linear_is_left_out(data)


def test_the_progress_ends_with_the_last_fit():
    calls = []
    baselines_part(classes(), 0, lambda *call: calls.append(call))
    count = NUM_FOLDS + 1
    assert calls == [("fitting a linear model", done, count) for done in range(1, count + 1)]
    assert all(type(total) is int for _, _, total in calls)


@pytest.mark.parametrize("make_data", [classes, targets])
def test_the_part_is_read_back_as_it_was_stored(tmp_path, make_data):
    part = baselines_part(make_data(), 0, print_nothing)
    run = RunFolder(tmp_path, {})
    run.store("baselines", part)
    again = run.require("baselines", BaselinesPart)
    for first, second in zip(part.baselines, again.baselines, strict=True):
        np.testing.assert_array_equal(first.outputs, second.outputs)
        assert (first.name, first.penalty) == (second.name, second.penalty)
