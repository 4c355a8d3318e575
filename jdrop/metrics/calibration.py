"""Calibration: how far confidence is from accuracy, and the temperature that reduces the gap."""

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
    """The index of the bin that holds each confidence.

    Bins of equal width are open on the left and closed on the right, so the last bin holds a
    confidence of exactly 1. Bins of equal mass are what `numpy.array_split` makes of the sorted
    confidences.

    Args:
        confidence: `[batch]`, in [0, 1].
        num_bins: how many bins, at least 1.
        binning: "equal width", or "equal mass": bins with equally many examples.

    Returns:
        Integers `[batch]` from 0; a higher confidence never has a lower index.

    Raises:
        ValueError: if there is fewer than 1 bin, or the binning is unknown.

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
    # The first `num_larger` bins hold size + 1 examples, where the first term is the larger.
    bin_of_rank = jnp.maximum(rank // (size + 1), (rank - num_larger) // max(size, 1))
    order = jnp.argsort(confidence, stable=True)
    return jnp.zeros_like(rank).at[order].set(bin_of_rank)


def _confidence_and_correct(log_probs: Array, labels: Array) -> tuple[Array, Array]:
    confidence = jnp.exp(jnp.max(log_probs, -1))
    return confidence, (jnp.argmax(log_probs, -1) == labels).astype(confidence.dtype)


def _bin_means(bins: Array, values: Array, num_bins: int) -> Array:
    """The sum of the values in each bin, divided by the number of all examples.

    Reducing a dense array keeps digits that adding up in order, as `segment_sum` does, would lose.
    """
    in_bin = bins[:, None] == jnp.arange(num_bins)[None]
    return jnp.mean(jnp.where(in_bin, values[:, None], 0), 0)


@partial(jax.jit, static_argnames=("num_bins", "binning"))
def ece(
    log_probs: LogProbs, labels: Labels, *, num_bins: int = 15, binning: Binning = "equal width"
) -> Float[Array, ""]:
    r"""The expected calibration error of the top class, in [0, 1].

    $$\sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|$$

    over the bins $b$ of `confidence_bins`, with $n_b$ of the $N$ examples each. It depends on the
    number of bins and on the spread of the confidences, so it should not rank methods.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.
        num_bins: how many bins, at least 1.
        binning: "equal width", or "equal mass": bins with equally many examples.

    Raises:
        ValueError: if there is fewer than 1 bin, or the binning is unknown.

    Example:
        >>> round(float(ece(jnp.log(jnp.array([[0.75, 0.25]] * 4)), jnp.array([0, 0, 0, 1]))), 4)
        0.0

    Reference:
        Guo et al. 2017, arXiv:1706.04599, with 15 bins.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, correct = _confidence_and_correct(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, binning)
    return zero_or_nan + jnp.sum(jnp.abs(_bin_means(bins, correct - confidence, num_bins)))


@partial(jax.jit, static_argnames="num_bins")
def debiased_ece(log_probs: LogProbs, labels: Labels, *, num_bins: int = 15) -> Float[Array, ""]:
    r"""The root mean square calibration error of the top class, less its bias in finite samples.

    $$\sqrt{\max\left(0, \sum_b \frac{n_b}{N} \left[ (\mathrm{acc}_b - \mathrm{conf}_b)^2
    - \frac{\mathrm{acc}_b (1 - \mathrm{acc}_b)}{n_b - 1} \right]\right)}$$

    over bins of equal mass; a bin with a single example is not corrected. The plug-in error of a
    perfectly calibrated network is above 0 in every finite sample; the corrected error is near 0.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.
        num_bins: how many bins, at least 1.

    Example:
        >>> log_probs, labels = jnp.log(jnp.array([[0.9, 0.1]] * 4)), jnp.array([0, 0, 1, 1])
        >>> round(float(debiased_ece(log_probs, labels, num_bins=1)), 4)  # (.4^2 - .25 / 3)^.5
        0.2769

    Reference:
        Kumar, Liang and Ma 2019, arXiv:1909.10155.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, correct = _confidence_and_correct(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, "equal mass")
    share = _bin_means(bins, jnp.ones_like(correct), num_bins)
    divisor = jnp.where(share > 0, share, 1)
    accuracy = _bin_means(bins, correct, num_bins) / divisor
    gap = _bin_means(bins, correct - confidence, num_bins) / divisor
    # The accuracy of a single example is 0 or 1, so its bias is 0.
    bias = accuracy * (1 - accuracy) / jnp.maximum(share * len(labels) - 1, 1)
    return zero_or_nan + jnp.sqrt(jnp.maximum(jnp.sum(share * (gap**2 - bias)), 0))


@partial(jax.jit, static_argnames=("num_bins", "binning"))
def reliability_curve(
    log_probs: LogProbs, labels: Labels, *, num_bins: int = 15, binning: Binning = "equal width"
) -> tuple[Float[Array, " bins"], Float[Array, " bins"], Float[Array, " bins"]]:
    """The accuracy of the top class against its confidence, by bins of confidence.

    Args:
        log_probs: `[batch, class]`, normalised.
        labels: `[batch]`, class indices.
        num_bins: how many bins, at least 1.
        binning: "equal width" or "equal mass".

    Returns:
        The mean confidence, the accuracy and the share of all examples, each `[bin]`. An empty bin
        has the share 0, and NaN for the other two.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.75, 0.25]] * 4))
        >>> confidence, accuracy, share = reliability_curve(
        ...     log_probs, jnp.array([0, 0, 0, 1]), num_bins=2
        ... )
        >>> accuracy
        Array([ nan, 0.75], dtype=float32)
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    confidence, correct = _confidence_and_correct(log_probs, labels)
    bins = confidence_bins(confidence, num_bins, binning)
    share = _bin_means(bins, jnp.ones_like(correct), num_bins)
    divisor = jnp.where(share > 0, share, jnp.nan)
    return (
        zero_or_nan + _bin_means(bins, confidence, num_bins) / divisor,
        zero_or_nan + _bin_means(bins, correct, num_bins) / divisor,
        zero_or_nan + share,
    )


@jax.jit
def fit_temperature(log_probs: LogProbs, labels: Labels) -> Float[Array, ""]:
    r"""The temperature $T$ in [1/20, 20] that minimises the NLL of $\mathrm{softmax}(\log p / T)$.

    The NLL is convex in $1 / T$. Newton's method within a bracket finds its minimum with a relative
    error of at most 1e-4. $T$ comes near 1/20 if every example is classified correctly, since a
    lower $T$ then always lowers the NLL. $T$ is 20 if the predictions are no better than chance.

    Args:
        log_probs: `[batch, class]`. For an ensemble pass its pool, not the members: average first,
            then calibrate.
        labels: `[batch]`, class indices; of other examples than those scored later.

    Example:
        >>> log_probs = jax.nn.log_softmax(3 * jnp.log(jnp.full((4, 2), 0.5).at[:, 0].set(0.25)))
        >>> float(fit_temperature(log_probs, jnp.array([1, 1, 1, 0])))  # log(8) / log(3)
        1.89...

    Reference:
        Guo et al. 2017, arXiv:1706.04599.
    """
    log_probs, zero_or_nan = checked(log_probs, labels)
    return zero_or_nan + _fit(log_probs, labels, jnp.ones((), log_probs.dtype))


def _fit(log_probs: Array, labels: Array, start: Array) -> Array:
    """Minimises the NLL by Newton's method in log(1 / T), from the temperature `start`."""
    label_log_probs = jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]

    def improve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, log_inverse, last_step, count = state
        inverse = jnp.exp(log_inverse)
        probs = jax.nn.softmax(inverse * log_probs)
        expected = jnp.sum(jnp.where(probs > 0, probs * log_probs, 0), -1)
        squares = jnp.sum(jnp.where(probs > 0, probs * log_probs**2, 0), -1)
        # The slope of the NLL in 1 / T, then its two derivatives in log(1 / T).
        slope = jnp.mean(expected - label_log_probs)
        first = inverse * slope
        second = first + inverse**2 * jnp.mean(squares - expected**2)
        low = jnp.where(slope <= 0, log_inverse, low)
        high = jnp.where(slope <= 0, high, log_inverse)
        newton = log_inverse - first / jnp.where(second > 0, second, 1)
        # A step longer than half of the last may cycle or converge slowly, so bisect instead.
        usable = (second > 0) & (newton >= low) & (newton <= high)
        usable &= jnp.abs(newton - log_inverse) <= last_step / 2
        new = jnp.where(usable, newton, (low + high) / 2)
        new = jnp.where(jnp.isnan(slope), jnp.nan, new)
        return low, high, new, jnp.abs(new - log_inverse), count + 1

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
    """The NLL of each example, calibrated by a temperature fitted without this example.

    A random two-fold split fits the temperature on each half and scores the other half. The result
    is the mean over `num_repeats` splits. Of an odd number of examples one half has one more.

    Args:
        key: consumed; it decides the splits. Use the same key for everything you compare.
        log_probs: `[batch, class]`, at least 2 examples.
        labels: `[batch]`, class indices.
        num_repeats: how many random splits, at least 1.

    Raises:
        ValueError: if there are fewer than 2 examples or 1 repeat.

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

    return zero_or_nan + mean_over_splits(key, score, len(labels), num_repeats)


def mean_over_splits(
    key: Array, score: Callable[[Array, Array], Array], num_examples: int, num_repeats: int
) -> Float[Array, " batch"]:
    """The mean loss of each example over random two-fold splits.

    Each split fits on one half of the examples and scores the other half, in both directions.

    Args:
        key: consumed; it decides the splits.
        score: `score(fitted, scored)`, both index arrays, fits on the examples `fitted` and returns
            the losses of the examples `scored`.
        num_examples: how many examples, at least 2.
        num_repeats: how many random splits, at least 1.

    Raises:
        ValueError: if there are fewer than 2 examples or 1 repeat.

    Example:
        >>> x = jnp.array([1.0, 2.0])
        >>> mean_over_splits(jax.random.key(0), lambda fitted, scored: x[fitted], 2, 1)
        Array([2., 1.], dtype=float32)
    """
    if num_examples < 2:
        raise ValueError(f"There must be at least 2 examples to split, got {num_examples}.")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}.")

    def score_a_split(key: Array) -> Array:
        order = jax.random.permutation(key, num_examples)
        first, second = order[: num_examples // 2], order[num_examples // 2 :]
        losses = jnp.concatenate([score(second, first), score(first, second)])
        return jnp.zeros_like(losses).at[order].set(losses)

    return jnp.mean(jax.lax.map(score_a_split, jax.random.split(key, num_repeats)), 0)


@partial(jax.jit, static_argnames="num_repeats")
def calibrated_nll(
    key: Array, log_probs: LogProbs, labels: Labels, *, num_repeats: int = 5
) -> Float[Array, ""]:
    """The mean of `calibrated_losses`: the NLL at temperatures fitted on other examples.

    Args:
        key: consumed; it decides the splits. Use the same key for everything you compare.
        log_probs: `[batch, class]`, at least 2 examples.
        labels: `[batch]`, class indices.
        num_repeats: how many random splits, at least 1.

    Raises:
        ValueError: if there are fewer than 2 examples or 1 repeat.

    Example:
        >>> log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (100, 3)))
        >>> bool(calibrated_nll(jax.random.key(1), log_probs, jnp.arange(100) % 3) < 1.2)
        True

    Reference:
        Ashukha et al. 2020, arXiv:2002.06470, section 4.
    """
    return jnp.mean(calibrated_losses(key, log_probs, labels, num_repeats=num_repeats))
