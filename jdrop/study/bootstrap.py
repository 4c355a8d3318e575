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
    members: Array, ood_members: Array | None, labels: Array, weights: np.ndarray
) -> dict[str, Interval]:
    """Calibration, selective prediction and detection of the average of some members.

    Args:
        members: log-probabilities `[replicate, member, example, class]`.
        ood_members: the same for inputs of another kind.
        labels: `[example]`.
        weights: `[draw, example]`, see `jdrop.statistics.bootstrap_weights`.
    """
    ood_weights = None
    if ood_members is not None:
        ood_weights = jnp.asarray(
            bootstrap_weights(np.random.default_rng(1), ood_members.shape[2], len(weights))
        )
    given = jnp.asarray(weights)
    found = [
        _of_replicate(
            members[index],
            None if ood_members is None else ood_members[index],
            labels,
            given,
            ood_weights,
        )
        for index in range(len(members))
    ]
    return {
        name: bootstrap_interval(
            np.array([float(of_replicate[name][0]) for of_replicate in found]),
            np.stack([np.asarray(of_replicate[name][1]) for of_replicate in found], 1),
        )
        for name in found[0]
    }


@jax.jit
def _of_replicate(
    members: Array,
    ood_members: Array | None,
    labels: Array,
    weights: Array,
    ood_weights: Array | None,
) -> dict[str, tuple[Array, Array]]:
    """By score, its value and its value in each draw."""
    log_probs = inference.pool(members)
    confidence = jnp.exp(log_probs.max(-1))
    right = (log_probs.argmax(-1) == labels).astype(confidence.dtype)
    found = {}
    for name, binning in (("ece", "equal width"), ("ece_equal_mass", "equal mass")):
        bins = _bins(confidence, binning)
        score = metrics.ece(log_probs, labels, num_bins=NUM_BINS, binning=binning)
        found[name] = score, _ece(bins, confidence, right, weights)
    found["debiased_ece"] = (
        metrics.debiased_ece(log_probs, labels, num_bins=NUM_BINS),
        _debiased_ece(_bins(confidence, "equal mass"), confidence, right, weights),
    )
    found["aurc"] = (
        metrics.risk_coverage(log_probs, labels).mean(),
        _aurc(confidence, right, weights),
    )
    uncertainties = {"entropy": metrics.entropy(log_probs)}
    if len(members) > 1:
        uncertainties["mutual_information"] = metrics.mutual_information(members)
    for name, values in uncertainties.items():
        found[name] = values.mean(), weights @ values / len(values)
    if ood_members is not None:
        assert ood_weights is not None
        others = {"entropy": metrics.entropy(inference.pool(ood_members))}
        if len(members) > 1:
            others["mutual_information"] = metrics.mutual_information(ood_members)
        for name, values in uncertainties.items():
            found[f"auroc_{name}"] = (
                metrics.auroc(values, others[name]),
                _auroc(values, others[name], weights, ood_weights),
            )
    return found


def _bins(confidence: Array, binning: str) -> Array:
    """The number of the bin of each example, as `jdrop.metrics.ece` divides them."""
    if binning == "equal width":
        edges = jnp.linspace(0, 1, NUM_BINS + 1, dtype=confidence.dtype)[1:-1]
        return jnp.searchsorted(edges, confidence, side="left")
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(len(confidence)), NUM_BINS)])
    rank = jnp.argsort(jnp.argsort(confidence, stable=True))
    return jnp.searchsorted(jnp.asarray(ends), rank, side="right")


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


def _auroc(negatives: Array, positives: Array, weights: Array, ood_weights: Array) -> Array:
    order = jnp.argsort(negatives)
    ordered = negatives[order]
    below = jnp.searchsorted(ordered, positives, side="left")
    not_above = jnp.searchsorted(ordered, positives, side="right")

    def one(both: tuple[Array, Array]) -> Array:
        of_negatives, of_positives = both
        sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(of_negatives[order])])
        wins = (sums[below] + sums[not_above]) / (2 * len(negatives))
        return (of_positives * wins).sum() / len(positives)

    return jax.lax.map(one, (weights, ood_weights))
