r"""Scores of regression, where an ensemble predicts an equal mixture of normal distributions.

Member $m$ predicts $\mathcal{N}(\mu_m(x), \sigma^2)$, with one scale $\sigma$ for all: the noise of
the targets. Lower is better, but for `interval_coverage`. A scale that is not positive gives NaN;
means and targets of other shapes are a `ValueError`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jdrop.annotations import Float
from jdrop.metrics.calibration import mean_over_halvings
from jdrop.metrics.diversity import Ambiguity

Means = Float[Array, "member batch"]
Targets = Float[Array, " batch"]


def _checked(means: Array, targets: Array) -> tuple[Array, Array]:
    if means.ndim != 2 or targets.shape != means.shape[1:]:
        raise ValueError(
            "means must be [member, batch], and targets [batch] of the same examples, got the "
            f"shapes {means.shape} and {targets.shape}; of one network it is `means[None]`."
        )
    dtype = jnp.promote_types(jnp.promote_types(means.dtype, targets.dtype), jnp.float32)
    return means.astype(dtype), targets.astype(dtype)


def _positive(scale: ArrayLike) -> Array:
    return jnp.where(jnp.asarray(scale) > 0, scale, jnp.nan)


@jax.jit
def squared_losses(means: Means, targets: Targets) -> Float[Array, " batch"]:
    """The squared error of the average prediction, for each example.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.

    Example:
        >>> squared_losses(jnp.array([[1.0], [3.0]]), jnp.array([1.0]))
        Array([1.], dtype=float32)
    """
    means, targets = _checked(means, targets)
    return (jnp.mean(means, 0) - targets) ** 2


@jax.jit
def rmse(means: Means, targets: Targets) -> Float[Array, ""]:
    """The root of the mean squared error of the average prediction, in the targets' unit.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.

    Example:
        >>> float(rmse(jnp.array([[1.0, 2.0], [3.0, 2.0]]), jnp.array([2.0, 4.0])))
        1.4142...
    """
    return jnp.sqrt(jnp.mean(squared_losses(means, targets)))


@jax.jit
def mixture_losses(means: Means, targets: Targets, scale: ArrayLike) -> Float[Array, " batch"]:
    r"""The negative log-likelihood of each target under the mixture, in nats.

    $-\log \frac{1}{M} \sum_m \mathcal{N}(y; \mu_m, \sigma^2)$

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.
        scale: $\sigma$, positive, in the targets' unit.

    Example:
        >>> mixture_losses(jnp.zeros((2, 1)), jnp.zeros(1), 1.0)
        Array([0.9189385], dtype=float32)

    Reference:
        Gal and Ghahramani 2016, arXiv:1506.02142, equation 8.
    """
    means, targets = _checked(means, targets)
    log_densities = jax.scipy.stats.norm.logpdf(targets[None], means, _positive(scale))
    return math.log(len(means)) - jax.nn.logsumexp(log_densities, 0)


def _mean_distance(distance: Array, scale: Array) -> Array:
    """The expected absolute value of a normal variable with this mean and scale."""
    ratio = distance / scale
    return distance * jax.scipy.special.erf(ratio / math.sqrt(2)) + (
        scale * math.sqrt(2 / math.pi) * jnp.exp(-(ratio**2) / 2)
    )


@jax.jit
def crps_losses(means: Means, targets: Targets, scale: ArrayLike) -> Float[Array, " batch"]:
    r"""The continuous ranked probability score of the mixture for each target, in its unit.

    $$\frac{1}{M} \sum_i A(y - \mu_i, \sigma)
    - \frac{1}{2 M^2} \sum_{ij} A(\mu_i - \mu_j, \sqrt 2 \sigma)$$

    where $A(\mu, \sigma)$ is the mean of $|z|$ for $z \sim \mathcal{N}(\mu, \sigma^2)$.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.
        scale: $\sigma$, positive, in the targets' unit.

    Example:
        >>> crps_losses(jnp.zeros((3, 1)), jnp.zeros(1), 1.0)
        Array([0.23369503], dtype=float32)

    Reference:
        Grimit et al. 2006, doi:10.1256/qj.05.235.
    """
    means, targets = _checked(means, targets)
    scale = _positive(scale)
    to_target = jnp.mean(_mean_distance(targets[None] - means, scale), 0)

    def from_member(member: Array) -> Array:
        return jnp.mean(_mean_distance(member[None] - means, math.sqrt(2) * scale), 0)

    return to_target - jnp.mean(jax.lax.map(from_member, means), 0) / 2


@jax.jit
def interval_coverage(
    means: Means, targets: Targets, scale: ArrayLike, level: ArrayLike = 0.95
) -> Float[Array, ""]:
    r"""The share of targets in the central interval of the mixture: where $F(y)$ is in its middle.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.
        scale: $\sigma$, positive, in the targets' unit.
        level: the probability of the interval, in (0, 1), else NaN; the coverage should be as
            large.

    Example:
        >>> float(interval_coverage(jnp.zeros((1, 2)), jnp.array([0.0, 3.0]), 1.0))
        0.5
    """
    means, targets = _checked(means, targets)
    below = jnp.mean(jax.scipy.stats.norm.cdf(targets[None], means, _positive(scale)), 0)
    coverage = jnp.mean(jnp.abs(below - 0.5) <= jnp.asarray(level) / 2)
    defined = (jnp.asarray(level) > 0) & (jnp.asarray(level) < 1) & ~jnp.isnan(below).any()
    return jnp.where(defined, coverage, jnp.nan)


@jax.jit
def fit_scale(means: Means, targets: Targets) -> Float[Array, ""]:
    r"""The scale $\sigma$ of greatest likelihood, for the mixture and all targets.

    Found by expectation maximisation, which starts at the root mean square of all residuals and
    never makes the likelihood smaller: of several maxima, which a handful of targets may have, it
    finds that of the largest scale. For one member it is its RMSE. 0 if every target is a mean.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`; not those that are scored.

    Example:
        >>> float(fit_scale(jnp.zeros((1, 2)), jnp.array([3.0, -3.0])))
        3.0
    """
    means, targets = _checked(means, targets)
    squares = (targets[None] - means) ** 2

    def improve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        variance, _, count = state
        of_member = jax.nn.softmax(-squares / (2 * variance), 0)
        new = jnp.mean(jnp.sum(of_member * squares, 0))
        return new, jnp.abs(new - variance) / variance, count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > 1e-6) & (state[2] < 500) & (state[0] > 0)

    start = jnp.mean(squares)
    state = (start, jnp.full_like(start, jnp.inf), jnp.zeros((), int))
    return jnp.sqrt(jax.lax.while_loop(unfinished, improve, state)[0])


@partial(jax.jit, static_argnames="num_repeats")
def calibrated_mixture_losses(
    key: Array, means: Means, targets: Targets, *, num_repeats: int = 5
) -> Float[Array, " batch"]:
    """The `mixture_losses` of each example, at a scale that was fitted without it.

    The examples are halved at random; each half is scored at the scale fitted on the other. The
    mean over `num_repeats` halvings, as in `jdrop.metrics.calibrated_losses`.

    Args:
        key: consumed; it says which examples go together. Use one key for all that is compared.
        means: `[member, batch]`, at least 2 examples.
        targets: `[batch]`.
        num_repeats: how many halvings, at least 1.

    Raises:
        ValueError: fewer than 2 examples, or than 1 repeat.

    Example:
        >>> means, targets = jnp.zeros((1, 2)), jnp.array([1.0, -1.0])
        >>> calibrated_mixture_losses(jax.random.key(0), means, targets)  # log(2 pi) / 2 + 1 / 2
        Array([1.4189385, 1.4189385], dtype=float32)
    """
    means, targets = _checked(means, targets)

    def score(fitted: Array, scored: Array) -> Array:
        scale = fit_scale(means[:, fitted], targets[fitted])
        return mixture_losses(means[:, scored], targets[scored], scale)

    return mean_over_halvings(key, score, len(targets), num_repeats)


@jax.jit
def squared_ambiguity(means: Means, targets: Targets) -> Ambiguity:
    r"""The squared error of the average as the members' mean less their variance.

    $(\bar\mu - y)^2 = \frac{1}{M} \sum_m (\mu_m - y)^2 - \frac{1}{M} \sum_m (\mu_m - \bar\mu)^2$,
    means over examples.

    Args:
        means: `[member, batch]`, at least 2 members.
        targets: `[batch]`.

    Raises:
        ValueError: fewer than 2 members.

    Example:
        >>> [float(x) for x in squared_ambiguity(jnp.array([[1.0], [3.0]]), jnp.array([0.0]))]
        [5.0, 1.0, 4.0]

    Reference:
        Krogh and Vedelsby 1995.
    """
    means, targets = _checked(means, targets)
    if len(means) < 2:
        raise ValueError(
            f"means must hold at least 2 members, got {len(means)}: one alone has no diversity."
        )
    return Ambiguity(
        members=jnp.mean((means - targets[None]) ** 2),
        diversity=jnp.mean((means - jnp.mean(means, 0, keepdims=True)) ** 2),
        pool=jnp.mean(squared_losses(means, targets)),
    )
