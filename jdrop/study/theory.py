"""The claims of the theory on hidden units: do they co-adapt, and how sparse are they?

Hidden units are the inputs of dropout layers, so a plain network and a dropout network of one
architecture have the same ones. Nothing is drawn or printed here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var

from jdrop.network import DropoutSite, Network, Variables, read_sites
from jdrop.statistics import mean_interval
from jdrop.study.analyses import CoAdaptation
from jdrop.study.first_layer import first_layer_tiles

ExampleLosses = Callable[[Array, Array], dict[str, Array]]
"""Outputs and labels -> scores of each example, by name."""

NUM_BINS = 30  # Of histograms of activations.
NUM_SHARES = 11  # Of deleted units: 0, 0.1, ..., 1.
NUM_ORDERS = 5  # In which units are deleted.
MAX_UNITS = 512  # Correlations of larger layers are those of a random choice.
NUM_FEATURES = 64


def hidden_units(network: Network, variables: Variables, inputs: Any) -> dict[str, Array]:
    """The inputs of each dropout layer, in the network without dropout.

    Layers are in the order of their calls; the second call of a layer has a name of its own,
    "Dropout_0 (2)". A layer whose inputs depend on no parameter drops inputs of the network, not
    hidden units, and is left out. So is a layer inside a transformation such as `nn.scan`.

    Args:
        network: made by `as_network`.
        variables: of one network.
        inputs: `[example, ...]`, or a pytree of such arrays.

    Returns:
        By layer, `[example, unit]`, at least float32. If a layer has more axes, every position is
        a unit.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> dropout = nn.Dropout(0.5, deterministic=False)
        >>> module = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, dropout])
        >>> params = {"layers_0": {"kernel": jnp.array([[-1.0, 2.0]])}}
        >>> network = jdrop.linen.as_network(module)
        >>> hidden_units(network, {"params": params}, jnp.ones((1, 1)))
        {'layers_2': Array([[0., 2.]], dtype=float32)}
    """
    units = _layer_inputs(network, variables, inputs)
    return {name: units[name] for name in _hidden_layers(network, variables, inputs)}


def _hidden_layers(network: Network, variables: Variables, inputs: Any) -> list[str]:
    """Dropout layers whose inputs depend on parameters, in the order of their calls."""
    names: list[str] = []

    def trace(params: Any) -> list[Array]:
        units = _layer_inputs(network, {**variables, "params": params}, inputs)
        names.extend(units)
        return list(units.values())

    jaxpr = jax.make_jaxpr(trace)(variables["params"]).jaxpr
    dependent = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(operand, Var) and operand in dependent for operand in equation.invars):
            dependent.update(equation.outvars)
    return [
        name
        for name, output in zip(names, jaxpr.outvars, strict=True)
        if isinstance(output, Var) and output in dependent
    ]


def _layer_inputs(network: Network, variables: Variables, inputs: Any) -> dict[str, Array]:
    """The inputs of every dropout layer outside transformations, `[example, unit]`."""

    def read(site: DropoutSite, units: Array) -> tuple[Array, Array]:
        precise = units.astype(jnp.promote_types(units.dtype, jnp.float32))
        return units, precise.reshape(len(units), -1)

    _, values, _ = read_sites(None, read, network, variables, inputs)
    return {_call_name(name, index): units for (name, index), units in values.items()}


def _call_name(name: str, index: int) -> str:
    """The name of a layer's call."""
    return name if index == 0 else f"{name} ({index + 1})"


@jax.jit
def mean_correlation(activations: Array) -> Array:
    r"""The mean absolute correlation of two different units, over units that vary.

    $\frac{2}{U (U - 1)} \sum_{i < j} |\mathrm{corr}(h_i, h_j)|$; 0 where fewer than two units vary.
    Of a layer with more units, `MAX_UNITS` are drawn: the same ones for layers of one width.

    Args:
        activations: `[example, unit]`.

    Example:
        >>> x = jnp.array([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [3.0, 6.0, 5.0]])
        >>> round(float(mean_correlation(x)), 4)
        1.0
    """
    num_units = activations.shape[1]
    if num_units > MAX_UNITS:
        # Not the first ones: neighbours in a layer of convolutions are more alike than others.
        drawn = np.random.default_rng(0).choice(num_units, MAX_UNITS, replace=False)
        activations = activations[:, np.sort(drawn)]
    deviations = activations - jnp.mean(activations, 0, keepdims=True)
    norms = jnp.linalg.norm(deviations, axis=0)
    size = jnp.max(jnp.abs(activations), 0) * jnp.sqrt(len(activations))
    # Rounding of the mean leaves small deviations of a constant.
    varies = norms > 1e-5 * size
    scaled = deviations / jnp.where(varies, norms, 1)[None]
    pairs = varies[:, None] & varies[None] & ~jnp.eye(len(norms), dtype=bool)
    correlations = jnp.matmul(scaled.T, scaled, precision="highest")
    total = jnp.sum(jnp.where(pairs, jnp.abs(correlations), 0))
    return total / jnp.maximum(jnp.sum(pairs), 1)


@jax.jit
def sparseness(activations: Array) -> Array:
    r"""The sparseness of Treves and Rolls, in [0, 1]: how few units are active for an example.

    $\left(1 - \frac{(\sum_j |h_j| / U)^2}{\sum_j h_j^2 / U}\right) \frac{U}{U - 1}$, mean over
    examples: 0 if all units are equally active, 1 if a single unit is. Examples without an active
    unit are left out; if none remains, the sparseness is 0.

    Args:
        activations: `[example, unit]`; a single unit has sparseness 0.

    Example:
        >>> round(float(sparseness(jnp.array([[0.0, 3.0], [1.0, 1.0]]))), 4)
        0.5

    Reference:
        Vinje and Gallant 2000, doi:10.1126/science.287.5456.1273.
    """
    num_units = activations.shape[1]
    # Relative to the largest, since squares of small numbers underflow.
    largest = jnp.max(jnp.abs(activations), 1, keepdims=True)
    active = largest[:, 0] > 0
    relative = jnp.abs(activations) / jnp.where(largest > 0, largest, 1)
    first, second = jnp.mean(relative, 1), jnp.mean(relative**2, 1)
    values = (1 - first**2 / jnp.where(active, second, 1)) * num_units / max(1, num_units - 1)
    return jnp.sum(jnp.where(active, values, 0)) / jnp.maximum(jnp.sum(active), 1)


def deletion_curve(
    key: Array,
    network: Network,
    variables: Variables,
    inputs: Any,
    labels: Array,
    example_losses: ExampleLosses,
) -> dict[str, Array]:
    """Mean losses as hidden units are deleted one after another, in random order.

    The network is read without dropout. Every layer loses the same share of its units: 0, 0.1, ...,
    1, rounded to whole units. The remaining units are not scaled, so the loss shows how much they
    depend on the deleted ones. The mean over `NUM_ORDERS` orders.

    Args:
        key: consumed.
        network: made by `as_network`.
        variables: of one network.
        inputs: `[example, ...]`, or a pytree of such arrays.
        labels: `[example]`, or `[example, length]` of tokens.
        example_losses: losses of each example, by name.

    Returns:
        By name of a loss, `[share]`.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> dropout = nn.Dropout(0.5, deterministic=False)
        >>> module = nn.Sequential([nn.Dense(10), dropout, lambda hidden: hidden.sum(1)])
        >>> params = {"layers_0": {"kernel": jnp.full((1, 10), 0.1), "bias": jnp.zeros(10)}}
        >>> def squared_error(outputs, labels):
        ...     return {"mse": (outputs - labels) ** 2}
        >>> losses = deletion_curve(
        ...     jax.random.key(0), jdrop.linen.as_network(module), {"params": params},
        ...     jnp.ones((1, 1)), jnp.ones(1), squared_error,
        ... )
        >>> [round(float(loss), 2) for loss in losses["mse"]]
        [0.0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81, 1.0]
    """
    units = jax.eval_shape(partial(hidden_units, network), variables, inputs)

    def mean_losses(ranks: dict[str, Array], share: Array) -> dict[str, Array]:
        def delete(site: DropoutSite, layer_inputs: Array) -> Array:
            name = _call_name(site.name, site.index)
            if name not in units:
                return layer_inputs
            is_kept = ranks[name] >= jnp.round(share * len(ranks[name]))
            return jnp.where(is_kept.reshape(1, *layer_inputs.shape[1:]), layer_inputs, 0)

        outputs = network.replace_dropout(delete)(variables, inputs, None)
        return jax.tree.map(jnp.mean, example_losses(outputs, labels))

    def one_order(order_key: Array) -> dict[str, Array]:
        layer_keys = jax.random.split(order_key, len(units))
        ranks = {
            name: jax.random.permutation(layer_key, units[name].shape[1])
            for name, layer_key in zip(sorted(units), layer_keys, strict=True)
        }
        return jax.lax.map(partial(mean_losses, ranks), jnp.linspace(0, 1, NUM_SHARES))

    curves = jax.lax.map(one_order, jax.random.split(key, NUM_ORDERS))
    return jax.tree.map(lambda values: values.mean(0), curves)


def measure(
    key: Array,
    network: Network,
    variables: Variables,
    inputs: Any,
    labels: Array,
    example_losses: ExampleLosses,
) -> CoAdaptation:
    """Measures the hidden units of one network in each replicate.

    Args:
        key: consumed.
        network: made by `as_network`.
        variables: of one network in each replicate, with a leading axis.
        inputs: test inputs, `[example, ...]` or a pytree of such arrays.
        labels: `[example]`, or `[example, length]` of tokens.
        example_losses: losses of each example, by name.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> dropout = nn.Dropout(0.5, deterministic=False)
        >>> module = nn.Sequential([nn.Dense(2, use_bias=False), dropout])
        >>> kernels = jnp.array([[[1.0, -2.0]], [[3.0, 4.0]]])
        >>> result = measure(
        ...     jax.random.key(0), jdrop.linen.as_network(module),
        ...     {"params": {"layers_0": {"kernel": kernels}}}, jnp.arange(4.0)[:, None],
        ...     jnp.zeros(4), lambda outputs, labels: {"mse": (outputs.sum(1) - labels) ** 2},
        ... )
        >>> round(result.correlation["layers_1"].mean, 4)
        1.0
    """
    num_replicates = len(jax.tree.leaves(variables)[0])
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    layers = _hidden_layers(network, first, inputs)

    def describe(activations: Array) -> dict[str, Array]:
        return {
            "correlation": mean_correlation(activations),
            "zero_share": jnp.mean((activations == 0).astype(jnp.float32)),
            "sparseness": sparseness(activations),
            # The bins begin at 0, or at the smallest activation if it is negative.
            "min": jnp.minimum(jnp.min(activations), 0),
            "max": jnp.max(activations),
        }

    @jax.jit
    def measure_layers(variables: Variables, inputs: Any) -> tuple[Any, Any, Any]:
        def units(member: Variables) -> dict[str, Array]:
            return hidden_units(network, member, inputs)

        def shares_of_bins(member: Variables) -> dict[str, Array]:
            return {
                name: jnp.histogram(activations, NUM_BINS, bounds[name])[0] / activations.size
                for name, activations in units(member).items()
            }

        measures = jax.lax.map(
            lambda member: {name: describe(layer) for name, layer in units(member).items()},
            variables,
        )
        # The bins are the same in every replicate.
        bounds = {}
        for name, values in measures.items():
            low, high = jnp.min(values["min"]), jnp.max(values["max"])
            bounds[name] = low, jnp.where(high > low, high, low + 1)
        shares = jax.lax.map(shares_of_bins, variables)
        return measures, bounds, {name: values.mean(0) for name, values in shares.items()}

    @jax.jit
    def mean_deletion(keys: Array, variables: Variables, inputs: Any, labels: Array) -> Any:
        def delete(key_and_member: tuple[Array, Variables]) -> dict[str, Array]:
            member_key, member = key_and_member
            return deletion_curve(member_key, network, member, inputs, labels, example_losses)

        curves = jax.lax.map(delete, (keys, variables))
        return jax.tree.map(lambda values: values.mean(0), curves)

    measures, bounds, shares = jax.device_get(measure_layers(variables, inputs))
    keys = jax.random.split(key, num_replicates)
    deletion = jax.device_get(mean_deletion(keys, variables, inputs, labels)) if layers else {}
    tiles = first_layer_tiles(network, first, inputs)

    def intervals(name: str) -> dict[str, Any]:
        return {layer: mean_interval(measures[layer][name].tolist()) for layer in layers}

    return CoAdaptation(
        correlation=intervals("correlation"),
        zero_share=intervals("zero_share"),
        sparseness=intervals("sparseness"),
        activation_counts={layer: shares[layer].tolist() for layer in layers},
        activation_min={layer: float(bounds[layer][0]) for layer in layers},
        activation_max={layer: float(bounds[layer][1]) for layer in layers},
        deleted=np.linspace(0, 1, NUM_SHARES).tolist(),
        deletion={name: values.tolist() for name, values in deletion.items()},
        features=None if tiles is None else tiles[:NUM_FEATURES].tolist(),
    )
