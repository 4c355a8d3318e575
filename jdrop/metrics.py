"""Scores: log-probabilities and labels in, one number out. No plots, no files.

Every score takes the log-probabilities of one prediction, be it a network's or a pool's, and is a
mean over examples, computed in float32 or, for 64-bit predictions, in float64; lower is better for
all of them. Labels of another shape or dtype than `[batch]` integers, and predictions that are not
`[batch, class]`, are a `ValueError`; a label that is no class makes every score NaN.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float, Integer

LogProbs = Float[Array, "batch classes"]
Labels = Integer[Array, " batch"]


def _checked(log_probs: Array, labels: Array) -> tuple[Array, Array]:
    """`log_probs` in the dtype to compute in, and 0, or NaN if a label is no class."""
    if log_probs.ndim != 2:
        raise ValueError(
            f"log_probs must be [batch, class], got the shape {log_probs.shape}; average members "
            "with `jdrop.inference.pool`, or score each with `jax.vmap`."
        )
    if labels.shape != log_probs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {log_probs.shape[:1]}, "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    # Not in the dtype of the labels, in which the number of classes may be another number.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    is_class = (wide >= 0) & (wide < log_probs.shape[-1])
    return log_probs, jnp.where(is_class.all(), 0, math.nan).astype(log_probs.dtype)


@jax.jit
def error(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    """The share of examples whose most probable class is not their label, in [0, 1].

    Among equally probable classes the first counts as predicted.

    Args:
        log_probs: `[batch, class]`.
        labels: `[batch]`, integers from 0.

    Example:
        >>> float(error(jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]])), jnp.array([0, 1])))
        0.5
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    return zero_or_nan + jnp.mean((jnp.argmax(log_probs, -1) != labels).astype(log_probs.dtype))


@jax.jit
def nll(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The negative log-likelihood $-\frac{1}{N} \sum_n \log p_n(y_n)$, in nats.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.

    Example:
        >>> round(float(nll(jnp.log(jnp.full((3, 4), 0.25)), jnp.array([0, 1, 2]))), 4)
        1.3863
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    return zero_or_nan - jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], -1))


@jax.jit
def brier(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The Brier score $\frac{1}{N} \sum_n \sum_c (p_n(c) - [y_n = c])^2$, in [0, 2].

    The sum over classes, as Brier defined it; some papers divide it by the number of classes.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.

    Example:
        >>> float(brier(jnp.log(jnp.full((1, 2), 0.5)), jnp.array([0])))
        0.5
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    truth = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)
    return zero_or_nan + jnp.mean(jnp.sum((jnp.exp(log_probs) - truth) ** 2, -1))


@partial(jax.jit, static_argnames="num_bins")
def ece(log_probs: LogProbs, labels: Labels, *, num_bins: int = 15) -> Float[Array, ""]:
    r"""The expected calibration error of the top class, in [0, 1].

    $$\sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|$$

    over bins of confidence of equal width, each open on the left and closed on the right, so that
    a confidence of exactly 1 is in the last one. It depends on the number of bins and on how
    spread the confidences are: show it, do not rank by it.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.
        num_bins: how many bins, at least 1.

    Example:
        >>> round(float(ece(jnp.log(jnp.array([[0.75, 0.25]] * 4)), jnp.array([0, 0, 0, 1]))), 4)
        0.0

    Reference:
        Guo et al. 2017, arXiv:1706.04599, with 15 bins.
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    confidence = jnp.exp(jnp.max(log_probs, -1))
    right = (jnp.argmax(log_probs, -1) == labels).astype(confidence.dtype)
    inner_edges = jnp.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)[1:-1]
    bins = jnp.searchsorted(inner_edges, confidence, side="left")
    # |acc_b - conf_b| n_b / N: a mean over all examples of what falls into the bin. As a mean and
    # not as a sum built up in order, which would lose digits.
    in_bin = bins[:, None] == jnp.arange(num_bins)[None]
    gaps = jnp.mean(jnp.where(in_bin, (right - confidence)[:, None], 0), 0)
    return zero_or_nan + jnp.sum(jnp.abs(gaps))


@jax.jit
def fit_temperature(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The temperature $T$ that makes the NLL of $\mathrm{softmax}(\log p / T)$ smallest.

    The NLL is convex in $1 / T$; its minimum is found by bisection of its derivative. $T$ lies in
    [1/20, 20]: at the lower end where every example is classified rightly, since then no $T$ is
    small enough, and at the upper end where the predictions are no better than chance.

    Args:
        log_probs: `[batch, class]`; of a pool, not of its members: average first, calibrate then.
        labels: `[batch]`, integers from 0; not of the examples that are scored.

    Example:
        >>> log_probs = jax.nn.log_softmax(3 * jnp.log(jnp.full((4, 2), 0.5).at[:, 0].set(0.25)))
        >>> float(fit_temperature(log_probs, jnp.array([1, 1, 1, 0])))  # odds of 3 need no 8
        1.89...

    Reference:
        Guo et al. 2017, arXiv:1706.04599.
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    of_label = jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]

    def slope(inverse: Array) -> Array:
        """The derivative of the NLL with respect to 1 / T."""
        probs = jax.nn.softmax(inverse * log_probs)
        expected = jnp.sum(jnp.where(probs > 0, probs * log_probs, 0), -1)
        return jnp.mean(expected - of_label)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        too_low = slope(jnp.exp(middle)) <= 0
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    end = jnp.log(jnp.asarray(20, log_probs.dtype))
    low, high = jax.lax.fori_loop(0, 40, halve, (-end, end))
    return zero_or_nan + jnp.exp(-(low + high) / 2)


@partial(jax.jit, static_argnames="num_repeats")
def calibrated_nll(
    key: Array, log_probs: LogProbs, labels: Labels, *, num_repeats: int = 5
) -> Float[Array, ""]:
    """The NLL after calibration by a temperature that was fitted on other examples.

    The examples are halved at random; each half is scored at the temperature fitted on the other.
    The mean over both halves and `num_repeats` halvings.

    Args:
        key: consumed; it says which examples go together. Use one key for all that is compared.
        log_probs: `[batch, class]`, at least 2 examples.
        labels: `[batch]`, integers from 0.
        num_repeats: how many halvings, at least 1.

    Example:
        >>> log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (100, 3)))
        >>> bool(calibrated_nll(jax.random.key(1), log_probs, jnp.arange(100) % 3) < 1.2)
        True

    Reference:
        Ashukha et al. 2020, arXiv:2002.06470, section 4.
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    num_examples = len(labels)
    if num_examples < 2:
        raise ValueError(f"log_probs must hold at least 2 examples, got {num_examples}.")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}.")

    def halving(key: Array) -> Array:
        order = jax.random.permutation(key, num_examples)
        halves = order[: num_examples // 2], order[num_examples // 2 :]
        losses = []
        for fitted, scored in (halves, halves[::-1]):
            temperature = fit_temperature(log_probs[fitted], labels[fitted])
            calibrated = jax.nn.log_softmax(log_probs[scored] / temperature)
            losses.append(nll(calibrated, labels[scored]))
        return (losses[0] + losses[1]) / 2

    return zero_or_nan + jnp.mean(jax.lax.map(halving, jax.random.split(key, num_repeats)))


@jax.jit
def entropy(log_probs: LogProbs) -> Float[Array, " batch"]:
    r"""The entropy of each prediction, $-\sum_c p(c) \log p(c)$, in nats.

    Args:
        log_probs: `[batch, class]`, normalised.

    Example:
        >>> [round(float(h), 4) for h in entropy(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]])))]
        [0.6931, 0.0]
    """
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    probs = jnp.exp(log_probs)
    return jnp.sum(jnp.where(probs > 0, -probs * log_probs, 0), -1)


@jax.jit
def auroc(negatives: Float[Array, " a"], positives: Float[Array, " b"]) -> Float[Array, ""]:
    r"""The probability that a positive scores higher than a negative, ties counting one half.

    The area under the receiver operating characteristic. To tell inputs of another distribution
    from those of the training data: these are the positives, and the score is the entropy.

    Args:
        negatives: scores of the negatives.
        positives: scores of the positives.

    Example:
        >>> float(auroc(jnp.array([0.1, 0.4]), jnp.array([0.4, 0.8])))
        0.875
    """
    ordered = jnp.sort(negatives)
    below = jnp.searchsorted(ordered, positives, side="left")
    not_above = jnp.searchsorted(ordered, positives, side="right")
    return jnp.mean((below + not_above) / (2 * len(negatives)))


@jax.jit
def risk_coverage(log_probs: LogProbs, labels: Labels) -> Float[Array, " batch"]:
    r"""The error of the `k` most confident predictions, for `k` from 1 to the number of examples.

    Its mean is the AURC of Geifman et al. Examples of equal confidence stand in their given order.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]))
        >>> [round(float(r), 3) for r in risk_coverage(log_probs, jnp.array([0, 1, 1]))]
        [0.0, 0.0, 0.333]

    Reference:
        Geifman, Uziel and El-Yaniv 2018, arXiv:1805.08206.
    """
    log_probs, zero_or_nan = _checked(log_probs, labels)
    wrong = jnp.argmax(log_probs, -1) != labels
    order = jnp.argsort(-jnp.max(log_probs, -1), stable=True)
    errors = jnp.cumsum(wrong[order])
    return zero_or_nan + errors / jnp.arange(1, len(labels) + 1)
