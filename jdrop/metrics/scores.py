"""Scores that are means over examples: error, NLL and Brier."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float, Integer

LogProbs = Float[Array, "batch classes"]
Labels = Integer[Array, " batch"]


def checked(log_probs: Array, labels: Array) -> tuple[Array, Array]:
    """Checks shapes, and returns `log_probs` in the dtype to compute in and a scalar.

    The scalar is 0, or NaN if any label is no class index or any prediction is NaN. Scores add it.
    """
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
    # At least int32, since a narrow dtype of the labels may not hold the number of classes.
    class_indices = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    in_range = (class_indices >= 0) & (class_indices < log_probs.shape[-1])
    valid = in_range.all() & ~jnp.isnan(log_probs).any()
    return log_probs, jnp.where(valid, 0, math.nan).astype(log_probs.dtype)


def checked_members(log_probs: Array) -> Array:
    """Checks that `log_probs` are of members, and returns them in the dtype to compute in."""
    if log_probs.ndim != 3:
        raise ValueError(
            f"log_probs must be [member, batch, class], got the shape {log_probs.shape}; for a "
            "single network pass `log_probs[None]`."
        )
    return log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))


@jax.jit
def losses(log_probs: LogProbs, labels: Labels) -> dict[str, Float[Array, " batch"]]:
    """The losses of each example, by the name of the score: "nll", "brier" and "error".

    The functions `nll`, `brier` and `error` are the means of these losses over examples.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.

    Example:
        >>> losses(jnp.log(jnp.full((3, 2), 0.5)), jnp.array([0, 1, 1]))["brier"]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    # In uint8, one_hot would confuse class 256 with class 0.
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    truth = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)
    return {
        "nll": zero_or_nan - jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0],
        "brier": zero_or_nan + jnp.sum((jnp.exp(log_probs) - truth) ** 2, -1),
        "error": zero_or_nan + (jnp.argmax(log_probs, -1) != labels).astype(log_probs.dtype),
    }


@jax.jit
def error(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    """The share of examples whose most probable class is not their label, in [0, 1].

    Of equally probable classes the first is the predicted class.

    Args:
        log_probs: `[batch, class]`.
        labels: `[batch]`, class indices.

    Example:
        >>> float(error(jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]])), jnp.array([0, 1])))
        0.5
    """
    return jnp.mean(losses(log_probs, labels)["error"])


@jax.jit
def nll(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The negative log-likelihood $-\frac{1}{N} \sum_n \log p_n(y_n)$, in nats.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.

    Example:
        >>> round(float(nll(jnp.log(jnp.full((3, 4), 0.25)), jnp.array([0, 1, 2]))), 4)
        1.3863
    """
    return jnp.mean(losses(log_probs, labels)["nll"])


@jax.jit
def brier(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The Brier score $\frac{1}{N} \sum_n \sum_c (p_n(c) - [y_n = c])^2$, in [0, 2].

    It sums over classes, as Brier defined it; some papers divide by the number of classes.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.

    Example:
        >>> float(brier(jnp.log(jnp.full((1, 2), 0.5)), jnp.array([0])))
        0.5
    """
    return jnp.mean(losses(log_probs, labels)["brier"])
