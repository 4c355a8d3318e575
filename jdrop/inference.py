"""The ways to read one dropout network, and the pools that average predictions.

Log-probabilities throughout: an average of probabilities is formed as a `logsumexp`, so that a
confident prediction neither underflows nor needs clipping.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jdrop import bits
from jdrop.annotations import Float
from jdrop.functional import check_rate
from jdrop.network import ApplyFn, Variables, network_log_probs


class _Pool(NamedTuple):
    """An average as a running one, so that its parts need not be held at once.

    Running means, not sums: a sum of thousands of predictions loses the last digits of each.

    Attributes:
        start: what is carried before the first prediction, from an array of its shape.
        add: what is carried after one more prediction, from its weight and the sum of the weights
            so far, its own included.
        finish: the average, from what is carried and the sum of the weights.
    """

    start: Callable[[Array], Any]
    add: Callable[[Any, Array, Array, Array], Any]
    finish: Callable[[Any, Array], Array]


def _arithmetic_start(like: Array) -> tuple[Array, Array]:
    return jnp.full_like(like, -jnp.inf), jnp.zeros_like(like)


def _share(weight: Array, total: Array) -> Array:
    return jnp.where(weight > 0, weight / total, 0)


def _arithmetic_add(
    carry: tuple[Array, Array], log_probs: Array, weight: Array, total: Array
) -> tuple[Array, Array]:
    """Carries the largest log-probability that counts, and the mean of `exp(. - largest)`."""
    largest, mean = carry
    log_probs = jnp.where(weight > 0, log_probs, -jnp.inf)
    new = jnp.maximum(largest, log_probs)
    shift = jnp.where(new == -jnp.inf, 0, new)
    mean *= jnp.exp(largest - shift)
    return new, mean + _share(weight, total) * (jnp.exp(log_probs - shift) - mean)


def _arithmetic_finish(carry: tuple[Array, Array], total: Array) -> Array:
    largest, mean = carry
    return largest + jnp.log(mean)


def _geometric_add(mean: Array, log_probs: Array, weight: Array, total: Array) -> Array:
    # A class that one member rules out stays out: -inf, of which no difference may be taken.
    step = jnp.where(mean == -jnp.inf, 0, log_probs - mean)
    return mean + jnp.where(weight > 0, _share(weight, total) * step, 0)


def _vote_start(like: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.zeros_like(like), _arithmetic_start(like)


def _vote_add(
    carry: tuple[Array, tuple[Array, Array]], log_probs: Array, weight: Array, total: Array
) -> tuple[Array, tuple[Array, Array]]:
    votes, arithmetic = carry
    vote = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1], dtype=log_probs.dtype)
    # A sum: of whole numbers it is exact.
    return votes + weight * vote, _arithmetic_add(arithmetic, log_probs, weight, total)


def _vote_finish(carry: tuple[Array, tuple[Array, Array]], total: Array) -> Array:
    votes, arithmetic = carry
    return jnp.log(votes + jnp.exp(_arithmetic_finish(arithmetic, total))) - jnp.log(total + 1)


POOLS = {
    "arithmetic": _Pool(_arithmetic_start, _arithmetic_add, _arithmetic_finish),
    "geometric": _Pool(
        start=jnp.zeros_like,
        add=_geometric_add,
        finish=lambda mean, total: jax.nn.log_softmax(mean),
    ),
    "vote": _Pool(_vote_start, _vote_add, _vote_finish),
}


def _named_pool(kind: str) -> _Pool:
    if kind not in POOLS:
        raise ValueError(f"kind must be one of {', '.join(POOLS)}, got {kind!r}.")
    return POOLS[kind]


@partial(jax.jit, static_argnames="kind")
def pool(
    log_probs: Float[ArrayLike, "member *batch classes"],
    kind: str = "arithmetic",
    *,
    weights: Float[ArrayLike, " weights"] | None = None,
) -> Float[Array, "*batch classes"]:
    r"""Averages the predictions of several networks, or of several masks of one network.

    | kind | probabilities of the pool, up to normalisation |
    |---|---|
    | arithmetic | $\bar p = \frac{1}{W} \sum_m w_m p_m$, $W = \sum_m w_m$ |
    | geometric | $\exp \frac{1}{W} \sum_m w_m \log p_m$, the average of the logits |
    | vote | $(v_c + \bar p_c) / (W + 1)$, where $v_c$ members have their largest $p$ at $c$ |

    In a vote the arithmetic average has one vote more, which it divides among the classes: enough
    to break ties between classes and to keep every logarithm finite, too little to overrule a
    majority of whole votes.

    Args:
        log_probs: normalised log-probabilities, the axis to average over first.
        kind: "arithmetic", "geometric" or "vote".
        weights: how often each member counts, at least 0 and not all 0, or the result is NaN; once
            if not given. In a vote they are numbers of votes, whole ones.

    Returns:
        Normalised log-probabilities, without the first axis; float32, or float64 if they were.

    Raises:
        ValueError: an unknown kind; no members; weights of another number than that of members.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> [f"{p:.2f}" for p in jnp.exp(pool(log_probs))]
        ['0.70', '0.30']
        >>> [f"{p:.2f}" for p in jnp.exp(pool(log_probs, "geometric"))]
        ['0.75', '0.25']
    """
    chosen = _named_pool(kind)
    log_probs = jnp.asarray(log_probs)
    log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
    num_members = log_probs.shape[0]
    if num_members == 0:
        raise ValueError(f"log_probs must hold a member at least, got the shape {log_probs.shape}.")
    if weights is None:
        weights = jnp.ones(num_members)
    weights = jnp.asarray(weights).astype(log_probs.dtype)
    if weights.shape != log_probs.shape[:1]:
        raise ValueError(
            f"weights must hold one number for each of the {num_members} members, "
            f"got the shape {weights.shape}."
        )
    totals = jnp.cumsum(weights)
    carry, _ = jax.lax.scan(
        lambda carry, member: (chosen.add(carry, *member), None),
        chosen.start(log_probs[0]),
        (log_probs, weights, totals),
    )
    usable = (weights >= 0).all() & (totals[-1] > 0)
    return jnp.where(usable, chosen.finish(carry, totals[-1]), jnp.nan)


@partial(jax.jit, static_argnames="network")
def weight_scaling(
    network: ApplyFn, variables: Variables, inputs: ArrayLike
) -> Float[Array, "batch classes"]:
    """Log-probabilities of the deterministic network: all units present, none random.

    With dropout that is scaled in training the weights serve as they are; those of unscaled
    dropout go through `jdrop.scale_weights` first. One forward pass. For one linear layer with a
    softmax this is exactly the geometric pool over all masks, otherwise an approximation of it.

    Args:
        network: an `apply_fn` that gives logits.
        variables: of one network.
        inputs: `[batch, ...]`.

    Reference:
        Hinton et al. 2012, arXiv:1207.0580 ("mean network").
    """
    return network_log_probs(None, network, variables, jnp.asarray(inputs))


@partial(jax.jit, static_argnames=("network", "num_samples", "kind"))
def monte_carlo(
    key: Array,
    network: ApplyFn,
    variables: Variables,
    inputs: ArrayLike,
    *,
    num_samples: int,
    kind: str = "arithmetic",
) -> Float[Array, "batch classes"]:
    """Log-probabilities of the average over sampled masks: Monte-Carlo dropout.

    `num_samples` forward passes, each with a mask of its own for every example. The average is a
    running one: memory does not grow with `num_samples`.

    Args:
        key: consumed; sample `t` depends on the key and on `t` alone.
        network: an `apply_fn` that gives logits and draws masks when it has a key.
        variables: of one network.
        inputs: `[batch, ...]`.
        num_samples: how many masks, at least 1.
        kind: how to average, see `pool`.

    Raises:
        ValueError: fewer than 1 sample; an unknown kind.

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
    chosen = _named_pool(kind)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    inputs = jnp.asarray(inputs)

    def log_probs(sample: ArrayLike) -> Array:
        return network_log_probs(jax.random.fold_in(key, sample), network, variables, inputs)

    like = jax.eval_shape(log_probs, 0)
    once = jnp.ones((), like.dtype)
    carry = jax.lax.fori_loop(
        0,
        num_samples,
        lambda sample, carry: chosen.add(carry, log_probs(sample), once, once + sample),
        chosen.start(jnp.zeros(like.shape, like.dtype)),
    )
    return chosen.finish(carry, num_samples * once)


class Enumerated(NamedTuple):
    """The averages over all masks of a network, each mask weighted by its probability.

    Attributes:
        arithmetic: log-probabilities of the mean of the probabilities, `[batch, class]`.
        geometric: those of the normalised geometric mean, `[batch, class]`.
    """

    arithmetic: Array
    geometric: Array


MAX_ENUMERATED_UNITS = 24


def enumerate_masks(
    log_probs_fn: Callable[[dict[str, Array]], Array],
    rates: Mapping[str, ArrayLike],
    *,
    chunk_size: int = 256,
) -> Enumerated:
    r"""Averages the predictions of all $2^n$ thinned networks: what Monte-Carlo samples.

    $$\bar p = \sum_r \pi(r) \, p_r, \quad \tilde p \propto \exp \sum_r \pi(r) \log p_r, \quad
    \pi(r) = \prod_j q_j^{r_j} (1 - q_j)^{1 - r_j}, \quad q_j = 1 - \mathrm{rate}_j$$

    for the arithmetic and the geometric average, where $r_j$ is 1 if unit $j$ is kept. Each $q$ is
    the probability that the random bits realise, as in `jdrop.dropout`.

    Two gaps tell why weight scaling is not the average that it stands for. From weight scaling to
    the geometric average: what weight scaling loses as the network is not linear. It is 0 for
    linear layers with a softmax, however many, each unit dropped independently. From the geometric
    to the arithmetic average: what the kind of average changes, for a linear network too.

    Args:
        log_probs_fn: normalised log-probabilities `[batch, class]` of the network thinned by masks,
            one Boolean array `[unit]` for each name in `rates`, True where a unit is kept; with
            what is kept divided by `q`, if it is so in training.
        rates: by name of a dropout layer, the rate of each of its units, `[unit]`, in [0, 1]. Units
            of rate 0 or 1 have one state and double no work, unless the rates are traced; traced
            rates out of range give NaN.
        chunk_size: how many thinned networks run at once; it changes memory and speed only.

    Returns:
        Both averages; float32, or float64 if the log-probabilities were.

    Raises:
        ValueError: more than 24 units in all that may be kept or dropped; no unit; rates that are
            not one for each unit, or out of range; a chunk size below 1.
        TypeError: rates that are no floats.

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
    for name, of_units in rates.items():
        if jnp.ndim(of_units) != 1:
            raise ValueError(
                f"rates must hold one rate for each unit, [unit], got the shape "
                f"{jnp.shape(of_units)} for {name!r}; give `jnp.full(units, rate)`."
            )
    if sum(jnp.size(of_units) for of_units in rates.values()) == 0:
        raise ValueError(f"rates must name a unit at least, got {dict(rates)}.")
    random = [unit for of_units in rates.values() for unit in _random_units(of_units)]
    num_random = sum(random)
    if num_random > MAX_ENUMERATED_UNITS:
        raise ValueError(
            f"rates must leave at most {MAX_ENUMERATED_UNITS} units to chance, as n units have 2^n "
            f"masks and each is a forward pass, got {num_random}; sample masks with `monte_carlo`."
        )
    num_masks = 2**num_random
    chunk_size = min(chunk_size, num_masks)
    num_chunks = -(-num_masks // chunk_size)
    # Averages of averages, as a mean of very many parts would lose the digits of the last ones.
    chunks_in_row = 2 ** ((num_chunks - 1).bit_length() // 2)
    num_rows = -(-num_chunks // chunks_in_row)

    rate = jnp.concatenate([jnp.asarray(check_rate(of_units)) for of_units in rates.values()])
    ends = list(accumulate(jnp.size(of_units) for of_units in rates.values()))[:-1]
    keep_prob = (bits.threshold(rate) / bits.LEVELS)[None]
    # A unit's place among the random ones is the binary digit that says whether it is kept.
    places = jnp.array([sum(random[:unit]) for unit in range(len(random))])[None]
    is_random = jnp.array(random)[None]

    def average_chunk(chunk: ArrayLike) -> _Average:
        number = chunk * chunk_size + jnp.arange(chunk_size)
        digits = (number[:, None] >> places) % 2 == 1
        kept = jnp.where(is_random, digits, keep_prob > 0)
        masks = dict(zip(rates, jnp.split(kept, ends, axis=1), strict=True))
        log_probs = jax.vmap(log_probs_fn)(masks)
        log_probs = log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32))
        weights = jnp.prod(jnp.where(kept, keep_prob, 1 - keep_prob).astype(log_probs.dtype), 1)
        # The last chunks may reach beyond the last mask.
        weights = jnp.where(number < num_masks, weights, 0)
        weight = weights.sum()
        shares = weights / jnp.where(weight > 0, weight, 1)
        counts = jnp.expand_dims(shares > 0, range(1, log_probs.ndim))
        # Products of matrices: XLA for CPUs sums over the first axis several times as slowly.
        mean = partial(jnp.tensordot, shares, axes=1, precision="highest")
        counted = jnp.where(counts, log_probs, -jnp.inf)
        largest = _maximum(counted)
        shift = jnp.where(largest == -jnp.inf, 0, largest)
        log_mean = jnp.log(mean(jnp.exp(counted - shift[None]))) + shift
        mean_log = mean(jnp.where(counts, log_probs, 0))
        return log_mean, mean_log, weight

    def average_row(row: ArrayLike) -> _Average:
        first = row * chunks_in_row
        return _average_parts(lambda column: average_chunk(first + column), chunks_in_row, like)

    like = jax.eval_shape(average_chunk, 0)
    log_mean, mean_log, _ = _average_parts(average_row, num_rows, like)
    in_range = ((rate >= 0) & (rate <= 1)).all()
    averages = log_mean, jax.nn.log_softmax(mean_log)
    return Enumerated(*(jnp.where(in_range, average, jnp.nan) for average in averages))


def _random_units(rates: ArrayLike) -> list[bool]:
    """Which units may be kept and may be dropped; all of those whose rates are not known yet."""
    if isinstance(rates, jax.core.Tracer):
        return [True] * jnp.size(rates)
    thresholds = map(bits.threshold, jax.device_get(rates).tolist())
    return [bool(0 < threshold < bits.LEVELS) for threshold in thresholds]


def _maximum(x: Array) -> Array:
    """`x.max(0)`, by halves that may overlap, which XLA for CPUs does several times as fast."""
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = jnp.maximum(x[:half], x[-half:])
    return x[0]


_Average = tuple[Array, Array, Array]
"""The log of the mean of the probabilities, the mean of their logs, the sum of the weights."""


def _average_parts(part: Callable[[Array], _Average], count: int, like: Any) -> _Average:
    """The average of `part(0)` to `part(count - 1)`, each of which has the shapes of `like`."""
    arithmetic, geometric = POOLS["arithmetic"], POOLS["geometric"]

    def add(carry: Any, index: Array) -> tuple[Any, None]:
        of_arithmetic, of_geometric, total = carry
        log_mean, mean_log, weight = part(index)
        total = total + weight
        return (
            arithmetic.add(of_arithmetic, log_mean, weight, total),
            geometric.add(of_geometric, mean_log, weight, total),
            total,
        ), None

    log_mean, mean_log, weight = (jnp.zeros(of.shape, of.dtype) for of in like)
    start = arithmetic.start(log_mean), geometric.start(mean_log), weight
    (of_arithmetic, mean_log, total), _ = jax.lax.scan(add, start, jnp.arange(count))
    return arithmetic.finish(of_arithmetic, total), mean_log, total
