"""The claims of the theory on hidden units: do they co-adapt, and how sparse are they?

Hidden units are what dropout layers take in, so a plain network and a dropout network of one
architecture have the same ones. Numbers only.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var, get_opaque_trace_state

from jdrop.network import AtDropout, Network, Variables
from jdrop.statistics import mean_interval
from jdrop.study.results import CoAdaptation

MakeNetwork = Callable[..., Network]
"""`make_network(at_dropout=...)`: a network whose dropout layers are replaced.

Such as `partial(jdrop.linen.as_network, module)`.
"""

ExampleLosses = Callable[[Array, Array], dict[str, Array]]
"""Outputs and labels -> scores of each example, by name."""

NUM_BINS = 30  # Of histograms of activations.
NUM_SHARES = 11  # Of deleted units: 0, 0.1, ..., 1.
NUM_ORDERS = 5  # In which units are deleted.
MAX_UNITS = 512  # Of a layer that are correlated.
NUM_FEATURES = 64


def hidden_units(
    make_network: MakeNetwork, variables: Variables, inputs: Array
) -> dict[str, Array]:
    """What each dropout layer takes in, in the network without dropout.

    Layers are in the order of their calls; the second call of a layer has a name of its own,
    "Dropout_0 (2)". A layer whose inputs depend on no parameter drops inputs of the network, not
    hidden units, and is left out. So is one within a transformation such as `nn.scan`.

    Args:
        make_network: makes the network.
        variables: of one network.
        inputs: `[example, ...]`.

    Returns:
        By layer, `[example, unit]`, at least float32. Of a layer with more axes than these, each
        place is a unit.

    Example:
        >>> def make_network(at_dropout):
        ...     def apply_fn(variables, inputs, key):
        ...         hidden = at_dropout("inputs", inputs, 0.2) @ variables["params"]
        ...         return at_dropout("hidden", jax.nn.relu(hidden), 0.5)
        ...     return Network(apply_fn)
        >>> hidden_units(make_network, {"params": jnp.array([[-1.0, 2.0]])}, jnp.ones((1, 1)))
        {'hidden': Array([[0., 2.]], dtype=float32)}
    """
    hidden = _hidden_layers(make_network, variables, inputs)
    taken_in = _taken_in(make_network, variables, inputs)
    return {name: taken_in[name] for name in hidden}


def _hidden_layers(make_network: MakeNetwork, variables: Variables, inputs: Array) -> list[str]:
    """Dropout layers whose inputs depend on parameters, in the order of their calls."""
    names: list[str] = []

    def trace(params: Any) -> list[Array]:
        taken_in = _taken_in(make_network, {**variables, "params": params}, inputs)
        names.extend(taken_in)
        return list(taken_in.values())

    jaxpr = jax.make_jaxpr(trace)(variables["params"]).jaxpr
    depend = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(of, Var) and of in depend for of in equation.invars):
            depend.update(equation.outvars)
    return [
        name
        for name, of in zip(names, jaxpr.outvars, strict=True)
        if isinstance(of, Var) and of in depend
    ]


def _taken_in(make_network: MakeNetwork, variables: Variables, inputs: Array) -> dict[str, Array]:
    found: dict[str, Array] = {}
    level = get_opaque_trace_state(convention="flax")

    def look(name: str, x: Array, rate: Any) -> Array:
        # What is within a transformation has no one value, and cannot leave it.
        if get_opaque_trace_state(convention="flax") == level:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            found[name] = wide.reshape(len(x), -1)
        return x

    make_network(at_dropout=_each_call(look))(variables, inputs, None)
    return found


def _each_call(at_dropout: AtDropout) -> AtDropout:
    """Gives every call of a layer in one pass a name of its own."""
    calls: Counter[str] = Counter()

    def numbered(name: str, x: Array, rate: Any) -> Array:
        calls[name] += 1
        return at_dropout(name if calls[name] == 1 else f"{name} ({calls[name]})", x, rate)

    return numbered


@jax.jit
def mean_correlation(activations: Array) -> Array:
    r"""The mean absolute correlation of two different units, over units that vary.

    $\frac{2}{U (U - 1)} \sum_{i < j} |\mathrm{corr}(h_i, h_j)|$; 0 where fewer than two units vary.
    Of more than `MAX_UNITS`, so many are drawn, for layers of one width the same.

    Args:
        activations: `[example, unit]`.

    Example:
        >>> x = jnp.array([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [3.0, 6.0, 5.0]])
        >>> round(float(mean_correlation(x)), 4)
        1.0
    """
    num_units = activations.shape[1]
    if num_units > MAX_UNITS:
        # Drawn, as neighbours in a layer of convolutions are more alike than others.
        drawn = np.random.default_rng(0).choice(num_units, MAX_UNITS, replace=False)
        activations = activations[:, np.sort(drawn)]
    deviations = activations - jnp.mean(activations, 0, keepdims=True)
    norms = jnp.linalg.norm(deviations, axis=0)
    size = jnp.max(jnp.abs(activations), 0) * jnp.sqrt(len(activations))
    # The mean of a constant may be off by its rounding.
    varies = norms > 1e-5 * size
    scaled = deviations / jnp.where(varies, norms, 1)[None]
    pairs = varies[:, None] & varies[None] & ~jnp.eye(len(norms), dtype=bool)
    correlations = jnp.matmul(scaled.T, scaled, precision="highest")
    total = jnp.sum(jnp.where(pairs, jnp.abs(correlations), 0))
    return total / jnp.maximum(jnp.sum(pairs), 1)


@jax.jit
def sparseness(activations: Array) -> Array:
    r"""How few units are active for an example, by Treves and Rolls, in [0, 1].

    $\left(1 - \frac{(\sum_j |h_j| / U)^2}{\sum_j h_j^2 / U}\right) \frac{U}{U - 1}$, mean over
    examples: 0 where all are equally active, 1 where one is. Examples without any are left out;
    0 where that leaves none.

    Args:
        activations: `[example, unit]`; of a single unit it is 0.

    Example:
        >>> round(float(sparseness(jnp.array([[0.0, 3.0], [1.0, 1.0]]))), 4)
        0.5

    Reference:
        Vinje and Gallant 2000, doi:10.1126/science.287.5456.1273.
    """
    num_units = activations.shape[1]
    # Relative to the largest, as squares of small numbers underflow.
    largest = jnp.max(jnp.abs(activations), 1, keepdims=True)
    active = largest[:, 0] > 0
    relative = jnp.abs(activations) / jnp.where(largest > 0, largest, 1)
    first, second = jnp.mean(relative, 1), jnp.mean(relative**2, 1)
    values = (1 - first**2 / jnp.where(active, second, 1)) * num_units / max(1, num_units - 1)
    return jnp.sum(jnp.where(active, values, 0)) / jnp.maximum(jnp.sum(active), 1)


def deletion_curve(
    key: Array,
    make_network: MakeNetwork,
    variables: Variables,
    inputs: Array,
    labels: Array,
    example_losses: ExampleLosses,
) -> dict[str, Array]:
    """Mean losses as hidden units are deleted one after another, in random order.

    The network is read without dropout. Of every layer the same share is deleted: 0, 0.1, ..., 1,
    rounded to whole units. What remains is not scaled: the question is what the others make of the
    loss. The mean over `NUM_ORDERS` orders.

    Args:
        key: consumed.
        make_network: makes the network.
        variables: of one network.
        inputs: `[example, ...]`.
        labels: `[example]`.
        example_losses: losses of each example, by name.

    Returns:
        By name of a loss, `[share]`.

    Example:
        >>> def make_network(at_dropout):
        ...     def apply_fn(variables, inputs, key):
        ...         return at_dropout("hidden", inputs @ variables["params"], 0.5).sum(1)
        ...     return Network(apply_fn)
        >>> def squared_error(outputs, labels):
        ...     return {"mse": (outputs - labels) ** 2}
        >>> x, variables = jnp.ones((1, 1)), {"params": jnp.full((1, 10), 0.1)}
        >>> losses = deletion_curve(
        ...     jax.random.key(0), make_network, variables, x, jnp.ones(1), squared_error
        ... )
        >>> [round(float(loss), 2) for loss in losses["mse"]]
        [0.0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81, 1.0]
    """
    units = jax.eval_shape(partial(hidden_units, make_network), variables, inputs)

    def losses(ranks: dict[str, Array], share: Array) -> dict[str, Array]:
        def delete(name: str, x: Array, rate: Any) -> Array:
            if name not in units:
                return x
            kept = ranks[name] >= jnp.round(share * len(ranks[name]))
            return jnp.where(kept.reshape(1, *x.shape[1:]), x, 0)

        outputs = make_network(at_dropout=_each_call(delete))(variables, inputs, None)
        return jax.tree.map(jnp.mean, example_losses(outputs, labels))

    def order(order_key: Array) -> dict[str, Array]:
        keys = jax.random.split(order_key, len(units))
        ranks = {
            name: jax.random.permutation(layer_key, units[name].shape[1])
            for name, layer_key in zip(sorted(units), keys, strict=True)
        }
        return jax.lax.map(partial(losses, ranks), jnp.linspace(0, 1, NUM_SHARES))

    orders = jax.lax.map(order, jax.random.split(key, NUM_ORDERS))
    return jax.tree.map(lambda values: values.mean(0), orders)


def first_layer_features(variables: Variables, num_inputs: int) -> np.ndarray | None:
    """Weights into the first units, `[unit, input]`.

    Those of the first matrix named `kernel` that takes so many inputs; None where there is none,
    in a convolutional network for instance.

    Args:
        variables: of one network.
        num_inputs: how many numbers an example has.

    Example:
        >>> params = {"Dense_0": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> first_layer_features({"params": params}, 4).shape
        (8, 4)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        is_kernel = path and getattr(path[-1], "key", None) == "kernel"
        if is_kernel and np.ndim(leaf) == 2 and len(leaf) == num_inputs:
            return np.asarray(leaf).T
    return None


def measure(
    key: Array,
    make_network: MakeNetwork,
    variables: Variables,
    inputs: Array,
    labels: Array,
    example_losses: ExampleLosses,
) -> CoAdaptation:
    """All of this for one kind of network.

    Args:
        key: consumed.
        make_network: makes the network.
        variables: of one network in each replicate, with a leading axis.
        inputs: test inputs, `[example, ...]`.
        labels: `[example]`.
        example_losses: losses of each example, by name.

    Example:
        >>> def make_network(at_dropout):
        ...     def apply_fn(variables, inputs, key):
        ...         return at_dropout("hidden", inputs @ variables["params"], 0.5).sum(1)
        ...     return Network(apply_fn)
        >>> variables = {"params": jnp.array([[[1.0, -2.0]], [[3.0, 4.0]]])}
        >>> found = measure(
        ...     jax.random.key(0), make_network, variables, jnp.arange(4.0)[:, None], jnp.zeros(4),
        ...     lambda outputs, labels: {"mse": (outputs - labels) ** 2},
        ... )
        >>> round(found.correlation["hidden"].mean, 4)
        1.0
    """
    num_replicates = len(jax.tree.leaves(variables)[0])
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    layers = _hidden_layers(make_network, first, inputs)

    def of_units(activations: Array) -> dict[str, Array]:
        return {
            "correlation": mean_correlation(activations),
            "zero_share": jnp.mean((activations == 0).astype(jnp.float32)),
            "sparseness": sparseness(activations),
            # The bins begin at 0, or where a unit gives less.
            "min": jnp.minimum(jnp.min(activations), 0),
            "max": jnp.max(activations),
        }

    @jax.jit
    def of_layers(variables: Variables, inputs: Array) -> tuple[Any, Any, Any]:
        def units(member: Variables) -> dict[str, Array]:
            return hidden_units(make_network, member, inputs)

        def counts(member: Variables) -> dict[str, Array]:
            return {
                name: jnp.histogram(of, NUM_BINS, ends[name])[0] / of.size
                for name, of in units(member).items()
            }

        numbers = jax.lax.map(
            lambda member: {name: of_units(of) for name, of in units(member).items()}, variables
        )
        # The bins are the same in every replicate.
        ends = {}
        for name, of in numbers.items():
            low, high = jnp.min(of["min"]), jnp.max(of["max"])
            ends[name] = low, jnp.where(high > low, high, low + 1)
        shares = jax.lax.map(counts, variables)
        return numbers, ends, {name: of.mean(0) for name, of in shares.items()}

    @jax.jit
    def deleted(keys: Array, variables: Variables, inputs: Array, labels: Array) -> Any:
        def one(both: tuple[Array, Variables]) -> dict[str, Array]:
            return deletion_curve(both[0], make_network, both[1], inputs, labels, example_losses)

        curves = jax.lax.map(one, (keys, variables))
        return jax.tree.map(lambda values: values.mean(0), curves)

    numbers, ends, shares = jax.device_get(of_layers(variables, inputs))
    keys = jax.random.split(key, num_replicates)
    deletion = jax.device_get(deleted(keys, variables, inputs, labels)) if layers else {}
    features = first_layer_features(first, int(np.prod(inputs.shape[1:])))

    def intervals(name: str) -> dict[str, Any]:
        return {layer: mean_interval(numbers[layer][name].tolist()) for layer in layers}

    return CoAdaptation(
        correlation=intervals("correlation"),
        zero_share=intervals("zero_share"),
        sparseness=intervals("sparseness"),
        activation_counts={layer: shares[layer].tolist() for layer in layers},
        activation_min={layer: float(ends[layer][0]) for layer in layers},
        activation_max={layer: float(ends[layer][1]) for layer in layers},
        deleted=np.linspace(0, 1, NUM_SHARES).tolist(),
        deletion={name: values.tolist() for name, values in deletion.items()},
        features=None if features is None else features[:NUM_FEATURES].tolist(),
    )
