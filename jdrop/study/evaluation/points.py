"""Each method at each of its sizes: scores, differences, worth in plain networks, and tests."""

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
from jdrop.study.evaluation.ranges import possible
from jdrop.study.evaluation.readings import Reading, in_groups, is_regression
from jdrop.study.methods import METHODS
from jdrop.study.results import Cost, MethodResult, Point, Reliability, RiskCoverage
from jdrop.study.scores import CURVE_SCORES

NUM_DRAWS = 1000
"""Draws of the bootstrap."""

NUM_RISKS = 101
"""Points of a curve of risk against coverage."""

LARGEST_HARM = 0.01
"""Nats by which calibration may raise the NLL; beyond, the calibrated NLL is unreliable."""

Losses = Mapping[str, np.ndarray]
"""By score, `[replicate, size, example]`, or `[replicate, example]` of one size."""


class Scorer:
    """Scores each method at each of its sizes, and compares it with the plain networks.

    Args:
        labels: `[example]`.
        groups: `[example]`: examples of a group are resampled together; None without groups.
        margins: by score, the largest difference that counts as none.
        budget: how many networks the methods of equal budget may cost.
        is_per_token: whether the examples are tokens, whose NLL has a perplexity.
    """

    def __init__(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        margins: Mapping[str, float],
        budget: int,
        *,
        is_per_token: bool = False,
    ) -> None:
        self._labels, self._groups = labels, groups
        self._margins, self._budget = margins, budget
        self._is_per_token = is_per_token
        self._scores = CURVE_SCORES["regression" if is_regression(labels) else "classification"]
        self._weights = None
        if not is_regression(labels):
            rng = np.random.default_rng(0)
            weights = bootstrap_weights(rng, len(labels), NUM_DRAWS, groups)
            # Draws of groups that differ in size differ in their number of examples.
            self._weights = weights * (len(labels) / weights.sum(1, keepdims=True))

    def results(
        self, readings: Sequence[Reading], losses: Mapping[str, Losses]
    ) -> list[MethodResult]:
        """Evaluates methods.

        Args:
            readings: the predictions of all methods.
            losses: of the methods by name.
        """
        grouped = {
            name: {score: in_groups(values[score], self._groups) for score in self._scores}
            for name, values in losses.items()
        }
        plain, headline = grouped["plain"], headline_of(readings)
        sizes = next(reading.sizes for reading in readings if reading.name == "plain")
        curves = {score: EnsembleCurve(plain[score], sizes) for score in self._scores}
        references = {
            "single": _at(plain, 0),
            "ensemble": _at(plain, -1),
            "headline": _at(grouped[headline.name], headline.sizes.index(headline.table[0])),
        }
        results = []
        for reading in readings:
            points = [
                self._point(reading, size, _at(grouped[reading.name], index), curves, references)
                for index, size in enumerate(reading.sizes)
            ]
            results.append(self._method_result(reading, points))
        return _with_marks(results)

    def _point(
        self,
        reading: Reading,
        size: int,
        losses: Losses,
        curves: Mapping[str, EnsembleCurve],
        references: Mapping[str, Losses],
    ) -> Point:
        state = reading.states[size]
        minus = {
            name: {
                score: crossed_interval(values - reference[score])
                for score, values in losses.items()
            }
            for name, reference in references.items()
        }
        ensemble = references["ensemble"]
        over_seeds = {
            score: mean_interval(list(values.mean(1)[: reading.num_independent]))
            for score, values in losses.items()
        }
        point = Point(
            size=size,
            epochs=state.epochs,
            weight_decay=state.weight_decay,
            cost=_cost_of_size(reading, size),
            scores={
                score: possible(score, crossed_interval(values)) for score, values in losses.items()
            },
            over_seeds={score: possible(score, values) for score, values in over_seeds.items()},
            minus_single=minus["single"],
            minus_ensemble=minus["ensemble"],
            minus_headline=minus["headline"],
            worth={score: curves[score].equivalent(values) for score, values in losses.items()},
            against_ensemble={
                score: equivalence_test(values - ensemble[score], self._margins[score])
                for score, values in losses.items()
            },
        )
        if self._is_per_token:
            point = replace(
                point,
                scores={**point.scores, "perplexity": _perplexity(point.scores["nll"])},
                over_seeds={**point.over_seeds, "perplexity": _perplexity(point.over_seeds["nll"])},
            )
        if size not in reading.table:
            return point
        return self._with_profile(point, reading)

    def _method_result(self, reading: Reading, points: list[Point]) -> MethodResult:
        method = METHODS.get(reading.name)
        label, explanation = reading.label, reading.explanation
        if method is not None:
            label, explanation = method.label, method.explanation
        if reading.num_diverged:
            label += f" ({reading.num_diverged} diverged)"
        return MethodResult(
            name=reading.name,
            label=label.replace("{budget}", str(self._budget)),
            explanation=explanation.replace("{budget}", str(self._budget)),
            unit=reading.unit,
            points=points,
            table=list(reading.table),
            retrained=reading.retrained,
            is_control=method is not None and method.group.is_control,
            is_baseline=reading.is_baseline,
        )

    def _with_profile(self, point: Point, reading: Reading) -> Point:
        """Adds the scores that are not means over examples, of the first members."""
        state = reading.states[point.size]
        members = state.outputs[:, : point.size]
        if self._weights is None:
            profile = regression_profile(point.scores["mse"], members, self._labels, self._groups)
            return replace(point, scores={**point.scores, **profile})
        ood_members = None
        if state.ood_outputs is not None:
            ood_members = state.ood_outputs[:, : point.size]
        intervals, curves = bootstrap.scores(members, ood_members, self._labels, self._weights)
        share = curves["share"]
        with np.errstate(invalid="ignore"):
            reliability = Reliability(
                confidence=(np.nansum(share * curves["confidence"], 0) / share.sum(0)).tolist(),
                accuracy=(np.nansum(share * curves["accuracy"], 0) / share.sum(0)).tolist(),
                share=share.mean(0).tolist(),
            )
        risk = curves["risk"].mean(0)
        shown = np.unique(np.linspace(0, len(risk) - 1, NUM_RISKS).round().astype(int))
        at_a_bound = any(
            _ends_at_a_bound(_log_mean(group), jnp.asarray(self._labels))
            for outputs in state.outputs
            for group in _groups_of_members(outputs, point.size)
        )
        return replace(
            point,
            scores={
                **point.scores,
                **{score: possible(score, interval) for score, interval in intervals.items()},
            },
            unreliable=["calibrated_nll"] if at_a_bound else [],
            reliability=reliability,
            risk_coverage=RiskCoverage(((shown + 1) / len(risk)).tolist(), risk[shown].tolist()),
        )


def headline_of(readings: Sequence[Reading]) -> Reading:
    """The method that `Comparison.headline` names; the plain networks if there is no other."""
    ranks = {"dropout": 0, "plain": 2}
    networks = [reading for reading in readings if not reading.is_baseline]
    return min(networks, key=lambda reading: ranks.get(reading.name, 1))


def _at(losses: Losses, index: int) -> dict[str, np.ndarray]:
    """The losses `[replicate, example]` of one size."""
    return {score: values[:, index] for score, values in losses.items()}


def _with_marks(results: list[MethodResult]) -> list[MethodResult]:
    """Marks calibrated scores that say nothing.

    Calibration fits a temperature on one half of the test examples and scores the other. If every
    prediction of a half is right, the temperature ends at a bound of the search. If the halves are
    small, the temperature overfits and the calibrated NLL is larger than the NLL. A method whose
    reference is marked is marked too, since its differences and its worth say nothing either.
    """

    def is_unreliable(point: Point) -> bool:
        if "nll" not in point.scores:
            return False
        harm = point.scores["calibrated_nll"].mean - point.scores["nll"].mean
        return bool(point.unreliable) or harm > LARGEST_HARM

    plain = next(result for result in results if result.name == "plain")
    all_are = is_unreliable(plain.points[0]) or is_unreliable(plain.points[-1])

    def marked(point: Point) -> Point:
        return replace(
            point, unreliable=["calibrated_nll"] if all_are or is_unreliable(point) else []
        )

    return [replace(result, points=list(map(marked, result.points))) for result in results]


def _groups_of_members(outputs: np.ndarray, size: int) -> list[np.ndarray]:
    """Members `[member, ...]` in disjoint groups of a size."""
    starts = range(0, len(outputs) - size + 1, size)
    return [outputs[start : start + size] for start in starts]


def _cost_of_size(reading: Reading, size: int) -> Cost | None:
    cost = reading.states[size].cost
    if cost is None:
        return None
    num_networks = 1 if reading.unit == "masks" else size
    return Cost(
        train_flops=num_networks * cost.train_flops,
        search_flops=num_networks * reading.search_flops.get(size, 0.0),
        train_seconds=num_networks * cost.train_seconds,
        predict_flops=size * cost.predict_flops,
        predict_seconds=size * cost.predict_seconds,
        parameters=num_networks * cost.parameters,
        bytes=num_networks * cost.bytes,
    )


def regression_profile(
    mse: Interval, members: np.ndarray, targets: np.ndarray, groups: np.ndarray | None
) -> dict[str, Interval]:
    """Computes the RMSE, and the coverage of 95 % intervals fitted on other examples.

    Args:
        mse: the interval of the MSE.
        members: predicted means `[replicate, member, example]`.
        targets: `[example]`.
        groups: `[example]`, see `Scorer`.
    """
    ends = [None if end is None else math.sqrt(max(end, 0)) for end in (mse.low, mse.high)]
    rmse = Interval(math.sqrt(mse.mean), ends[0], ends[1], mse.num_replicates)
    covered = np.stack(
        [_covered_share(jnp.asarray(means), jnp.asarray(targets)) for means in members]
    )
    coverage = crossed_interval(in_groups(covered.astype(np.float64), groups))
    return {"rmse": rmse, "coverage": possible("coverage", coverage)}


@jax.jit
def _covered_share(means: Array, targets: Array) -> Array:
    """By example, how often the 95 % interval fitted on the other half covers its target."""

    def covered(fitted: Array, scored: Array) -> Array:
        scale = metrics.fit_scale(means[:, fitted], targets[fitted])

        def example_covered(mean: Array, target: Array) -> Array:
            return metrics.interval_coverage(mean[:, None], target[None], scale)

        return jax.vmap(example_covered, in_axes=(1, 0))(means[:, scored], targets[scored])

    return metrics.mean_over_splits(jax.random.key(0), covered, len(targets), NUM_SPLITS)


def _perplexity(nll: Interval) -> Interval:
    """The exponential of a mean NLL and of the ends of its interval."""
    low, high = (None if end is None else float(np.exp(end)) for end in (nll.low, nll.high))
    return Interval(float(np.exp(nll.mean)), low, high, nll.num_replicates)


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
