"""How the members of a pool differ, networks or masks, and how much the pool gains from it."""

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
    """The loss of a pool, split by `pool = members - diversity`.

    Attributes:
        members: the mean loss of the members.
        diversity: how much less the pool loses than its members do on average.
        pool: the loss of the pool.
    """

    members: Array
    diversity: Array
    pool: Array


def _at_least_two(log_probs: Array) -> tuple[Array, Array]:
    """Checks that there are 2 members, and returns their `log_probs` and a scalar.

    The scalar is 0, or NaN if any prediction is NaN. Scores add it.
    """
    log_probs = checked_members(log_probs)
    if len(log_probs) < 2:
        raise ValueError(
            f"log_probs must hold at least 2 members, got {len(log_probs)}: a single member has "
            "no diversity."
        )
    # Needed because argmax names a class even if the probabilities are NaN.
    valid = ~jnp.isnan(log_probs).any()
    return log_probs, jnp.where(valid, 0, math.nan).astype(log_probs.dtype)


@jax.jit
def disagreement(log_probs: MemberLogProbs) -> Float[Array, ""]:
    """The share of examples on which two members predict different classes; the mean over pairs.

    Args:
        log_probs: `[member, batch, class]`.

    Raises:
        ValueError: if there are fewer than 2 members.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.9, 0.1], [0.9, 0.1]], [[0.8, 0.2], [0.2, 0.8]]]))
        >>> float(disagreement(log_probs))
        0.5
    """
    log_probs, zero_or_nan = _at_least_two(log_probs)
    num_members = len(log_probs)
    votes = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1]).sum(0)
    # The share of ordered pairs of different members that agree.
    agree = jnp.sum(votes * (votes - 1), -1) / (num_members * (num_members - 1))
    return zero_or_nan + 1 - jnp.mean(agree)


@jax.jit
def pairwise_kl(log_probs: MemberLogProbs) -> Float[Array, ""]:
    r"""The mean divergence $\mathrm{KL}(p_i \| p_j)$ over ordered pairs of members, in nats.

    It is infinite if a member gives probability 0 to a class and another member does not.

    Args:
        log_probs: `[member, batch, class]`, normalised.

    Raises:
        ValueError: if there are fewer than 2 members.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.5, 0.5]], [[0.75, 0.25]]]))
        >>> round(float(pairwise_kl(log_probs)), 4)  # (0.1438 + 0.1308) / 2
        0.1373
    """
    log_probs, _ = _at_least_two(log_probs)
    num_members = len(log_probs)

    def from_member(member: Array) -> Array:
        return jnp.sum(jnp.mean(divergence(member[None], log_probs), -1))

    total = jnp.sum(jax.lax.map(from_member, log_probs))
    return total / (num_members * (num_members - 1))


@jax.jit
def q_statistic(log_probs: MemberLogProbs, labels: Labels) -> Float[Array, ""]:
    r"""Yule's Q of two members, $\frac{ad - bc}{ad + bc}$, in [-1, 1]; the mean over pairs.

    $a$ counts the examples that both members classify correctly, $b$ only the first member, $c$
    only the second, and $d$ neither. Q is 0 if the members are correct independently, and 1 if a
    member is correct only where the other is too. A pair whose Q is 0/0 is left out, as when a
    member is always correct. If all pairs are left out, the score is NaN.

    Args:
        log_probs: `[member, batch, class]`.
        labels: `[batch]`, class indices.

    Raises:
        ValueError: if there are fewer than 2 members.

    Example:
        >>> correct_on_0_1 = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]
        >>> correct_on_0_2 = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]
        >>> log_probs = jnp.log(jnp.array([correct_on_0_1, correct_on_0_2]))
        >>> float(q_statistic(log_probs, jnp.zeros(4, int)))
        0.0

    Reference:
        Kuncheva and Whitaker 2003, doi:10.1023/A:1022859003006.
    """
    log_probs, zero_or_nan = _at_least_two(log_probs)
    zero_or_nan += checked(log_probs[0], labels)[1]
    correct = (jnp.argmax(log_probs, -1) == labels[None]).astype(log_probs.dtype)
    num_examples = correct.shape[1]
    # These counts are exact in float32 up to 16 million examples.
    both = correct @ correct.T
    neither = (1 - correct) @ (1 - correct).T
    only_first = correct @ (1 - correct).T
    # Products of shares keep the digits that products of counts would lose.
    agree = (both / num_examples) * (neither / num_examples)
    differ = (only_first / num_examples) * (only_first.T / num_examples)
    defined = (agree + differ > 0) & ~jnp.eye(len(correct), dtype=bool)
    q = (agree - differ) / jnp.where(defined, agree + differ, 1)
    return zero_or_nan + jnp.sum(jnp.where(defined, q, 0)) / jnp.sum(defined)


AmbiguityMethod = Literal["arithmetic NLL", "geometric NLL", "arithmetic Brier"]


@partial(jax.jit, static_argnames="method")
def ambiguity(log_probs: MemberLogProbs, labels: Labels, method: AmbiguityMethod) -> Ambiguity:
    r"""Splits the loss of a pool into the mean loss of its members less their diversity.

    | method | diversity |
    |---|---|
    | arithmetic NLL | $\log \bar p(y) - \frac{1}{M} \sum_m \log p_m(y)$, depends on the labels |
    | geometric NLL | $\frac{1}{M} \sum_m \mathrm{KL}(g \| p_m)$ |
    | arithmetic Brier | $\frac{1}{M} \sum_m \| p_m - \bar p \|^2$ |

    with $\bar p = \frac{1}{M} \sum_m p_m$ and $g \propto \exp \frac{1}{M} \sum_m \log p_m$.

    Each diversity is a mean over examples and at least 0. Members are networks, or the masks of a
    single network, so the diversity of dropout can be compared with that of an ensemble.

    Args:
        log_probs: `[member, batch, class]`, normalised.
        labels: `[batch]`, class indices.
        method: how members are pooled, and the loss.

    Raises:
        ValueError: if there are fewer than 2 members, or the method is unknown.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))
        >>> [round(float(x), 3) for x in ambiguity(log_probs, jnp.array([0]), "arithmetic NLL")]
        [0.399, 0.043, 0.357]

    Reference:
        Krogh and Vedelsby 1995; Heskes 1998, doi:10.1162/089976698300017232.
    """
    log_probs, zero_or_nan = _at_least_two(log_probs)
    zero_or_nan += checked(log_probs[0], labels)[1]
    # Each term has its own formula, so the tests can check that the terms add up.
    arithmetic = jax.nn.logsumexp(log_probs, 0) - jnp.log(len(log_probs))
    score = "brier" if method == "arithmetic Brier" else "nll"
    members = jnp.mean(jax.vmap(lambda member: losses(member, labels)[score])(log_probs))
    if method == "arithmetic NLL":
        member_values = jnp.take_along_axis(log_probs, labels[None, :, None], -1)[..., 0]
        pool_values = jnp.take_along_axis(arithmetic, labels[:, None], -1)[:, 0]
        diversity = zero_or_nan + jnp.mean(pool_values[None] - member_values)
        return Ambiguity(members, diversity, jnp.mean(losses(arithmetic, labels)["nll"]))
    if method == "geometric NLL":
        geometric = jax.nn.log_softmax(jnp.mean(log_probs, 0))
        diversity = zero_or_nan + jnp.mean(divergence(geometric[None], log_probs))
        return Ambiguity(members, diversity, jnp.mean(losses(geometric, labels)["nll"]))
    if method == "arithmetic Brier":
        spread = jnp.exp(log_probs) - jnp.exp(arithmetic)[None]
        diversity = zero_or_nan + jnp.mean(jnp.sum(spread**2, -1))
        return Ambiguity(members, diversity, jnp.mean(losses(arithmetic, labels)["brier"]))
    raise ValueError(
        f"method must be 'arithmetic NLL', 'geometric NLL' or 'arithmetic Brier', got {method!r}."
    )
