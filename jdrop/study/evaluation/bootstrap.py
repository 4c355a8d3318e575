"""Scores that are not means over examples, with intervals from a bootstrap over the examples.

A draw gives each example a weight: how often it was drawn. Examples are sorted and binned once;
each draw is then a weighted sum, so a thousand draws cost little more than one.
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
    """Computes scores of an average: calibration, selective prediction and detection.

    Args:
        members: log-probabilities `[replicate, member, example, class]`.
        ood_members: the same for out-of-distribution inputs.
        labels: `[example]`.
        weights: `[draw, example]`, see `jdrop.statistics.bootstrap_weights`.

    Returns:
        The interval of each score; and the curves `[replicate, ...]` by name: "confidence",
        "accuracy" and "share" of reliability, and "risk" by coverage.
    """
    ood_weights = None
    if ood_members is not None:
        rng = np.random.default_rng(1)
        ood_weights = bootstrap_weights(rng, ood_members.shape[2], len(weights))
    values_of_replicates, curves_of_replicates = [], []
    for index, outputs in enumerate(members):
        log_probs, uncertainties = _average(jnp.asarray(outputs))
        values, curves = _average_scores(log_probs, labels, weights)
        for name, uncertainty in uncertainties.items():
            values[name] = _mean(uncertainty, weights)
        if ood_members is not None:
            ood_uncertainties = _average(jnp.asarray(ood_members[index]))[1]
            for name, uncertainty in uncertainties.items():
                values[f"auroc_{name}"] = _auroc(
                    uncertainty, ood_uncertainties[name], weights, ood_weights
                )
        values_of_replicates.append(values)
        curves_of_replicates.append(curves)
    intervals = {
        name: bootstrap_interval(
            np.array([float(values[name][0]) for values in values_of_replicates]),
            np.stack([np.asarray(values[name][1]) for values in values_of_replicates], 1),
        )
        for name in values_of_replicates[0]
    }
    return intervals, {
        name: np.stack([np.asarray(curves[name]) for curves in curves_of_replicates])
        for name in curves_of_replicates[0]
    }


@jax.jit
def _average(members: Array) -> tuple[Array, dict[str, Array]]:
    """The average of members, and the uncertainty of each of its predictions."""
    log_probs = inference.pool(members)
    uncertainties = {"entropy": metrics.entropy(log_probs)}
    if len(members) > 1:
        uncertainties["mutual_information"] = metrics.mutual_information(members)
    return log_probs, uncertainties


@jax.jit
def _mean(values: Array, weights: Array) -> tuple[Array, Array]:
    return values.mean(), weights @ values / len(values)


@jax.jit
def _average_scores(
    log_probs: Array, labels: Array, weights: Array
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """The value and the draws of each score, and the curves by name."""
    confidence = jnp.exp(log_probs.max(-1))
    correct = (log_probs.argmax(-1) == labels).astype(confidence.dtype)
    equal_width, equal_mass = (
        metrics.confidence_bins(confidence, NUM_BINS, binning)
        for binning in ("equal width", "equal mass")
    )
    risk = metrics.risk_coverage(log_probs, labels)
    values = {
        "ece": (
            metrics.ece(log_probs, labels, num_bins=NUM_BINS),
            _ece(equal_width, confidence, correct, weights),
        ),
        "ece_equal_mass": (
            metrics.ece(log_probs, labels, num_bins=NUM_BINS, binning="equal mass"),
            _ece(equal_mass, confidence, correct, weights),
        ),
        "debiased_ece": (
            metrics.debiased_ece(log_probs, labels, num_bins=NUM_BINS),
            _debiased_ece(equal_mass, confidence, correct, weights),
        ),
        "aurc": (risk.mean(), _aurc(confidence, correct, weights)),
    }
    reliability = metrics.reliability_curve(log_probs, labels, num_bins=NUM_BINS)
    names = ("confidence", "accuracy", "share")
    return values, {"risk": risk, **dict(zip(names, reliability, strict=True))}


def _bin_sums(bins: Array, values: Array, weights: Array) -> Array:
    """Weighted sums `[draw, bin]` of the examples' values."""
    return weights @ jnp.where(bins[:, None] == jnp.arange(NUM_BINS)[None], values[:, None], 0)


def _ece(bins: Array, confidence: Array, correct: Array, weights: Array) -> Array:
    return jnp.abs(_bin_sums(bins, correct - confidence, weights)).sum(-1) / len(bins)


def _debiased_ece(bins: Array, confidence: Array, correct: Array, weights: Array) -> Array:
    count = _bin_sums(bins, jnp.ones_like(correct), weights)
    accuracy = _bin_sums(bins, correct, weights) / jnp.maximum(count, 1)
    gap = accuracy - _bin_sums(bins, confidence, weights) / jnp.maximum(count, 1)
    bias = jnp.where(count > 1, accuracy * (1 - accuracy) / jnp.maximum(count - 1, 1), 0)
    return jnp.sqrt(jnp.maximum((count * (gap**2 - bias)).sum(-1) / len(bins), 0))


def _aurc(confidence: Array, correct: Array, weights: Array) -> Array:
    """The mean risk in each draw, where an example counts as often as it was drawn.

    All copies of an example count before the risk is taken.
    """
    order = jnp.argsort(-confidence, stable=True)
    wrong = (1 - correct)[order]

    def aurc_of_draw(weight: Array) -> Array:
        drawn = weight[order]
        risk = jnp.cumsum(drawn * wrong) / jnp.maximum(jnp.cumsum(drawn), 1)
        return (drawn * risk).sum() / len(drawn)

    return jax.lax.map(aurc_of_draw, weights)


@jax.jit
def _auroc(
    negatives: Array, positives: Array, weights: Array, ood_weights: Array
) -> tuple[Array, Array]:
    order = jnp.argsort(negatives)
    ordered = negatives[order]
    below = jnp.searchsorted(ordered, positives, side="left")
    not_above = jnp.searchsorted(ordered, positives, side="right")

    def auroc_of_draw(draw: tuple[Array, Array]) -> Array:
        negative_weights, positive_weights = draw
        sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(negative_weights[order])])
        wins = (sums[below] + sums[not_above]) / (2 * len(negatives))
        return (positive_weights * wins).sum() / len(positives)

    return metrics.auroc(negatives, positives), jax.lax.map(auroc_of_draw, (weights, ood_weights))
