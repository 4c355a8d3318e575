"""The claims of the theory on hidden units: do they co-adapt, and how sparse are they?

Hidden units are what dropout layers take in, so a plain network and a dropout network of one
architecture have the same ones. Numbers only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop.network import AtDropout, Network, Variables
from jdrop.statistics import mean_interval
from jdrop.study.results import CoAdaptation

MakeNetwork = Callable[[AtDropout], Network]
"""A network whose dropout layers are replaced, see `jdrop.linen.as_network`."""

ExampleLosses = Callable[[Array, Array], dict[str, Array]]
"""Outputs and labels -> scores of each example, by name."""

NUM_BINS = 30  # Of histograms of activations.
NUM_SHARES = 11  # Of deleted units: 0, 0.1, ..., 1.
NUM_ORDERS = 5  # In which units are deleted.
MAX_UNITS = 512  # Of a layer that are correlated: more are as good as these.
NUM_FEATURES = 64


def hidden_units(
    make_network: MakeNetwork, variables: Variables, inputs: Array
) -> dict[str, Array]:
    """What each dropout layer takes in, `[example, unit]`, in the network without dropout.

    Layers that drop inputs of the network itself are left out: these are no hidden units.
    """
    found: dict[str, Array] = {}

    def look(name: str, x: Array, rate: Any) -> Array:
        if x.shape != inputs.shape:
            found[name] = x.reshape(len(x), -1)
        return x

    make_network(look)(variables, inputs, None)
    return found


@jax.jit
def mean_correlation(activations: Array) -> Array:
    r"""The mean absolute correlation of two different units, over units that vary.

    $\frac{2}{U (U - 1)} \sum_{i < j} |\mathrm{corr}(h_i, h_j)|$; 0 where fewer than two units vary.

    Args:
        activations: `[example, unit]`.

    Example:
        >>> x = jnp.array([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [3.0, 6.0, 5.0]])
        >>> round(float(mean_correlation(x)), 4)
        1.0
    """
    deviations = activations - jnp.mean(activations, 0, keepdims=True)
    norms = jnp.linalg.norm(deviations, axis=0)
    size = jnp.max(jnp.abs(activations), 0) * jnp.sqrt(len(activations))
    varies = norms > 1e-5 * size
    scaled = deviations / jnp.where(varies, norms, 1)[None]
    pairs = varies[:, None] & varies[None] & ~jnp.eye(len(norms), dtype=bool)
    total = jnp.sum(jnp.where(pairs, jnp.abs(scaled.T @ scaled), 0))
    return total / jnp.maximum(jnp.sum(pairs), 1)


@jax.jit
def sparseness(activations: Array) -> Array:
    r"""How few units are active for an example, by Treves and Rolls, in [0, 1].

    $\left(1 - \frac{(\sum_j |h_j| / U)^2}{\sum_j h_j^2 / U}\right) \frac{U}{U - 1}$, mean over
    examples: 0 where all are equally active, 1 where one is. Examples without any are left out.

    Args:
        activations: `[example, unit]`, at least 2 units.

    Example:
        >>> round(float(sparseness(jnp.array([[0.0, 3.0], [1.0, 1.0]]))), 4)
        0.5

    Reference:
        Vinje and Gallant 2000, doi:10.1126/science.287.5456.1273.
    """
    num_units = activations.shape[1]
    first, second = jnp.mean(jnp.abs(activations), 1), jnp.mean(activations**2, 1)
    active = second > 0
    values = (1 - first**2 / jnp.where(active, second, 1)) * num_units / (num_units - 1)
    return jnp.sum(jnp.where(active, values, 0)) / jnp.maximum(jnp.sum(active), 1)


def deletion_curve(
    key: Array,
    make_network: MakeNetwork,
    variables: Variables,
    inputs: Array,
    labels: Array,
    example_losses: ExampleLosses,
) -> dict[str, Array]:
    """Mean losses `[share]` as hidden units are deleted one after another, in random order.

    The network is read without dropout. Of every layer the same share is deleted: 0, 0.1, ..., 1.
    What remains is not scaled. The mean over `NUM_ORDERS` orders.

    Args:
        key: consumed.
        make_network: makes the network.
        variables: of one network.
        inputs: `[example, ...]`.
        labels: `[example]`.
        example_losses: losses of each example, by name.
    """
    units = jax.eval_shape(partial(hidden_units, make_network), variables, inputs)

    def losses(order_key: Array, share: Array) -> dict[str, Array]:
        keys = dict(zip(sorted(units), jax.random.split(order_key, len(units)), strict=True))

        def delete(name: str, x: Array, rate: Any) -> Array:
            if name not in units:
                return x
            num_units = units[name].shape[1]
            rank = jax.random.permutation(jax.random.clone(keys[name]), num_units)
            kept = rank >= jnp.round(share * num_units)
            return jnp.where(kept.reshape(1, *x.shape[1:]), x, 0)

        outputs = make_network(delete)(variables, inputs, None)
        return jax.tree.map(jnp.mean, example_losses(outputs, labels))

    def order(order_key: Array) -> dict[str, Array]:
        shares = jnp.linspace(0, 1, NUM_SHARES)
        return jax.lax.map(lambda share: losses(jax.random.clone(order_key), share), shares)

    orders = jax.lax.map(order, jax.random.split(key, NUM_ORDERS))
    return jax.tree.map(lambda values: values.mean(0), orders)


def first_layer_features(variables: Variables) -> np.ndarray | None:
    """Weights into the first units, `[unit, input]`: of the first matrix named `kernel`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if getattr(path[-1], "key", None) == "kernel" and np.ndim(leaf) == 2:
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
    """
    num_replicates = len(jax.tree.leaves(variables)[0])

    @jax.jit
    def of_units(variables: Variables) -> dict[str, dict[str, Array]]:
        def numbers(activations: Array) -> dict[str, Array]:
            top = jnp.max(activations)
            counts, _ = jnp.histogram(activations, NUM_BINS, (0, jnp.where(top > 0, top, 1)))
            return {
                "correlation": mean_correlation(activations[:, :MAX_UNITS]),
                "zero_share": jnp.mean((activations == 0).astype(jnp.float32)),
                "sparseness": sparseness(activations),
                "counts": counts / activations.size,
                "top": top,
            }

        def one(member: Variables) -> dict[str, dict[str, Array]]:
            units = hidden_units(make_network, member, inputs)
            return {name: numbers(activations) for name, activations in units.items()}

        return jax.lax.map(one, variables)

    @jax.jit
    def deleted(keys: Array, variables: Variables) -> dict[str, Array]:
        return jax.lax.map(
            lambda both: deletion_curve(
                both[0], make_network, both[1], inputs, labels, example_losses
            ),
            (keys, variables),
        )

    found = jax.tree.map(np.asarray, of_units(variables))
    deletion = deleted(jax.random.split(key, num_replicates), variables) if found else {}
    features = first_layer_features(jax.tree.map(lambda leaf: leaf[0], variables))

    def intervals(name: str) -> dict[str, Any]:
        return {layer: mean_interval(list(values[name])) for layer, values in found.items()}

    return CoAdaptation(
        correlation=intervals("correlation"),
        zero_share=intervals("zero_share"),
        sparseness=intervals("sparseness"),
        activation_counts={
            layer: values["counts"].mean(0).tolist() for layer, values in found.items()
        },
        activation_max={layer: float(values["top"].mean()) for layer, values in found.items()},
        deleted=np.linspace(0, 1, NUM_SHARES).tolist(),
        deletion={name: np.asarray(values).mean(0).tolist() for name, values in deletion.items()},
        features=None if features is None else features[:NUM_FEATURES].tolist(),
    )
