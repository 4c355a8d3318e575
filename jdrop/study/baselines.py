"""Simple models that stand beside the networks: a linear model and a constant.

Where one of them predicts as well as the networks, what a network is worth says little.
"""

import math
import time
import warnings
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from jdrop.study.data import (
    NUM_FOLDS,
    Dataset,
    Progress,
    chunks,
    folds,
    generator,
    labels_of_tokens,
    shapes_of,
    strata,
    stratified,
    take,
)
from jdrop.study.parts import BaselineOutputs, BaselinesPart

PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
"""Factors of half the squared weights, beside the sum of the losses of all examples."""

MAX_SELECTION_EXAMPLES = 2000
"""The penalty is chosen on at most so many training examples, to save time."""

MAX_TRAIN_VALUES = 2 * 10**8
"""Training inputs of more numbers are left to the networks: a copy in float64 takes 1.6 GB."""

MAX_STEPS = 500  # Of L-BFGS.

TOLERANCE = 1e-5  # The largest derivative of the mean loss where L-BFGS stops.

Predictions = Callable[[np.ndarray], np.ndarray]


def baselines_part(data: Dataset, seed: int, progress: Progress) -> BaselinesPart:
    """Fits the baselines and predicts for the test inputs.

    The linear model is a logistic regression, in regression a ridge regression, by scikit-learn:
    `sum(losses) + penalty / 2 * sum(weights**2)`, with intercepts that have no penalty. The loss is
    the NLL, in regression half the squared error. Inputs are flattened, centred, and divided by one
    number: the root of the features' mean variance. Cross-validation on training examples chooses
    the penalty of `PENALTIES`, with the smallest mean NLL or squared error. Then the model is
    fitted to all training examples.

    The constant is the mean target, or the share of each class of `C` among `n` training examples
    with one more of each: `(count + 1) / (n + C)`.

    Args:
        data: the examples. Out-of-distribution inputs are not predicted.
        seed: chooses the folds, and the examples that choose the penalty where there are more than
            `MAX_SELECTION_EXAMPLES`.
        progress: is called as the models are fitted.
    """
    baselines = []
    if linear_is_left_out(data) is None:
        # With more threads, small products wait for each other where other programs run too.
        with threadpool_limits(1):
            baselines.append(_linear_model(data, seed, progress))
    start = time.perf_counter()
    num_test = len(labels_of_tokens(data.test_labels))
    outputs = _constant_outputs(data, num_test).astype(np.float32)
    baselines.append(
        BaselineOutputs(
            name="constant",
            label="constant",
            explanation="Predicts the mean of the training targets for every input."
            if data.is_regression
            else "Predicts the share of each class among the training labels for every input.",
            outputs=outputs,
            seconds=time.perf_counter() - start,
            penalty=None,
        )
    )
    return BaselinesPart(baselines)


def linear_is_left_out(data: Dataset) -> str | None:
    """A sentence if the linear model does not fit the data or would need too much memory."""
    if not data.has_features:
        return "No linear model was fitted, since the inputs are not one array of floats."
    if data.is_per_token:
        return "No linear model was fitted, since the labels are per token."
    size = math.prod(shapes_of(data.train_inputs).shape)
    if size <= MAX_TRAIN_VALUES:
        return None
    return (
        f"No linear model was fitted, since the training inputs hold {size:,} numbers, more than "
        f"{MAX_TRAIN_VALUES:,}."
    )


def _linear_model(data: Dataset, seed: int, progress: Progress) -> BaselineOutputs:
    start = time.perf_counter()
    inputs = take(data.train_inputs, slice(None)).reshape(len(data.train_labels), -1)
    fit = _fit_ridge if data.is_regression else _fit_logistic
    labels = data.train_labels
    fold_of_example = folds(labels, data.train_groups, data.test_groups, NUM_FOLDS, seed)
    chosen = stratified(
        generator(seed, "baselines"), strata(labels), min(len(labels), MAX_SELECTION_EXAMPLES)
    )
    num_fits = int(fold_of_example.max()) + 2
    losses = np.zeros(len(PENALTIES))
    for fold in range(num_fits - 1):
        train = chosen & (fold_of_example != fold)
        held_out = chosen & (fold_of_example == fold)
        if not (train.any() and held_out.any()):  # Of whole groups, none may be among the chosen.
            continue
        for index, penalty in enumerate(PENALTIES):
            predict, _ = fit(inputs[train], labels[train], data.num_classes, penalty)
            losses[index] += _sum_of_losses(predict(inputs[held_out]), labels[held_out])
        progress("fitting a linear model", fold + 1, num_fits)
    penalty = PENALTIES[int(np.argmin(losses))]
    predict, converged = fit(inputs, labels, data.num_classes, penalty)
    test_chunks = (take(data.test_inputs, rows) for rows in chunks(data.test_inputs))
    outputs = np.concatenate([predict(chunk.reshape(len(chunk), -1)) for chunk in test_chunks])
    outputs = outputs.astype(np.float32)
    progress("fitting a linear model", num_fits, num_fits)
    explanation = (
        f"Logistic regression, a linear model without hidden units; its L2 penalty {penalty:g} "
        "was chosen by cross-validation."
    )
    if data.is_regression:
        explanation = explanation.replace("Logistic regression", "Ridge regression")
    if not converged:
        explanation += f" It did not converge in {MAX_STEPS} steps of L-BFGS."
    return BaselineOutputs(
        name="ridge-regression" if data.is_regression else "logistic-regression",
        label="ridge regression" if data.is_regression else "logistic regression",
        explanation=explanation,
        outputs=outputs,
        seconds=time.perf_counter() - start,
        penalty=penalty,
    )


def _sum_of_losses(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The sum over examples of the NLL, in regression of the squared error."""
    if outputs.ndim == 1:
        return float(((outputs - labels) ** 2).sum())
    return -float(outputs[np.arange(len(labels)), labels].sum())


def _constant_outputs(data: Dataset, num_test: int) -> np.ndarray:
    """The same prediction for each of so many examples."""
    if data.is_regression:
        return np.full(num_test, data.train_labels.mean(dtype=np.float64))
    log_shares = _log_shares(labels_of_tokens(data.train_labels), data.num_classes or 1)
    return np.tile(log_shares, (num_test, 1))


def _log_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Logarithms of `(count + 1) / (n + C)` for each class, `[class]`."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.log(counts + 1) - np.log(len(labels) + num_classes)


def _fit_logistic(
    inputs: np.ndarray, labels: np.ndarray, num_classes: int | None, penalty: float
) -> tuple[Predictions, bool]:
    """Log-probabilities `[example, class]` of a logistic regression, and whether it converged.

    A class without examples gets the share of the constant, and the others share the rest.
    """
    # Imported here, since scikit-learn takes long to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    log_shares = _log_shares(labels, num_classes or 1)
    present = np.unique(labels)
    if len(present) < 2:
        return lambda inputs: np.tile(log_shares, (len(inputs), 1)), True
    scale = _scaling(inputs)
    model = LogisticRegression(C=1 / penalty, max_iter=MAX_STEPS, tol=TOLERANCE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(scale(inputs), labels)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    rest = np.log(np.exp(log_shares[present]).sum())

    def log_probs(inputs: np.ndarray) -> np.ndarray:
        logits = model.decision_function(scale(inputs))
        if logits.ndim == 1:  # Of two classes: the logit of the second.
            logits = np.stack([np.zeros_like(logits), logits], 1)
        outputs = np.tile(log_shares, (len(inputs), 1))
        log_sums = np.logaddexp.reduce(logits, 1, keepdims=True)
        outputs[:, present] = logits - log_sums + rest
        return outputs

    return log_probs, converged


def _fit_ridge(
    inputs: np.ndarray, targets: np.ndarray, num_classes: int | None, penalty: float
) -> tuple[Predictions, bool]:
    """Predictions `[example]` of a ridge regression, and True: it needs no steps."""
    from sklearn.linear_model import Ridge

    scale = _scaling(inputs)
    model = Ridge(alpha=penalty).fit(scale(inputs), targets.astype(np.float64))
    return lambda inputs: model.predict(scale(inputs)), True


def _scaling(inputs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that centres features and divides by the root of their mean variance."""
    mean = inputs.mean(0, dtype=np.float64)
    size = np.sqrt(inputs.var(0, dtype=np.float64).mean()) or 1.0
    return lambda inputs: (inputs - mean) / size
