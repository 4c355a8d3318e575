"""Each method at each of its sizes: scores, worth in plain networks, and tests."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import metrics
from jdrop.statistics import (
    EnsembleCurve,
    Interval,
    bootstrap_weights,
    crossed_interval,
    equivalence_test,
    mean_interval,
)
from jdrop.study.evaluation import bootstrap
from jdrop.study.evaluation.losses import NUM_SPLITS
from jdrop.study.evaluation.readings import Reading, is_regression
from jdrop.study.methods import METHODS
from jdrop.study.results import Cost, MethodResult, Point, Reliability, RiskCoverage
from jdrop.study.scores import CURVE_SCORES

NUM_DRAWS = 1000
"""Draws of the bootstrap."""

NUM_RISKS = 101
"""Points of a curve of risk against coverage."""


def method_results(
    readings: Sequence[Reading],
    losses: Mapping[str, Mapping[str, np.ndarray]],
    labels: np.ndarray,
    margins: Mapping[str, float],
    budget: int,
) -> list[MethodResult]:
    """Evaluates each method at each of its sizes.

    Args:
        readings: the predictions of all methods.
        losses: by method and score, `[replicate, size, example]`.
        labels: `[example]`.
        margins: by score, the largest difference that counts as none.
        budget: how many networks the methods of equal budget may cost.
    """
    scores = CURVE_SCORES["regression" if is_regression(labels) else "classification"]
    curves = {score: EnsembleCurve(losses["plain"][score]) for score in scores}
    largest = {score: losses["plain"][score][:, -1] for score in scores}
    weights = None
    if not is_regression(labels):
        weights = bootstrap_weights(np.random.default_rng(0), len(labels), NUM_DRAWS)
    methods = []
    for reading in readings:
        points = []
        for index, size in enumerate(reading.sizes):
            at_size = {score: losses[reading.name][score][:, index] for score in scores}
            point = Point(
                size=size,
                cost=_cost_of_size(reading, size),
                scores={score: crossed_interval(at_size[score]) for score in scores},
                over_seeds={
                    score: mean_interval(list(at_size[score].mean(1)[: reading.num_independent]))
                    for score in scores
                },
                worth={score: curves[score].equivalent(at_size[score]) for score in scores},
                against_ensemble={
                    score: equivalence_test(at_size[score] - largest[score], margins[score])
                    for score in scores
                },
            )
            if size in reading.table:
                point = _with_profile(point, reading, labels, weights)
            points.append(point)
        label, explanation = f"{reading.name}, {{n}}", "Given predictions."
        if reading.name in METHODS:
            label = METHODS[reading.name].label
            explanation = METHODS[reading.name].explanation
        methods.append(
            MethodResult(
                name=reading.name,
                label=label.replace("{budget}", str(budget)),
                explanation=explanation.replace("{budget}", str(budget)),
                unit=reading.unit,
                points=points,
                table=list(reading.table),
                retrained=reading.retrained,
            )
        )
    return methods


def _cost_of_size(reading: Reading, size: int) -> Cost | None:
    cost = reading.cost
    if cost is None:
        return None
    num_networks = 1 if reading.unit == "masks" else size
    return Cost(
        train_flops=num_networks * cost.train_flops,
        train_seconds=num_networks * cost.train_seconds,
        predict_flops=size * cost.predict_flops,
        predict_seconds=size * cost.predict_seconds,
        parameters=num_networks * cost.parameters,
        bytes=num_networks * cost.bytes,
    )


def _with_profile(
    point: Point, reading: Reading, labels: np.ndarray, weights: np.ndarray | None
) -> Point:
    """Adds the scores that are not means over examples, of the first members."""
    members = reading.outputs[:, : point.size]
    if weights is None:
        profile = regression_profile(point.scores["mse"], members, labels)
        return replace(point, scores={**point.scores, **profile})
    ood_members = None
    if reading.ood_outputs is not None:
        ood_members = reading.ood_outputs[:, : point.size]
    intervals, curves = bootstrap.scores(members, ood_members, labels, weights)
    share = curves["share"]
    with np.errstate(invalid="ignore"):
        reliability = Reliability(
            confidence=(np.nansum(share * curves["confidence"], 0) / share.sum(0)).tolist(),
            accuracy=(np.nansum(share * curves["accuracy"], 0) / share.sum(0)).tolist(),
            share=share.mean(0).tolist(),
        )
    risk = curves["risk"].mean(0)
    shown = np.unique(np.linspace(0, len(risk) - 1, NUM_RISKS).round().astype(int))
    return replace(
        point,
        scores={**point.scores, **intervals},
        reliability=reliability,
        risk_coverage=RiskCoverage(((shown + 1) / len(risk)).tolist(), risk[shown].tolist()),
    )


def regression_profile(
    mse: Interval, members: np.ndarray, targets: np.ndarray
) -> dict[str, Interval]:
    """Computes the RMSE, and the coverage of 95 % intervals fitted on other examples.

    Args:
        mse: the interval of the MSE.
        members: predicted means `[replicate, member, example]`.
        targets: `[example]`.
    """
    ends = [None if end is None else math.sqrt(max(end, 0)) for end in (mse.low, mse.high)]
    rmse = Interval(math.sqrt(mse.mean), ends[0], ends[1], mse.num_replicates)
    covered = np.stack(
        [_covered_share(jnp.asarray(means), jnp.asarray(targets)) for means in members]
    )
    return {"rmse": rmse, "coverage": crossed_interval(covered.astype(np.float64))}


@jax.jit
def _covered_share(means: Array, targets: Array) -> Array:
    """By example, how often the 95 % interval fitted on the other half covers its target."""

    def covered(fitted: Array, scored: Array) -> Array:
        scale = metrics.fit_scale(means[:, fitted], targets[fitted])

        def example_covered(mean: Array, target: Array) -> Array:
            return metrics.interval_coverage(mean[:, None], target[None], scale)

        return jax.vmap(example_covered, in_axes=(1, 0))(means[:, scored], targets[scored])

    return metrics.mean_over_splits(jax.random.key(0), covered, len(targets), NUM_SPLITS)


def unreliable_calibration(
    readings: Sequence[Reading], methods: Sequence[MethodResult], labels: np.ndarray
) -> list[str]:
    """Returns a sentence on points of the table whose calibrated scores are unreliable, if any."""
    if is_regression(labels):
        return []
    titles = []
    for reading, method in zip(readings, methods, strict=True):
        for size in reading.table:
            starts = range(0, reading.outputs.shape[1] - size + 1, size)
            groups = (
                outputs[start : start + size] for outputs in reading.outputs for start in starts
            )
            if any(_ends_at_a_bound(_log_mean(group), jnp.asarray(labels)) for group in groups):
                titles.append(method.title(size))
    if not titles:
        return []
    return [
        f"The calibrated scores of {'; '.join(titles)} are unreliable. On some half of the test "
        "examples the fitted temperature is 1/20 or 20, a bound of the search. This happens where "
        "every prediction of a half is right."
    ]


def _log_mean(members: np.ndarray) -> Array:
    """The arithmetic pool of members, in NumPy: JAX would compile for each count of members."""
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.exp(members, dtype=np.float64).mean(0)), jnp.float32)


@jax.jit
def _ends_at_a_bound(log_probs: Array, labels: Array) -> Array:
    """Whether any temperature that `calibrated_nll` fits is at a bound of the search."""

    def at_a_bound(fitted: Array, scored: Array) -> Array:
        temperature = metrics.fit_temperature(log_probs[fitted], labels[fitted])
        is_bound = jnp.abs(jnp.log(temperature)) > 0.999 * math.log(20)
        return jnp.broadcast_to(is_bound, scored.shape).astype(jnp.float32)

    key = jax.random.key(0)
    return metrics.mean_over_splits(key, at_a_bound, len(labels), NUM_SPLITS).any()
