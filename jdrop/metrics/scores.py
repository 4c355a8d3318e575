"""The scores that are means over examples: error, NLL and Brier."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float, Integer

LogProbs = Float[Array, "batch classes"]
Labels = Integer[Array, " batch"]


def checked(log_probs: Array, labels: Array) -> tuple[Array, Array]:
    """`log_probs` in the dtype to compute in, and 0, or NaN if a label or prediction is none."""
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
    are_numbers = is_class.all() & ~jnp.isnan(log_probs).any()
    return log_probs, jnp.where(are_numbers, 0, math.nan).astype(log_probs.dtype)


def checked_members(log_probs: Array) -> Array:
    """`log_probs` of several members in the dtype to compute in."""
    if log_probs.ndim != 3:
        raise ValueError(
            f"log_probs must be [member, batch, class], got the shape {log_probs.shape}; of one "
            "network it is `log_probs[None]`."
        )
    return log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))


@jax.jit
def losses(log_probs: LogProbs, labels: Labels) -> dict[str, Float[Array, " batch"]]:
    """What each example adds to `nll`, `brier` and `error`, by these names: they are its means.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.

    Example:
        >>> losses(jnp.log(jnp.full((3, 2), 0.5)), jnp.array([0, 1, 1]))["brier"]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    # A dtype that cannot hold the number of classes would take class 256 for class 0.
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

    Among equally probable classes the first counts as predicted.

    Args:
        log_probs: `[batch, class]`.
        labels: `[batch]`, integers from 0.

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
        labels: `[batch]`, integers from 0.

    Example:
        >>> round(float(nll(jnp.log(jnp.full((3, 4), 0.25)), jnp.array([0, 1, 2]))), 4)
        1.3863
    """
    return jnp.mean(losses(log_probs, labels)["nll"])


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
    return jnp.mean(losses(log_probs, labels)["brier"])
