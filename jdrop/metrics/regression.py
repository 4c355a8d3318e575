r"""Scores of regression, where an ensemble predicts an equal mixture of normal distributions.

Member $m$ predicts $\mathcal{N}(\mu_m(x), \sigma^2)$. All members share the scale $\sigma$, the
noise of the targets. Lower scores are better, except `interval_coverage`. A scale that is not
positive gives NaN. All functions raise a `ValueError` unless means are `[member, batch]` and
targets `[batch]`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jdrop.annotations import Float
from jdrop.metrics.calibration import mean_over_splits
from jdrop.metrics.diversity import Ambiguity

Means = Float[Array, "member batch"]
Targets = Float[Array, " batch"]


def _checked(means: Array, targets: Array) -> tuple[Array, Array]:
    if means.ndim != 2 or targets.shape != means.shape[1:]:
        raise ValueError(
            "means must be [member, batch], and targets [batch] of the same examples, got the "
            f"shapes {means.shape} and {targets.shape}; for a single network pass `means[None]`."
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


def _mean_absolute_value(mean: Array, scale: Array) -> Array:
    """The mean of |z| for a normal z with this mean and scale."""
    ratio = mean / scale
    return mean * jax.scipy.special.erf(ratio / math.sqrt(2)) + (
        scale * math.sqrt(2 / math.pi) * jnp.exp(-(ratio**2) / 2)
    )


@jax.jit
def crps_losses(means: Means, targets: Targets, scale: ArrayLike) -> Float[Array, " batch"]:
    r"""The continuous ranked probability score of each target, in the targets' unit.

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
    to_target = jnp.mean(_mean_absolute_value(targets[None] - means, scale), 0)

    def from_member(member: Array) -> Array:
        return jnp.mean(_mean_absolute_value(member[None] - means, math.sqrt(2) * scale), 0)

    return to_target - jnp.mean(jax.lax.map(from_member, means), 0) / 2


@jax.jit
def interval_coverage(
    means: Means, targets: Targets, scale: ArrayLike, level: ArrayLike = 0.95
) -> Float[Array, ""]:
    r"""The share of targets in the mixture's central interval, $|F(y) - 1/2| \le$ `level` / 2.

    $F$ is the distribution function of the mixture.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`.
        scale: $\sigma$, positive, in the targets' unit.
        level: the probability of the interval, in (0, 1); the coverage is NaN for other levels.
            A calibrated mixture has a coverage near its level.

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
    r"""The scale $\sigma$ that maximises the likelihood of all targets under the mixture.

    Expectation maximisation starts at the root mean square of all residuals, and no step lowers
    the likelihood. A few targets may give several maxima; the one with the largest scale is
    returned. For a single member the scale is the RMSE. It can be 0 if each target equals a mean.

    Args:
        means: `[member, batch]`.
        targets: `[batch]`, of other examples than those scored later.

    Example:
        >>> float(fit_scale(jnp.zeros((1, 2)), jnp.array([3.0, -3.0])))
        3.0
    """
    means, targets = _checked(means, targets)
    squares = (targets[None] - means) ** 2

    def improve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        variance, _, count = state
        responsibilities = jax.nn.softmax(-squares / (2 * variance), 0)
        new = jnp.mean(jnp.sum(responsibilities * squares, 0))
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
    """The `mixture_losses` of each example, at a scale fitted without this example.

    A random two-fold split fits the scale on each half and scores the other half. The result is the
    mean over `num_repeats` splits, as in `jdrop.metrics.calibrated_losses`.

    Args:
        key: consumed; it decides the splits. Use the same key for everything you compare.
        means: `[member, batch]`, at least 2 examples.
        targets: `[batch]`.
        num_repeats: how many random splits, at least 1.

    Raises:
        ValueError: if there are fewer than 2 examples or 1 repeat.

    Example:
        >>> means, targets = jnp.zeros((1, 2)), jnp.array([1.0, -1.0])
        >>> calibrated_mixture_losses(jax.random.key(0), means, targets)  # log(2 pi) / 2 + 1 / 2
        Array([1.4189385, 1.4189385], dtype=float32)
    """
    means, targets = _checked(means, targets)

    def score(fitted: Array, scored: Array) -> Array:
        scale = fit_scale(means[:, fitted], targets[fitted])
        return mixture_losses(means[:, scored], targets[scored], scale)

    return mean_over_splits(key, score, len(targets), num_repeats)


@jax.jit
def squared_ambiguity(means: Means, targets: Targets) -> Ambiguity:
    r"""Splits the average's squared error into the members' mean squared error less their variance.

    $$(\bar\mu - y)^2 = \frac{1}{M} \sum_m (\mu_m - y)^2 - \frac{1}{M} \sum_m (\mu_m - \bar\mu)^2$$

    Each term is a mean over examples.

    Args:
        means: `[member, batch]`, at least 2 members.
        targets: `[batch]`.

    Raises:
        ValueError: if there are fewer than 2 members.

    Example:
        >>> [float(x) for x in squared_ambiguity(jnp.array([[1.0], [3.0]]), jnp.array([0.0]))]
        [5.0, 1.0, 4.0]

    Reference:
        Krogh and Vedelsby 1995.
    """
    means, targets = _checked(means, targets)
    if len(means) < 2:
        raise ValueError(
            f"means must hold at least 2 members, got {len(means)}: a single member has no "
            "diversity."
        )
    return Ambiguity(
        members=jnp.mean((means - targets[None]) ** 2),
        diversity=jnp.mean((means - jnp.mean(means, 0, keepdims=True)) ** 2),
        pool=jnp.mean(squared_losses(means, targets)),
    )
