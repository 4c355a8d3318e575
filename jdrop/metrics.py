"""Scores: log-probabilities and labels in, one number out. No plots, no files.

Every score takes the log-probabilities of one prediction, be it a network's or a pool's, and is a
mean over examples, computed in float32 or, for 64-bit predictions, in float64; lower is better for
all of them. Labels of another shape or dtype than `[batch]` integers, and predictions that are not
`[batch, class]`, are a `ValueError`; a label that is no class makes every score NaN.
"""

import math
from functools import partial

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
    is_class = (labels >= 0) & (labels < log_probs.shape[-1])
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
