"""Do probabilities mean what they say? Calibration errors, and the temperature that mends them."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jdrop.annotations import Float
from jdrop.metrics.scores import Labels, LogProbs, checked, losses

Binning = Literal["equal width", "equal mass"]


def confidence_bins(confidence: Array, num_bins: int, binning: str) -> Array:
    """The number of the bin that each confidence falls into.

    Bins of equal width are open on the left and closed on the right, so that a confidence of
    exactly 1 is in the last one. Those of equal mass are the parts of `numpy.array_split` of the
    confidences in order.

    Args:
        confidence: `[batch]`, in [0, 1].
        num_bins: how many bins, at least 1.
        binning: "equal width" or "equal mass", of equally many examples.

    Returns:
        Integers `[batch]` from 0, rising with the confidence.

    Raises:
        ValueError: fewer than 1 bin; an unknown binning.

    Example:
        >>> confidence = jnp.array([0.7, 0.5, 1.0])
        >>> confidence_bins(confidence, 2, "equal width")
        Array([1, 0, 1], dtype=int32)
        >>> confidence_bins(confidence, 2, "equal mass")
        Array([0, 0, 1], dtype=int32)
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if binning == "equal width":
        inner_edges = jnp.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)[1:-1]
        return jnp.searchsorted(inner_edges, confidence, side="left")
    if binning != "equal mass":
        raise ValueError(f"binning must be 'equal width' or 'equal mass', got {binning!r}.")
    size, num_larger = divmod(len(confidence), num_bins)
    rank = jnp.arange(len(confidence))
    # Bins of one example more come first, and end where the second term becomes the larger.
    bin_of_rank = jnp.maximum(rank // (size + 1), (rank - num_larger) // max(size, 1))
    order = jnp.argsort(confidence, stable=True)
    return jnp.zeros_like(rank).at[order].set(bin_of_rank)


def _confidence_and_right(log_probs: Array, labels: Array) -> tuple[Array, Array]:
    confidence = jnp.exp(jnp.max(log_probs, -1))
    return confidence, (jnp.argmax(log_probs, -1) == labels).astype(confidence.dtype)


def _bin_means(bins: Array, values: Array, num_bins: int) -> Array:
    """Sums of the values in each bin, over the number of all examples.

    As a mean and not as a sum built up in order, which would lose digits.
    """
    in_bin = bins[:, None] == jnp.arange(num_bins)[None]
    return jnp.mean(jnp.where(in_bin, values[:, None], 0), 0)


@partial(jax.jit, static_argnames=("num_bins", "binning"))
def ece(
    log_probs: LogProbs, labels: Labels, *, num_bins: int = 15, binning: Binning = "equal width"
) -> Float[Array, ""]:
    r"""The expected calibration error of the top class, in [0, 1].

    $$\sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|$$

    over bins of confidence, see `confidence_bins`. It depends on the number of bins and on how
    spread the confidences are: show it, do not rank by it.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.
        num_bins: how many bins, at least 1.
        binning: "equal width" or "equal mass", of equally many examples.

    Raises:
        ValueError: fewer than 1 bin; an unknown binning.

    Example:
        >>> round(float(ece(jnp.log(jnp.array([[0.75, 0.25]] * 4)), jnp.array([0, 0, 0, 1]))), 4)
        0.0

    Reference:
        Guo et al. 2017, arXiv:1706.04599, with 15 bins.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, right = _confidence_and_right(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, binning)
    return zero_or_nan + jnp.sum(jnp.abs(_bin_means(bins, right - confidence, num_bins)))


@partial(jax.jit, static_argnames="num_bins")
def debiased_ece(log_probs: LogProbs, labels: Labels, *, num_bins: int = 15) -> Float[Array, ""]:
    r"""The root mean square calibration error of the top class, less what chance adds to it.

    $$\sqrt{\max\left(0, \sum_b \frac{n_b}{N} \left[ (\mathrm{acc}_b - \mathrm{conf}_b)^2
    - \frac{\mathrm{acc}_b (1 - \mathrm{acc}_b)}{n_b - 1} \right]\right)}$$

    over bins of equal mass; a bin of one example is not corrected. A perfectly calibrated network
    has a plug-in error above 0 in every finite sample, and this one around 0.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.
        num_bins: how many bins, at least 1.

    Example:
        >>> log_probs, labels = jnp.log(jnp.array([[0.9, 0.1]] * 4)), jnp.array([0, 0, 1, 1])
        >>> round(float(debiased_ece(log_probs, labels, num_bins=1)), 4)  # (.4^2 - .25 / 3)^.5
        0.2769

    Reference:
        Kumar, Liang and Ma 2019, arXiv:1909.10155.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, right = _confidence_and_right(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, "equal mass")
    share = _bin_means(bins, jnp.ones_like(right), num_bins)
    some = jnp.where(share > 0, share, 1)
    accuracy = _bin_means(bins, right, num_bins) / some
    gap = _bin_means(bins, right - confidence, num_bins) / some
    # Of one example the accuracy is 0 or 1, which leaves nothing to correct.
    chance = accuracy * (1 - accuracy) / jnp.maximum(share * len(labels) - 1, 1)
    return zero_or_nan + jnp.sqrt(jnp.maximum(jnp.sum(share * (gap**2 - chance)), 0))


@partial(jax.jit, static_argnames=("num_bins", "binning"))
def reliability_curve(
    log_probs: LogProbs, labels: Labels, *, num_bins: int = 15, binning: Binning = "equal width"
) -> tuple[Float[Array, " bins"], Float[Array, " bins"], Float[Array, " bins"]]:
    """How often the top class is right, against how probable it was said to be.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, integers from 0.
        num_bins: how many bins, at least 1.
        binning: "equal width" or "equal mass".

    Returns:
        For each bin the mean confidence and the accuracy, NaN where it is empty, and the share of
        the examples that it holds.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.75, 0.25]] * 4))
        >>> confidence, accuracy, share = reliability_curve(
        ...     log_probs, jnp.array([0, 0, 0, 1]), num_bins=2
        ... )
        >>> accuracy
        Array([ nan, 0.75], dtype=float32)
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, right = _confidence_and_right(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, binning)
    share = _bin_means(bins, jnp.ones_like(right), num_bins)
    some = jnp.where(share > 0, share, jnp.nan)
    return (
        zero_or_nan + _bin_means(bins, confidence, num_bins) / some,
        zero_or_nan + _bin_means(bins, right, num_bins) / some,
        zero_or_nan + share,
    )


@jax.jit
def fit_temperature(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The temperature $T$ that makes the NLL of $\mathrm{softmax}(\log p / T)$ smallest.

    The NLL is convex in $1 / T$; its minimum is found by Newton's method, kept within a bracket,
    to a part in 10,000 at least. $T$ lies in [1/20, 20]: at the lower end where every example is
    classified rightly, since then no $T$ is small enough, and at the upper end where the
    predictions are no better than chance.

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
    log_probs, zero_or_nan = checked(log_probs, labels)
    return zero_or_nan + _fit(log_probs, labels, jnp.ones((), log_probs.dtype))


def _fit(log_probs: Array, labels: Array, start: Array) -> Array:
    """The temperature of least NLL, from a first guess: Newton's method in log(1 / T)."""
    of_label = jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]

    def improve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, at, last_step, count = state
        inverse = jnp.exp(at)
        probs = jax.nn.softmax(inverse * log_probs)
        expected = jnp.sum(jnp.where(probs > 0, probs * log_probs, 0), -1)
        squares = jnp.sum(jnp.where(probs > 0, probs * log_probs**2, 0), -1)
        # Derivatives of the NLL with respect to 1 / T, and then to its logarithm.
        slope = jnp.mean(expected - of_label)
        first = inverse * slope
        second = first + inverse**2 * jnp.mean(squares - expected**2)
        low, high = jnp.where(slope <= 0, at, low), jnp.where(slope <= 0, high, at)
        newton = at - first / jnp.where(second > 0, second, 1)
        # Where a step is not half of the last one, Newton's method may creep or circle.
        usable = (second > 0) & (newton >= low) & (newton <= high)
        usable &= jnp.abs(newton - at) <= last_step / 2
        new = jnp.where(usable, newton, (low + high) / 2)
        new = jnp.where(jnp.isnan(slope), jnp.nan, new)
        return low, high, new, jnp.abs(new - at), count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[3] > 1e-4) & (state[4] < 60)

    end = jnp.log(jnp.asarray(20, log_probs.dtype))
    log_inverse = -jnp.log(start)
    state: tuple[Array, ...] = (-end, end, log_inverse, jnp.full_like(end, jnp.inf), jnp.array(0))
    return jnp.exp(-jax.lax.while_loop(unfinished, improve, state)[2])


@partial(jax.jit, static_argnames="num_repeats")
def calibrated_losses(
    key: Array, log_probs: LogProbs, labels: Labels, *, num_repeats: int = 5
) -> Float[Array, " batch"]:
    """The NLL of each example after calibration by a temperature that was fitted without it.

    The examples are halved at random; each half is scored at the temperature fitted on the other.
    The mean over `num_repeats` halvings. Of an odd number of examples one half has one more.

    Args:
        key: consumed; it says which examples go together. Use one key for all that is compared.
        log_probs: `[batch, class]`, at least 2 examples.
        labels: `[batch]`, integers from 0.
        num_repeats: how many halvings, at least 1.

    Raises:
        ValueError: fewer than 2 examples, or than 1 repeat.

    Example:
        >>> log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (100, 3)))
        >>> calibrated_losses(jax.random.key(1), log_probs, jnp.arange(100) % 3).shape
        (100,)

    Reference:
        Ashukha et al. 2020, arXiv:2002.06470, section 4.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    start = _fit(log_probs, labels, jnp.ones((), log_probs.dtype))

    def score(fitted: Array, scored: Array) -> Array:
        temperature = _fit(log_probs[fitted], labels[fitted], start)
        scaled = jax.nn.log_softmax(log_probs[scored] / temperature)
        return losses(scaled, labels[scored])["nll"]

    return zero_or_nan + mean_over_halvings(key, score, len(labels), num_repeats)


def mean_over_halvings(
    key: Array, score: Callable[[Array, Array], Array], num_examples: int, num_repeats: int
) -> Float[Array, " batch"]:
    """Losses of all examples, each scored by what was fitted on the half that it is not in.

    Args:
        key: consumed; it says which examples go together.
        score: from the indices of the examples to fit to, and of those to score, the losses of
            the latter.
        num_examples: how many there are, at least 2.
        num_repeats: over how many random halvings to average, at least 1.

    Raises:
        ValueError: fewer than 2 examples, or than 1 repeat.

    Example:
        >>> x = jnp.array([1.0, 2.0])
        >>> mean_over_halvings(jax.random.key(0), lambda fitted, scored: x[fitted], 2, 1)
        Array([2., 1.], dtype=float32)
    """
    if num_examples < 2:
        raise ValueError(f"There must be at least 2 examples to halve, got {num_examples}.")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}.")

    def halving(key: Array) -> Array:
        order = jax.random.permutation(key, num_examples)
        first, second = order[: num_examples // 2], order[num_examples // 2 :]
        found = jnp.concatenate([score(second, first), score(first, second)])
        return jnp.zeros_like(found).at[order].set(found)

    return jnp.mean(jax.lax.map(halving, jax.random.split(key, num_repeats)), 0)


@partial(jax.jit, static_argnames="num_repeats")
def calibrated_nll(
    key: Array, log_probs: LogProbs, labels: Labels, *, num_repeats: int = 5
) -> Float[Array, ""]:
    """The mean of `calibrated_losses`: the NLL at temperatures fitted on other examples.

    Args:
        key: consumed; use one key for all that is compared.
        log_probs: `[batch, class]`, at least 2 examples.
        labels: `[batch]`, integers from 0.
        num_repeats: how many halvings, at least 1.

    Raises:
        ValueError: fewer than 2 examples, or than 1 repeat.

    Example:
        >>> log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (100, 3)))
        >>> bool(calibrated_nll(jax.random.key(1), log_probs, jnp.arange(100) % 3) < 1.2)
        True

    Reference:
        Ashukha et al. 2020, arXiv:2002.06470, section 4.
    """
    return jnp.mean(calibrated_losses(key, log_probs, labels, num_repeats=num_repeats))
