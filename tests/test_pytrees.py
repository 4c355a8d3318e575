"""Inputs and labels that are trees of arrays train and predict as the same numbers in one array."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdrop
import jdrop.linen
from jdrop import ensemble
from jdrop.inference import monte_carlo, weight_scaling
from jdrop.network import Network, predict
from jdrop.thinned import thin
from jdrop.train import TrainState, cross_entropy, fit, train_step

pytestmark = pytest.mark.grid

NUM_EXAMPLES = 12


@flax.struct.dataclass
class Example:
    left: Any
    right: Any


CONTAINERS = {
    "dict": (
        lambda x: {"left": x[:, :3], "right": x[:, 3:]},
        lambda x: (x["left"], x["right"]),
    ),
    "tuple with None": (lambda x: (x[:, :3], None, x[:, 3:]), lambda x: (x[0], x[2])),
    "nested": (
        lambda x: {"a": (x[:, :3],), "b": [x[:, 3:, None]]},
        lambda x: (x["a"][0], x["b"][0][..., 0]),
    ),
    "dataclass": (lambda x: Example(x[:, :3], x[:, 3:]), lambda x: (x.left, x.right)),
}
"""How an array of five columns becomes a tree, and how a network reads its two parts."""


def make_network(read):
    """Two layers with dropout between them, of the inputs that `read` puts side by side."""

    def apply_fn(variables, inputs, key):
        params = variables["params"]
        hidden = jnp.tanh(jnp.concatenate(read(inputs), 1) @ params["one"])
        if key is not None:
            hidden = jdrop.dropout(key, hidden, 0.5)
        return hidden @ params["two"]

    def init_fn(key, inputs):
        one_key, two_key = jax.random.split(key)
        width = jnp.concatenate(read(inputs), 1).shape[1]
        return {
            "params": {
                "one": jax.random.normal(one_key, (width, 16)),
                "two": jax.random.normal(two_key, (16, 3)),
            }
        }

    return Network(apply_fn, init_fn)


ARRAY_NETWORK = make_network(lambda x: (x[:, :3], x[:, 3:]))


def make_data(getkey):
    inputs = jax.random.normal(getkey(), (NUM_EXAMPLES, 5))
    return inputs, jax.random.randint(getkey(), (NUM_EXAMPLES,), 0, 3)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("thinned", [False, True])
def test_a_tree_of_inputs_trains_and_predicts_as_one_array(getkey, container, thinned):
    pack, read = CONTAINERS[container]
    inputs, labels = make_data(getkey)
    init_key, fit_key, sample_key = getkey(), getkey(), getkey()
    results = []
    for network, x in [(ARRAY_NETWORK, inputs), (make_network(read), pack(inputs))]:
        if thinned:
            network = thin(network, x, {"one": 0.5}, block_size=4)
        state = ensemble.init_ensemble(
            jax.random.clone(init_key), network, optax.adam(0.05), x, ensemble_size=2
        )
        state, losses = ensemble.fit_ensemble(
            jax.random.clone(fit_key), state, x, labels, num_epochs=2, batch_size=5
        )
        state, more = ensemble.train_step(jax.random.clone(fit_key), state, (x, labels))
        variables = state.variables
        first = jax.tree.map(lambda leaf: leaf[0], variables)
        key = jax.random.clone(sample_key)
        predictions = (
            ensemble.predict(None, network, variables, x),
            ensemble.predict(key, network, variables, x),
            predict(None, network, first, x),
            weight_scaling(network, first, x),
            monte_carlo(jax.random.clone(key), network, first, x, num_samples=3),
        )
        results.append((variables, losses, more, predictions))
    assert_same(*results)


@pytest.mark.parametrize("container", CONTAINERS)
def test_rows_choose_examples_of_every_array(getkey, container):
    pack, read = CONTAINERS[container]
    inputs, labels = make_data(getkey)
    rows, network, key = jnp.array([7, 1, 1, 4]), make_network(read), getkey()
    state = TrainState.create(network, network.init(getkey(), pack(inputs)), optax.sgd(0.1))
    chosen = fit(key, state, pack(inputs), labels, num_epochs=2, batch_size=2, rows=rows)
    same = fit(
        jax.random.clone(key),
        state,
        pack(inputs[rows]),
        labels[rows],
        num_epochs=2,
        batch_size=2,
    )
    assert_same(chosen[1], same[1])
    assert_same(chosen[0].variables, same[0].variables)


def test_outputs_and_labels_may_be_trees_in_training(getkey):
    """Two heads whose losses are added, against one array of outputs and one of labels."""
    inputs, labels = make_data(getkey)
    targets = jax.random.normal(getkey(), (NUM_EXAMPLES,))

    def apply_fn(variables, inputs, key):
        outputs = ARRAY_NETWORK(variables, inputs, key)
        return {"class": outputs, "heads": (outputs[:, 0],)}

    def tree_loss(outputs, labels):
        loss = cross_entropy(outputs["class"], labels["class"])
        return loss + (outputs["heads"][0] - labels["target"]) ** 2

    def array_loss(outputs, labels):
        loss = cross_entropy(outputs, labels[:, 0].astype(int))
        return loss + (outputs[:, 0] - labels[:, 1]) ** 2

    variables, key = ARRAY_NETWORK.init(getkey(), inputs), getkey()
    tree_state = TrainState.create(Network(apply_fn), variables, optax.sgd(0.1), tree_loss)
    array_state = TrainState.create(ARRAY_NETWORK, variables, optax.sgd(0.1), array_loss)
    tree_labels = {"class": labels, "target": targets}
    in_tree = fit(key, tree_state, inputs, tree_labels, num_epochs=3, batch_size=4)
    in_array = fit(
        jax.random.clone(key),
        array_state,
        inputs,
        jnp.stack([labels, targets], 1),
        num_epochs=3,
        batch_size=4,
    )
    np.testing.assert_allclose(in_tree[1], in_array[1], rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        in_tree[0].variables,
        in_array[0].variables,
    )


def test_a_network_may_train_without_labels(getkey):
    inputs, _ = make_data(getkey)
    network = Network(lambda variables, inputs, key: inputs @ variables["params"])
    state = TrainState.create(
        network,
        {"params": jax.random.normal(getkey(), (5, 5))},
        optax.adam(0.01),
        lambda outputs, labels: (outputs**2).mean(-1),
    )
    _, losses = fit(getkey(), state, inputs, None, num_epochs=30, batch_size=4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_module_with_tokens_and_a_mask_trains_and_predicts(getkey):
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, batch, train):
            x = nn.Embed(20, 8)(batch["tokens"])
            x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
            mask = batch["mask"][..., None]
            return nn.Dense(2)((x * mask).sum(1) / mask.sum(1))

    tokens = jax.random.randint(getkey(), (NUM_EXAMPLES, 6), 0, 20)
    inputs = {"tokens": tokens, "mask": jnp.arange(6)[None] < 1 + tokens[:, :1] % 6}
    labels, network = tokens[:, 0] % 2, jdrop.linen.as_network(Classifier())
    state = ensemble.init_ensemble(getkey(), network, optax.adam(0.1), inputs, ensemble_size=2)
    state, _ = ensemble.fit_ensemble(getkey(), state, inputs, labels, num_epochs=60, batch_size=6)
    log_probs = ensemble.predict(None, network, state.variables, inputs)
    assert (log_probs.argmax(-1) == labels[None]).mean() > 0.9
    # What stands where the mask is False has no effect.
    other = {**inputs, "tokens": jnp.where(inputs["mask"], tokens, 0)}
    np.testing.assert_allclose(
        ensemble.predict(None, network, state.variables, other), log_probs, atol=1e-5
    )


# Errors.


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (
            {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))},
            jnp.ones(4),
            r"got 4 in inputs\['a'\] and 3 in inputs\['b'\]",
        ),
        (jnp.ones((4, 2)), (jnp.ones(4), jnp.ones(5)), r"got 4 in inputs and 5 in labels\[1\]"),
        ({"a": jnp.ones(4), "b": 1.0}, jnp.ones(4), r"got a scalar for inputs\['b'\]"),
        (jnp.ones((2, 2)), [0, 1], r"got a scalar for labels\[0\]; make an array of a list"),
        ({}, (), "inputs must hold at least 1 array"),
    ],
)
def test_arrays_without_a_common_axis_of_examples_are_an_error(getkey, inputs, labels, message):
    state = TrainState.create(
        Network(lambda variables, inputs, key: inputs), {"params": jnp.ones(2)}, optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match=message):
        fit(getkey(), state, inputs, labels, num_epochs=1, batch_size=2)


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        ((jnp.ones((2, 3)), jnp.ones(2)), r"tuple with the arrays \(\(2, 3\), \(2,\)\)"),
        ({"logits": jnp.ones((2, 3))}, r"dict with the arrays \{'logits': \(2, 3\)\}"),
    ],
)
@pytest.mark.parametrize("regression", [False, True])
def test_predictions_that_are_not_one_array_are_an_error(getkey, outputs, got, regression):
    def network(variables, inputs, key):
        return outputs

    x, variables = jnp.ones((2, 3)), {"params": jnp.ones(2)}
    for function in (
        lambda: predict(None, network, variables, x, regression=regression),
        lambda: weight_scaling(network, variables, x, regression=regression),
        lambda: ensemble.predict(None, network, variables, x, regression=regression),
        lambda: monte_carlo(getkey(), network, variables, x, num_samples=2, regression=regression),
    ):
        with pytest.raises(TypeError, match=f"must return one array to predict, got {got}"):
            function()


def test_a_step_takes_inputs_without_a_common_axis(getkey):
    """A graph has one array of nodes and one of edges; the labels are those of its graphs."""

    def apply_fn(variables, graph, key):
        messages = graph["nodes"][graph["senders"]] @ variables["params"]
        return jax.ops.segment_sum(messages, graph["graph_of_edge"], 2)

    graph = {
        "nodes": jax.random.normal(getkey(), (5, 4)),
        "senders": jnp.array([0, 1, 2, 3, 4, 0]),
        "graph_of_edge": jnp.array([0, 0, 0, 1, 1, 0]),
    }
    state = TrainState.create(Network(apply_fn), {"params": jnp.zeros((4, 3))}, optax.sgd(0.1))
    _, loss = jax.jit(train_step)(getkey(), state, (graph, jnp.array([0, 2])))
    assert float(loss) == pytest.approx(np.log(3), rel=1e-6)
