"""Predictions with one dropout network, and pools that average predictions.

The functions work with log-probabilities, or with `regression` with outputs. They form an average
of probabilities as a logarithm of a sum of exponentials, so confident predictions neither underflow
nor need clipping.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jdrop import bits
from jdrop.annotations import Float
from jdrop.functional import check_rate
from jdrop.network import ApplyFn, Variables, predict

__all__ = ["Enumerated", "enumerate_masks", "monte_carlo", "pool", "weight_scaling"]


class RunningAverage(NamedTuple):
    """The arithmetic average of predictions that arrive one by one, of which none is stored.

    Carries a mean, not a sum: a sum over thousands of predictions loses the last digits of each.

    Attributes:
        largest: the largest log-probability so far.
        mean: the mean of `exp(log_probs - largest)`.
        num_added: how many predictions were added.
    """

    largest: Array
    mean: Array
    num_added: Array

    @classmethod
    def start(cls, log_probs: Array | jax.ShapeDtypeStruct) -> "RunningAverage":
        """The average of no predictions yet, for predictions of this shape and dtype."""
        shape, dtype = log_probs.shape, log_probs.dtype
        return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((), dtype))

    def add(self, log_probs: Array) -> "RunningAverage":
        """The average with one more prediction."""
        num_added = self.num_added + 1
        largest = jnp.maximum(self.largest, log_probs)
        shift = jnp.where(largest == -jnp.inf, 0, largest)
        mean = self.mean * jnp.exp(self.largest - shift)
        mean = mean + 1 / num_added * (jnp.exp(log_probs - shift) - mean)
        return RunningAverage(largest, mean, num_added)

    def log_probs(self) -> Array:
        """The log-probabilities of the average."""
        return self.largest + jnp.log(self.mean)


def _arithmetic(log_probs: Array) -> Array:
    start = RunningAverage.start(log_probs[0])
    average, _ = jax.lax.scan(lambda average, member: (average.add(member), None), start, log_probs)
    return average.log_probs()


def _geometric(log_probs: Array) -> Array:
    def add(mean: Array, member: tuple[Array, Array]) -> tuple[Array, None]:
        count, member_log_probs = member
        # A class that one member rules out stays at -inf, from which no difference is defined.
        step = jnp.where(mean == -jnp.inf, 0, member_log_probs - mean)
        return mean + 1 / count * step, None

    counts = jnp.arange(1, len(log_probs) + 1, dtype=log_probs.dtype)
    mean, _ = jax.lax.scan(add, jnp.zeros_like(log_probs[0]), (counts, log_probs))
    return jax.nn.log_softmax(mean)


def _vote(log_probs: Array) -> Array:
    num_members, num_classes = log_probs.shape[0], log_probs.shape[-1]
    votes = jax.nn.one_hot(jnp.argmax(log_probs, -1), num_classes, dtype=log_probs.dtype).sum(0)
    return jnp.log(votes + jnp.exp(_arithmetic(log_probs))) - jnp.log(num_members + 1)


POOLS = {"arithmetic": _arithmetic, "geometric": _geometric, "vote": _vote}


@partial(jax.jit, static_argnames="method")
def pool(
    log_probs: Float[ArrayLike, "member *batch classes"], method: str = "arithmetic"
) -> Float[Array, "*batch classes"]:
    r"""Averages the predictions of several networks, or of several masks of one network.

    | method | probabilities of the pool, up to normalisation |
    |---|---|
    | arithmetic | $\bar p = \frac{1}{M} \sum_m p_m$ |
    | geometric | $\exp \frac{1}{M} \sum_m \log p_m$, the average of the logits |
    | vote | $(v_c + \bar p_c) / (M + 1)$, where $v_c$ members have their largest $p$ at $c$ |

    In a vote the arithmetic average adds one vote and divides it among the classes. This breaks
    ties between classes and keeps every logarithm finite, but cannot overrule a majority.

    Args:
        log_probs: normalised log-probabilities, the axis to average over first.
        method: "arithmetic", "geometric" or "vote".

    Returns:
        Normalised log-probabilities, without the first axis; float32, or float64 for float64.

    Raises:
        ValueError: an unknown method; no members; a single class.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> [f"{p:.2f}" for p in jnp.exp(pool(log_probs))]
        ['0.70', '0.30']
        >>> [f"{p:.2f}" for p in jnp.exp(pool(log_probs, "geometric"))]
        ['0.75', '0.25']
    """
    if method not in POOLS:
        raise ValueError(f"method must be one of {', '.join(POOLS)}, got {method!r}.")
    log_probs = jnp.asarray(log_probs)
    if log_probs.ndim < 2 or log_probs.shape[0] == 0:
        raise ValueError(
            "log_probs must be [member, ..., class] with at least 1 member, got the shape "
            f"{log_probs.shape}."
        )
    if log_probs.shape[-1] == 1:
        raise ValueError(
            f"log_probs must have at least 2 classes, got the shape {log_probs.shape}; average the "
            "outputs of a regression with `outputs.mean(0)`."
        )
    return POOLS[method](log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32)))


@partial(jax.jit, static_argnames=("network", "regression"))
def weight_scaling(
    network: ApplyFn, variables: Variables, inputs: Any, *, regression: bool = False
) -> Float[Array, "batch ..."]:
    """Predicts with the deterministic network: all units present, one forward pass.

    Dropout that is scaled in training needs no change of the weights. After unscaled dropout,
    apply `jdrop.scale_weights` to the weights first. For one linear layer with a softmax, weight
    scaling equals the geometric pool over all masks; otherwise it approximates this pool.

    Args:
        network: an `apply_fn`; it returns logits `[batch, class]`, or with `regression` anything.
        variables: of one network.
        inputs: `[batch, ...]`, or any pytree of such arrays.
        regression: whether to return the outputs as they are.

    Returns:
        Log-probabilities `[batch, class]`, at least float32. With `regression` the outputs.

    Raises:
        TypeError: a network whose outputs are not one array.
        ValueError: outputs without a class axis or of a single class, unless `regression`.

    Reference:
        Hinton et al. 2012, arXiv:1207.0580 ("mean network").
    """
    return predict(None, network, variables, inputs, regression=regression)


@partial(jax.jit, static_argnames=("network", "num_samples", "regression"))
def monte_carlo(
    key: Array,
    network: ApplyFn,
    variables: Variables,
    inputs: Any,
    *,
    num_samples: int,
    regression: bool = False,
) -> Float[Array, "batch ..."]:
    """Predicts with the arithmetic average over sampled masks: Monte-Carlo dropout.

    Each of the `num_samples` forward passes draws its own mask for every example. Memory does not
    grow with `num_samples`.

    Args:
        key: consumed; sample `t` depends on the key and on `t` alone.
        network: an `apply_fn` that draws masks when it has a key; it returns logits
            `[batch, class]`, or with `regression` anything.
        variables: of one network.
        inputs: `[batch, ...]`, or any pytree of such arrays.
        num_samples: how many masks, at least 1.
        regression: whether to average the outputs as they are, not probabilities. For their spread
            over masks, call `jdrop.network.predict` with each `fold_in(key, t)`.

    Returns:
        Log-probabilities `[batch, class]`, or with `regression` the mean outputs; at least float32.

    Raises:
        TypeError: a network whose outputs are not one array.
        ValueError: fewer than 1 sample; outputs without a class axis or of a single class, unless
            `regression`.

    Example:
        >>> import jdrop
        >>> def apply_fn(variables, inputs, key):
        ...     x = inputs if key is None else jdrop.dropout(key, inputs, 0.5)
        ...     return x @ variables["params"]
        >>> variables = {"params": jnp.ones((3, 2))}
        >>> key = jax.random.key(0)
        >>> monte_carlo(key, apply_fn, variables, jnp.ones((4, 3)), num_samples=10).shape
        (4, 2)

    Reference:
        Gal and Ghahramani 2016, arXiv:1506.02142.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")

    def sampled(sample: ArrayLike) -> Array:
        sample_key = jax.random.fold_in(key, sample)
        outputs = predict(sample_key, network, variables, inputs, regression=regression)
        return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))

    shape = jax.eval_shape(sampled, 0)
    if regression:
        return jax.lax.fori_loop(
            0,
            num_samples,
            lambda sample, mean: mean + 1 / (sample + 1) * (sampled(sample) - mean),
            jnp.zeros(shape.shape, shape.dtype),
        )
    return jax.lax.fori_loop(
        0,
        num_samples,
        lambda sample, average: average.add(sampled(sample)),
        RunningAverage.start(shape),
    ).log_probs()


class Enumerated(NamedTuple):
    """The averages over all masks of a network, weighted by the probabilities of the masks.

    Attributes:
        arithmetic: log-probabilities of the arithmetic mean, `[batch, class]`.
        geometric: log-probabilities of the normalised geometric mean, `[batch, class]`.
    """

    arithmetic: Array
    geometric: Array


MAX_ENUMERATED_UNITS = 20


def enumerate_masks(
    log_probs_fn: Callable[[dict[str, Array]], Array],
    rates: Mapping[str, ArrayLike],
    *,
    chunk_size: int = 256,
) -> Enumerated:
    r"""Averages the predictions of all $2^n$ thinned networks, which Monte-Carlo dropout samples.

    $$\bar p = \sum_r \pi(r) \, p_r, \quad \tilde p \propto \exp \sum_r \pi(r) \log p_r, \quad
    \pi(r) = \prod_j q_j^{r_j} (1 - q_j)^{1 - r_j}, \quad q_j = 1 - \mathrm{rate}_j$$

    for the arithmetic and the geometric average, where $r_j$ is 1 if unit $j$ is kept. Each $q$ is
    the probability that the random bits realise, as in `jdrop.dropout`.

    Two gaps explain the error of weight scaling. The gap from weight scaling to the geometric
    average comes from nonlinearities; it is 0 for linear layers with a softmax if each unit is
    dropped independently. The gap from the geometric to the arithmetic average comes from the
    pool, and is there for a linear network too.

    Args:
        log_probs_fn: maps masks to normalised log-probabilities `[batch, class]` of the thinned
            network. Masks are one Boolean array `[unit]` for each name in `rates`, True where a
            unit is kept. The function divides what is kept by `q` if training does so.
        rates: for each dropout layer, by its name, the rates of its units, `[unit]`, in [0, 1].
            Units with the known rate 0 or 1 add no masks. A traced rate out of range gives NaN.
        chunk_size: how many thinned networks run at once; it changes only memory and speed. The
            averages of all chunks are in memory together.

    Returns:
        Both averages; float32, or float64 if the log-probabilities are float64.

    Raises:
        ValueError: more than 20 units that may be kept or dropped; no unit; rates of another shape
            or out of range; a chunk size below 1.
        TypeError: rates that are not floats.

    Example:
        >>> import jdrop
        >>> x, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, -1.0], [0.5, 0.5]])
        >>> def log_probs_fn(masks):
        ...     return jax.nn.log_softmax(jdrop.apply_mask(masks["inputs"], x, 0.5) @ kernel)
        >>> average = enumerate_masks(log_probs_fn, {"inputs": jnp.full(2, 0.5)})
        >>> weight_scaling = jax.nn.log_softmax(x @ kernel)
        >>> bool(jnp.allclose(average.geometric, weight_scaling))
        True
        >>> bool(jnp.allclose(average.arithmetic, weight_scaling))
        False

    Reference:
        Warde-Farley et al. 2014, arXiv:1312.6197, sections 4 and 5.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    random_units = _check_units(rates)
    num_masks = 2 ** sum(random_units)
    chunk_size = min(chunk_size, num_masks)
    num_chunks = -(-num_masks // chunk_size)

    rate = jnp.concatenate([jnp.asarray(check_rate(of_layer)) for of_layer in rates.values()])
    layer_ends = list(accumulate(jnp.size(of_layer) for of_layer in rates.values()))[:-1]
    keep_prob = (bits.threshold(rate) / bits.LEVELS)[None]
    is_random = jnp.array(random_units)[None]
    # Which binary digit of a mask's index says whether a random unit is kept.
    digit = jnp.array([sum(random_units[:unit]) for unit in range(len(random_units))])[None]

    def average_chunk(chunk: Array) -> tuple[Array, Array, Array]:
        """The log of the mean and the mean of the logs over a chunk, and its probability."""
        index = chunk * chunk_size + jnp.arange(chunk_size)
        is_kept = (index[:, None] >> digit) % 2 == 1
        kept = jnp.where(is_random, is_kept, keep_prob > 0)
        masks = dict(zip(rates, jnp.split(kept, layer_ends, axis=1), strict=True))
        log_probs = jax.vmap(log_probs_fn)(masks)
        log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
        mask_probs = jnp.prod(jnp.where(kept, keep_prob, 1 - keep_prob).astype(log_probs.dtype), 1)
        # The last chunk may reach beyond the last mask.
        mask_probs = jnp.where(index < num_masks, mask_probs, 0)
        log_mean, mean_log = _log_mean(log_probs, mask_probs), _mean(log_probs, mask_probs)
        return log_mean, mean_log, _reduce(jnp.add, mask_probs)

    log_means, mean_logs, chunk_probs = jax.lax.map(average_chunk, jnp.arange(num_chunks))
    arithmetic = _log_mean(log_means, chunk_probs)
    geometric = jax.nn.log_softmax(_mean(mean_logs, chunk_probs))
    in_range = ((rate >= 0) & (rate <= 1)).all()
    return Enumerated(
        *(jnp.where(in_range, log_probs, jnp.nan) for log_probs in (arithmetic, geometric))
    )


def _check_units(rates: Mapping[str, ArrayLike]) -> list[bool]:
    """For each unit, whether it may be kept and may be dropped. Raises if there are too many."""
    for name, of_layer in rates.items():
        if jnp.ndim(of_layer) != 1:
            raise ValueError(
                f"rates must hold one rate for each unit, [unit], got the shape "
                f"{jnp.shape(of_layer)} for {name!r}; give `jnp.full(units, rate)`."
            )
    is_random = [unit for of_layer in rates.values() for unit in _random_units(of_layer)]
    if not is_random:
        raise ValueError(f"rates must name at least 1 unit, got {dict(rates)}.")
    if sum(is_random) > MAX_ENUMERATED_UNITS:
        raise ValueError(
            f"rates must leave at most {MAX_ENUMERATED_UNITS} units to chance, as n units have 2^n "
            f"masks and each is a forward pass, got {sum(is_random)}; sample masks with "
            "`monte_carlo`."
        )
    return is_random


def _random_units(rates: ArrayLike) -> list[bool]:
    """Which units of a layer may be kept and may be dropped; with traced rates, all of them."""
    if isinstance(rates, jax.core.Tracer):
        return [True] * jnp.size(rates)
    thresholds = map(bits.threshold, np.asarray(rates).tolist())
    return [bool(0 < threshold < bits.LEVELS) for threshold in thresholds]


def _mean(values: Array, weights: Array) -> Array:
    """The weighted mean along the first axis. Values of weight 0 do not count, not even NaN."""
    total = _reduce(jnp.add, weights)
    shares = weights / jnp.where(total > 0, total, 1)
    shares = jnp.expand_dims(shares, range(1, values.ndim))
    return _reduce(jnp.add, jnp.where(shares > 0, shares * values, 0))


def _log_mean(log_values: Array, weights: Array) -> Array:
    """The log of the weighted mean of `exp(log_values)` along the first axis."""
    counts = jnp.expand_dims(weights > 0, range(1, log_values.ndim))
    log_values = jnp.where(counts, log_values, -jnp.inf)
    largest = _reduce(jnp.maximum, log_values)
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    return jnp.log(_mean(jnp.exp(log_values - shift[None]), weights)) + shift


def _reduce(operator: Callable[[Array, Array], Array], x: Array) -> Array:
    """Reduces the first axis by halves: sums keep their digits, and XLA for CPUs is faster."""
    while len(x) > 1:
        half = len(x) // 2
        x = jnp.concatenate([operator(x[:half], x[half : 2 * half]), x[2 * half :]])
    return x[0]
