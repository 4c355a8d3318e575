"""Hidden units, against NumPy and networks whose units are known."""

import itertools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.statistics import mean_interval
from jdrop.study import theory
from jdrop.study.models import MLP

X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)), jnp.float32)


def correlation_by_hand(activations):
    activations = activations[:, np.ptp(activations, 0) > 0]
    matrix = np.abs(np.corrcoef(activations.T))
    return matrix[np.triu_indices(len(matrix), 1)].mean()


def sparseness_by_hand(activations):
    values = []
    for example in np.abs(activations.astype(np.float64)):
        if example.any():
            ratio = example.mean() ** 2 / (example**2).mean()
            values.append((1 - ratio) / (1 - 1 / len(example)))
    return np.mean(values)


def test_mean_correlation_equals_that_of_numpy():
    rng = np.random.default_rng(1)
    activations = rng.normal(size=(50, 9)) @ rng.normal(size=(9, 9)) + 10
    activations = np.maximum(activations, 9)
    activations[:, 3] = 0.1  # A mean with rounding.
    activations[:, 5] = 0
    ours = theory.mean_correlation(jnp.asarray(activations, jnp.float32))
    np.testing.assert_allclose(ours, correlation_by_hand(activations), rtol=1e-4)


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        (np.outer(np.arange(5), [1, 2, -3]), 1),  # Copies.
        ([[1, 1], [1, -1], [-1, 1], [-1, -1]], 0),
        (np.full((5, 3), 0.1), 0),
        ([[1, 2], [1, 3]], 0),  # One unit varies.
        (np.zeros((4, 1)), 0),
    ],
    ids=["copies", "orthogonal", "constant", "one varies", "one unit"],
)
def test_mean_correlation_of_known_units(activations, expected):
    ours = theory.mean_correlation(jnp.asarray(activations, jnp.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_correlations_of_a_wide_layer_are_those_of_drawn_units():
    rng = np.random.default_rng(1)
    # The first half are copies of one unit, so the first ones tell nothing of the others.
    activations = rng.normal(size=(20, 4)) @ rng.normal(size=(4, 2 * theory.MAX_UNITS))
    activations[:, : theory.MAX_UNITS] = activations[:, :1]
    ours = theory.mean_correlation(jnp.asarray(activations, jnp.float32))
    expected = correlation_by_hand(activations)
    assert expected < 0.7
    assert float(ours) == pytest.approx(expected, abs=0.05)


def test_sparseness_is_the_mean_over_examples():
    rng = np.random.default_rng(1)
    activations = np.maximum(rng.normal(size=(30, 9)), 0).astype(np.float32)
    activations[3] = 0
    expected = sparseness_by_hand(activations)
    np.testing.assert_allclose(theory.sparseness(jnp.asarray(activations)), expected, rtol=1e-5)
    # It has no unit of measure, and squares of small numbers do not underflow.
    small = theory.sparseness(jnp.asarray(1e-30 * activations))
    np.testing.assert_allclose(small, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("activations", "expected"),
    [(np.eye(4), 1), (-np.ones((4, 4)), 0), (np.zeros((4, 4)), 0), (np.ones((4, 1)), 0)],
    ids=["one active", "all active", "none active", "one unit"],
)
def test_sparseness_of_known_units(activations, expected):
    ours = theory.sparseness(jnp.asarray(activations, jnp.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


# Networks. The first hidden layer is as wide as the inputs, so widths do not tell them apart.


def dense_params(widths, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"Dense_{layer}": {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1]), jnp.float32),
        }
        for layer, shape in enumerate(itertools.pairwise(widths))
    }


def relu_layers(params, x):
    """The hidden layers in numpy."""
    layers = []
    for of in list(params.values())[:-1]:
        x = np.maximum(x @ np.asarray(of["kernel"]) + np.asarray(of["bias"]), 0)
        layers.append(x)
    return layers


NETWORK = jdrop.linen.as_network(MLP(hidden=(4, 6), num_outputs=3, input_rate=0.2))


def test_hidden_units_are_the_inputs_of_dropout_layers_that_depend_on_parameters():
    params = dense_params([4, 4, 6, 3])
    units = theory.hidden_units(NETWORK, {"params": params}, X)
    assert list(units) == ["Dropout_1", "Dropout_2"]
    for ours, expected in zip(units.values(), relu_layers(params, np.asarray(X)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    jitted = jax.jit(partial(theory.hidden_units, NETWORK))({"params": params}, X)
    np.testing.assert_allclose(jitted["Dropout_1"], units["Dropout_1"], rtol=1e-5)


class Shared(nnx.Module):
    """One dropout layer for the inputs, made flat and scaled, and hidden layers of all widths."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wide = nnx.Linear(4, 6, rngs=rngs)
        self.narrow = nnx.Linear(6, 2, rngs=rngs, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(x.reshape(len(x), -1) / 255)
        x = self.dropout(self.wide(x).reshape(-1, 2, 3)).reshape(-1, 6)
        return self.dropout(self.narrow(x))


def test_each_call_of_a_layer_has_a_name_of_its_own():
    network = jdrop.nnx.as_network(Shared)
    x = X.reshape(20, 2, 2)
    variables = jax.jit(network.init)(jax.random.key(0), x)
    units = theory.hidden_units(network, variables, x)
    assert {name: (of.shape, of.dtype) for name, of in units.items()} == {
        "dropout (2)": ((20, 6), jnp.float32),
        "dropout (3)": ((20, 2), jnp.float32),
    }
    losses = theory.deletion_curve(jax.random.key(1), network, variables, x, x, size_of_outputs)
    assert losses["size"].shape == (theory.NUM_SHARES,)
    assert losses["size"][0] > 0
    assert losses["size"][-1] == 0


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))


class PartlyLifted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.remat(Block)(name="checkpointed")(x)
        each = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})
        return Block(name="plain")(each(name="mapped")(x))


@pytest.mark.slow
def test_layers_within_transformations_are_left_out():
    network = jdrop.linen.as_network(PartlyLifted(), has_dropout=False)
    variables = jax.jit(network.init)(jax.random.key(0), X)
    with jax.checking_leaks():
        units = jax.jit(partial(theory.hidden_units, network))(variables, X)
    assert list(units) == ["plain/Dropout_0"]


def size_of_outputs(outputs, labels):
    return {"size": jnp.abs(outputs).astype(jnp.float32).sum(1)}


def squared_error(outputs, labels):
    return {"mse": (outputs[:, 0] - labels) ** 2}


def sum_of_units(hidden):
    return hidden.sum(1, keepdims=True)


LINEAR = jdrop.linen.as_network(
    nn.Sequential(
        [
            nn.Dense(10, use_bias=False),
            nn.Dropout(0.5, deterministic=False),
            sum_of_units,
            nn.Dense(1),
        ]
    )
)
"""The sum of ten hidden units, and a bias."""


def linear_variables(kernel, bias):
    """The variables of `LINEAR`, whose last layer has the weight 1."""
    last = {"kernel": jnp.ones((*jnp.shape(bias)[:-1], 1, 1)), "bias": jnp.asarray(bias)}
    return {"params": {"layers_0": {"kernel": jnp.asarray(kernel)}, "layers_3": last}}


def test_deletion_counts_units_and_ends_at_the_bias():
    # Ten units of 1 each: with k deleted the output is 10 - k + bias, whatever the order.
    variables = linear_variables(jnp.ones((1, 10)), jnp.full(1, 3.0))
    ones, labels = jnp.ones((5, 1)), jnp.arange(5.0)
    losses = theory.deletion_curve(
        jax.random.key(0), LINEAR, variables, ones, labels, squared_error
    )
    outputs = 10 - np.arange(11) + 3
    expected = ((outputs[:, None] - np.arange(5)) ** 2).mean(1)
    np.testing.assert_allclose(losses["mse"], expected, rtol=1e-5)


def test_deletion_deletes_units_one_by_one_in_random_orders():
    # Units of 1, 2, 4, ...: the output tells which are left.
    values = 2.0 ** np.arange(10)
    variables = linear_variables(jnp.asarray(values[None], jnp.float32), jnp.zeros(1))
    outputs = []

    def look(out, labels):
        jax.debug.callback(lambda x: outputs.append(int(x)), out[0, 0], ordered=True)
        return {"output": out[:, 0]}

    losses = theory.deletion_curve(
        jax.random.key(0), LINEAR, variables, jnp.ones((1, 1)), jnp.ones(1), look
    )
    jax.effects_barrier()
    orders = np.array(outputs).reshape(theory.NUM_ORDERS, 11)
    for order in orders:
        deleted = order[:-1] - order[1:]  # One unit more at each step, and each once.
        assert sorted(deleted) == sorted(values)
    # Chance that two of them are the same: 10 / 10!, 3e-6; the key is fixed.
    assert len({tuple(order) for order in orders}) == theory.NUM_ORDERS
    np.testing.assert_allclose(losses["output"], orders.mean(0), rtol=1e-6)


def test_measure_is_the_mean_over_replicates():
    members = [dense_params([4, 4, 6, 3], seed) for seed in range(3)]
    variables = {"params": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}

    def losses(outputs, labels):
        return {"size": jnp.abs(outputs).sum(1), "first": outputs[:, 0]}

    labels = jnp.zeros(20)
    measured = theory.measure(jax.random.key(0), NETWORK, variables, X, labels, losses)
    by_hand = [relu_layers(params, np.asarray(X)) for params in members]
    for index, layer in enumerate(["Dropout_1", "Dropout_2"]):
        units = [layers[index] for layers in by_hand]
        for ours, reference in (
            (measured.correlation, correlation_by_hand),
            (measured.zero_share, lambda of: np.mean(of == 0)),
            (measured.sparseness, sparseness_by_hand),
        ):
            expected = mean_interval([float(reference(of)) for of in units])
            assert ours[layer].mean == pytest.approx(expected.mean, rel=1e-4)
            assert ours[layer].low == pytest.approx(expected.low, rel=1e-3)
            assert list(ours) == ["Dropout_1", "Dropout_2"]
        top = np.max(units)
        assert measured.activation_max[layer] == pytest.approx(top, rel=1e-5)
        # A value at the edge of a bin may be in either, by its rounding.
        assert measured.activation_min[layer] == min(0, np.min(units))
        counts, _ = np.histogram(units, theory.NUM_BINS, (measured.activation_min[layer], top))
        np.testing.assert_allclose(
            measured.activation_counts[layer], counts / np.size(units), atol=2.1 / np.size(units)
        )
        assert sum(measured.activation_counts[layer]) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(measured.deleted, np.linspace(0, 1, theory.NUM_SHARES))
    ends = {name: (curve[0], curve[-1]) for name, curve in measured.deletion.items()}
    whole, biases = [], []
    for params, layers in zip(members, by_hand, strict=True):
        last = jax.tree.map(np.asarray, params["Dense_2"])
        whole.append(layers[-1] @ last["kernel"] + last["bias"])
        biases.append(last["bias"])
    assert ends == {
        "size": pytest.approx(
            (np.abs(whole).sum(2).mean(), np.abs(biases).sum(1).mean()), rel=1e-4
        ),
        "first": pytest.approx(
            (np.mean(whole, (0, 1))[0], np.mean(biases, 0)[0]), rel=1e-4, abs=1e-5
        ),
    }
    assert measured.features is None  # Four inputs are a table.


def test_features_are_those_of_the_first_replicate():
    network = jdrop.linen.as_network(MLP(hidden=(70,), num_outputs=3))
    members = [dense_params([64, 70, 3], seed) for seed in range(2)]
    variables = {"params": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
    measured = theory.measure(
        jax.random.key(0), network, variables, jnp.ones((5, 64)), jnp.zeros(5), size_of_outputs
    )
    kernel = np.asarray(members[0]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(measured.features, kernel.T[: theory.NUM_FEATURES])


def test_histograms_count_negative_activations():
    values = np.linspace(-3, 1, 10)
    kernel = jnp.asarray(values[None, None], jnp.float32)
    variables = linear_variables(kernel, jnp.zeros((1, 1)))
    ones = jnp.ones((5, 1))
    measured = theory.measure(
        jax.random.key(0), LINEAR, variables, ones, jnp.zeros(5), squared_error
    )
    assert (measured.activation_min["layers_1"], measured.activation_max["layers_1"]) == (-3, 1)
    counts, _ = np.histogram(values, theory.NUM_BINS, (-3, 1))
    # A value at the edge of a bin may be in either, by its rounding.
    np.testing.assert_allclose(np.cumsum(measured.activation_counts["layers_1"])[-1], 1, rtol=1e-5)
    np.testing.assert_allclose(measured.activation_counts["layers_1"], counts / 10, atol=0.101)


def test_a_network_without_hidden_units_has_no_measures():
    network = jdrop.linen.as_network(nn.Dense(3))
    variables = {"params": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))}}
    measured = theory.measure(
        jax.random.key(0), network, variables, X, jnp.zeros(20), size_of_outputs
    )
    assert measured.correlation == measured.activation_counts == measured.deletion == {}
