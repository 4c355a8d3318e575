"""How members of an average differ, be they networks or masks, and what that is worth."""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float
from jdrop.metrics.scores import Labels, checked, checked_members, losses
from jdrop.metrics.uncertainty import divergence

MemberLogProbs = Float[Array, "member batch classes"]


class Ambiguity(NamedTuple):
    """Why an average does better than its members: `members - diversity = pool`.

    Attributes:
        members: the mean loss of the members.
        diversity: what the average gains.
        pool: the loss of the average.
    """

    members: Array
    diversity: Array
    pool: Array


def _several(log_probs: Array) -> tuple[Array, Array]:
    """`log_probs` in the dtype to compute in, and 0, or NaN if a prediction of a member is."""
    log_probs = checked_members(log_probs)
    if len(log_probs) < 2:
        raise ValueError(
            f"log_probs must hold at least 2 members, got {len(log_probs)}: one alone has no "
            "diversity."
        )
    # The most probable of classes would be one even where none is known.
    is_known = ~jnp.isnan(log_probs).any()
    return log_probs, jnp.where(is_known, 0, math.nan).astype(log_probs.dtype)


@jax.jit
def disagreement(log_probs: MemberLogProbs) -> Float[Array, ""]:
    """The share of examples on which two members predict different classes, mean over pairs.

    Args:
        log_probs: `[member, batch, class]`.

    Raises:
        ValueError: fewer than 2 members.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.9, 0.1], [0.9, 0.1]], [[0.8, 0.2], [0.2, 0.8]]]))
        >>> float(disagreement(log_probs))
        0.5
    """
    log_probs, zero_or_nan = _several(log_probs)
    num_members = len(log_probs)
    votes = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1]).sum(0)
    # Of all ordered pairs those that agree, members with themselves left out.
    agree = jnp.sum(votes * (votes - 1), -1) / (num_members * (num_members - 1))
    return zero_or_nan + 1 - jnp.mean(agree)


@jax.jit
def pairwise_kl(log_probs: MemberLogProbs) -> Float[Array, ""]:
    r"""The divergence $\mathrm{KL}(p_i \| p_j)$ of two members, mean over ordered pairs, in nats.

    Infinite where one member gives a class probability 0 that another does not.

    Args:
        log_probs: `[member, batch, class]`, normalised.

    Raises:
        ValueError: fewer than 2 members.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.5, 0.5]], [[0.75, 0.25]]]))
        >>> round(float(pairwise_kl(log_probs)), 4)  # (0.1438 + 0.1308) / 2
        0.1373
    """
    log_probs, _ = _several(log_probs)
    num_members = len(log_probs)

    def from_member(member: Array) -> Array:
        return jnp.sum(jnp.mean(divergence(member[None], log_probs), -1))

    total = jnp.sum(jax.lax.map(from_member, log_probs))
    return total / (num_members * (num_members - 1))


@jax.jit
def q_statistic(log_probs: MemberLogProbs, labels: Labels) -> Float[Array, ""]:
    r"""Yule's Q of being right, $\frac{ad - bc}{ad + bc}$, mean over pairs, in [-1, 1].

    Of two members $a$ is the number of examples that both get right, $d$ that neither does, $b$
    and $c$ that one does. 0 where they are right independently, 1 where one is never right alone.
    A pair for which it is 0/0, as where one is always right, does not count; NaN if none does.

    Args:
        log_probs: `[member, batch, class]`.
        labels: `[batch]`, integers from 0.

    Raises:
        ValueError: fewer than 2 members.

    Example:
        >>> right_first = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]
        >>> right_last = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]
        >>> log_probs = jnp.log(jnp.array([right_first, right_last]))
        >>> float(q_statistic(log_probs, jnp.zeros(4, int)))
        0.0

    Reference:
        Kuncheva and Whitaker 2003, doi:10.1023/A:1022859003006.
    """
    log_probs, zero_or_nan = _several(log_probs)
    zero_or_nan += checked(log_probs[0], labels)[1]
    right = (jnp.argmax(log_probs, -1) == labels[None]).astype(log_probs.dtype)
    # Counts, exact in float32 up to 16 million examples.
    both = right @ right.T
    neither = (1 - right) @ (1 - right).T
    alone = right @ (1 - right).T
    # In shares, since products of counts would lose digits.
    agree = (both / right.shape[1]) * (neither / right.shape[1])
    differ = (alone / right.shape[1]) * (alone.T / right.shape[1])
    counts = (agree + differ > 0) & ~jnp.eye(len(right), dtype=bool)
    q = (agree - differ) / jnp.where(counts, agree + differ, 1)
    return zero_or_nan + jnp.sum(jnp.where(counts, q, 0)) / jnp.sum(counts)


AmbiguityKind = Literal["arithmetic NLL", "geometric NLL", "arithmetic Brier"]


@partial(jax.jit, static_argnames="kind")
def ambiguity(log_probs: MemberLogProbs, labels: Labels, kind: AmbiguityKind) -> Ambiguity:
    r"""The loss of a pool as its members' mean loss less their diversity.

    | kind | diversity |
    |---|---|
    | arithmetic NLL | $\log \bar p(y) - \frac{1}{M} \sum_m \log p_m(y)$, depends on the labels |
    | geometric NLL | $\frac{1}{M} \sum_m \mathrm{KL}(g \| p_m)$ |
    | arithmetic Brier | $\frac{1}{M} \sum_m \| p_m - \bar p \|^2$ |

    with $\bar p = \frac{1}{M} \sum_m p_m$ and $g \propto \exp \frac{1}{M} \sum_m \log p_m$.

    Each is a mean over examples and at least 0. Masks of one network and networks of several seeds
    can be set side by side.

    Args:
        log_probs: `[member, batch, class]`, normalised.
        labels: `[batch]`, integers from 0.
        kind: the pool and the loss.

    Raises:
        ValueError: fewer than 2 members; an unknown kind.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))
        >>> [round(float(x), 3) for x in ambiguity(log_probs, jnp.array([0]), "arithmetic NLL")]
        [0.399, 0.043, 0.357]

    Reference:
        Krogh and Vedelsby 1995; Heskes 1998, doi:10.1162/089976698300017232.
    """
    log_probs, zero_or_nan = _several(log_probs)
    zero_or_nan += checked(log_probs[0], labels)[1]
    # Closed formulas of each part, not differences of the others: that they add up is a test.
    arithmetic = jax.nn.logsumexp(log_probs, 0) - jnp.log(len(log_probs))
    score = "brier" if kind == "arithmetic Brier" else "nll"
    members = jnp.mean(jax.vmap(lambda member: losses(member, labels)[score])(log_probs))
    if kind == "arithmetic NLL":
        of_label = jnp.take_along_axis(log_probs, labels[None, :, None], -1)[..., 0]
        average = jnp.take_along_axis(arithmetic, labels[:, None], -1)[:, 0]
        diversity = zero_or_nan + jnp.mean(average[None] - of_label)
        return Ambiguity(members, diversity, jnp.mean(losses(arithmetic, labels)["nll"]))
    if kind == "geometric NLL":
        geometric = jax.nn.log_softmax(jnp.mean(log_probs, 0))
        diversity = zero_or_nan + jnp.mean(divergence(geometric[None], log_probs))
        return Ambiguity(members, diversity, jnp.mean(losses(geometric, labels)["nll"]))
    if kind == "arithmetic Brier":
        spread = jnp.exp(log_probs) - jnp.exp(arithmetic)[None]
        diversity = zero_or_nan + jnp.mean(jnp.sum(spread**2, -1))
        return Ambiguity(members, diversity, jnp.mean(losses(arithmetic, labels)["brier"]))
    raise ValueError(
        f"kind must be 'arithmetic NLL', 'geometric NLL' or 'arithmetic Brier', got {kind!r}."
    )
