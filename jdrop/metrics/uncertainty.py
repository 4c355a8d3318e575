"""The uncertainty of predictions, and its uses: out-of-distribution detection and selection."""

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float
from jdrop.metrics.scores import Labels, LogProbs, checked, checked_members


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
    terms = jnp.where(log_probs == -jnp.inf, 0, -jnp.exp(log_probs) * log_probs)
    return jnp.sum(terms, -1)


@jax.jit
def mutual_information(
    log_probs: Float[Array, "member batch classes"],
) -> Float[Array, " batch"]:
    r"""The mutual information of the class and the member, for each example, in nats.

    $$H(\bar p) - \frac{1}{M} \sum_m H(p_m) = \frac{1}{M} \sum_m \mathrm{KL}(p_m \| \bar p)$$

    with the arithmetic mean $\bar p$. It lies in $[0, \log M]$, and is 0 if all members agree. If
    the members are draws from a posterior over networks, it is the epistemic uncertainty: the
    entropy that knowing the network would remove.

    Args:
        log_probs: `[member, batch, class]`, normalised. Members are networks, or the masks of a
            single network.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> mutual_information(log_probs)
        Array([0.6931472], dtype=float32)

    Reference:
        Houlsby et al. 2011, arXiv:1112.5745.
    """
    log_probs = checked_members(log_probs)
    average = jax.nn.logsumexp(log_probs, 0) - jnp.log(len(log_probs))
    # Rounding can make the divergence of equal members negative.
    return jnp.maximum(jnp.mean(divergence(log_probs, average[None]), 0), 0)


def divergence(log_probs: Array, others: Array) -> Array:
    """Kullback-Leibler divergence of `others` from `log_probs`, over the last axis.

    Classes with probability 0 in `log_probs` add nothing. The divergence is infinite if `others`
    give probability 0 to a class of any probability above 0, however small.
    """
    ratio = jnp.where(log_probs == -jnp.inf, 0, log_probs - others)
    terms = jnp.where(ratio == jnp.inf, jnp.inf, jnp.exp(log_probs) * ratio)
    return jnp.sum(terms, -1)


@jax.jit
def auroc(negatives: Float[Array, " a"], positives: Float[Array, " b"]) -> Float[Array, ""]:
    r"""The probability that a positive scores higher than a negative; a tie counts one half.

    This is the area under the receiver operating characteristic. For out-of-distribution detection
    the score is the entropy, and the positives are the out-of-distribution inputs.

    It is NaN if any score is NaN.

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
    # `sort` puts NaN last, so NaN would count as the largest score.
    defined = ~(jnp.isnan(negatives).any() | jnp.isnan(positives).any())
    return jnp.where(defined, jnp.mean((below + not_above) / (2 * len(negatives))), jnp.nan)


@jax.jit
def risk_coverage(log_probs: LogProbs, labels: Labels) -> Float[Array, " batch"]:
    r"""The error of the `k` most confident predictions, for `k` from 1 to the number of examples.

    Its mean is the AURC of Geifman et al. Examples of equal confidence keep their order.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]))
        >>> [round(float(r), 3) for r in risk_coverage(log_probs, jnp.array([0, 1, 1]))]
        [0.0, 0.0, 0.333]

    Reference:
        Geifman, Uziel and El-Yaniv 2018, arXiv:1805.08206.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    wrong = jnp.argmax(log_probs, -1) != labels
    order = jnp.argsort(-jnp.max(log_probs, -1), stable=True)
    errors = jnp.cumsum(wrong[order])
    return zero_or_nan + errors / jnp.arange(1, len(labels) + 1)
