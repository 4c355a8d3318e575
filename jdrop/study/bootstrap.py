"""Scores that are no means over examples, with intervals from the bootstrap over examples.

A draw is a weight for each example: how often it was drawn. Sorting and binning is done once, and
each draw is then a weighted sum, so that a thousand draws cost little more than one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import inference, metrics
from jdrop.statistics import Interval, bootstrap_interval, bootstrap_weights

NUM_BINS = 15


def scores(
    members: np.ndarray, ood_members: np.ndarray | None, labels: np.ndarray, weights: np.ndarray
) -> tuple[dict[str, Interval], dict[str, np.ndarray]]:
    """Calibration, selective prediction and detection of the average of some members.

    Args:
        members: log-probabilities `[replicate, member, example, class]`.
        ood_members: the same for inputs of another kind.
        labels: `[example]`.
        weights: `[draw, example]`, see `jdrop.statistics.bootstrap_weights`.

    Returns:
        By score, its interval; and by name the curves `[replicate, ...]` of reliability
        ("confidence", "accuracy", "share") and "risk" by coverage.
    """
    ood_weights = None
    if ood_members is not None:
        rng = np.random.default_rng(1)
        ood_weights = bootstrap_weights(rng, ood_members.shape[2], len(weights))
    found, curves = [], []
    for index, of_replicate in enumerate(members):
        pooled, unsure = _average(jnp.asarray(of_replicate))
        values, of_curves = _of_average(pooled, labels, weights)
        for name, uncertainty in unsure.items():
            values[name] = _mean(uncertainty, weights)
        if ood_members is not None:
            others = _average(jnp.asarray(ood_members[index]))[1]
            for name, uncertainty in unsure.items():
                values[f"auroc_{name}"] = _auroc(uncertainty, others[name], weights, ood_weights)
        found.append(values)
        curves.append(of_curves)
    intervals = {
        name: bootstrap_interval(
            np.array([float(values[name][0]) for values in found]),
            np.stack([np.asarray(values[name][1]) for values in found], 1),
        )
        for name in found[0]
    }
    return intervals, {
        name: np.stack([np.asarray(of_curves[name]) for of_curves in curves]) for name in curves[0]
    }


@jax.jit
def _average(members: Array) -> tuple[Array, dict[str, Array]]:
    """The average of members, and how unsure each of its predictions is."""
    log_probs = inference.pool(members)
    unsure = {"entropy": metrics.entropy(log_probs)}
    if len(members) > 1:
        unsure["mutual_information"] = metrics.mutual_information(members)
    return log_probs, unsure


@jax.jit
def _mean(values: Array, weights: Array) -> tuple[Array, Array]:
    return values.mean(), weights @ values / len(values)


@jax.jit
def _of_average(
    log_probs: Array, labels: Array, weights: Array
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """By score, its value and its value in each draw; and by name the curves."""
    confidence = jnp.exp(log_probs.max(-1))
    right = (log_probs.argmax(-1) == labels).astype(confidence.dtype)
    width, mass = (
        metrics.confidence_bins(confidence, NUM_BINS, binning)
        for binning in ("equal width", "equal mass")
    )
    risk = metrics.risk_coverage(log_probs, labels)
    given = {"num_bins": NUM_BINS}
    found = {
        "ece": (metrics.ece(log_probs, labels, **given), _ece(width, confidence, right, weights)),
        "ece_equal_mass": (
            metrics.ece(log_probs, labels, **given, binning="equal mass"),
            _ece(mass, confidence, right, weights),
        ),
        "debiased_ece": (
            metrics.debiased_ece(log_probs, labels, **given),
            _debiased_ece(mass, confidence, right, weights),
        ),
        "aurc": (risk.mean(), _aurc(confidence, right, weights)),
    }
    curve = metrics.reliability_curve(log_probs, labels, **given)
    return found, {
        "risk": risk,
        **dict(zip(("confidence", "accuracy", "share"), curve, strict=True)),
    }


def _sums(bins: Array, values: Array, weights: Array) -> Array:
    """Weighted sums `[draw, bin]` of a value of each example."""
    return weights @ jnp.where(bins[:, None] == jnp.arange(NUM_BINS)[None], values[:, None], 0)


def _ece(bins: Array, confidence: Array, right: Array, weights: Array) -> Array:
    return jnp.abs(_sums(bins, right - confidence, weights)).sum(-1) / len(bins)


def _debiased_ece(bins: Array, confidence: Array, right: Array, weights: Array) -> Array:
    count = _sums(bins, jnp.ones_like(right), weights)
    accuracy = _sums(bins, right, weights) / jnp.maximum(count, 1)
    gap = accuracy - _sums(bins, confidence, weights) / jnp.maximum(count, 1)
    bias = jnp.where(count > 1, accuracy * (1 - accuracy) / jnp.maximum(count - 1, 1), 0)
    return jnp.sqrt(jnp.maximum((count * (gap**2 - bias)).sum(-1) / len(bins), 0))


def _aurc(confidence: Array, right: Array, weights: Array) -> Array:
    """The mean risk, each drawn example counting as often as it was drawn.

    Of examples that were drawn several times all count before the risk is taken.
    """
    order = jnp.argsort(-confidence, stable=True)
    wrong = (1 - right)[order]

    def one(weight: Array) -> Array:
        drawn = weight[order]
        risk = jnp.cumsum(drawn * wrong) / jnp.maximum(jnp.cumsum(drawn), 1)
        return (drawn * risk).sum() / len(drawn)

    return jax.lax.map(one, weights)


@jax.jit
def _auroc(
    negatives: Array, positives: Array, weights: Array, ood_weights: Array
) -> tuple[Array, Array]:
    order = jnp.argsort(negatives)
    ordered = negatives[order]
    below = jnp.searchsorted(ordered, positives, side="left")
    not_above = jnp.searchsorted(ordered, positives, side="right")

    def one(both: tuple[Array, Array]) -> Array:
        of_negatives, of_positives = both
        sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(of_negatives[order])])
        wins = (sums[below] + sums[not_above]) / (2 * len(negatives))
        return (of_positives * wins).sum() / len(positives)

    return metrics.auroc(negatives, positives), jax.lax.map(one, (weights, ood_weights))
