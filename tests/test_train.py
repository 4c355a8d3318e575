import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import NETWORKS, softmax_regression

from jdrop import keep_mask
from jdrop.network import Network
from jdrop.train import TrainState, cross_entropy, fit, train_step

pytestmark = pytest.mark.grid


def make_data(key, num_examples=16):
    input_key, label_key = jax.random.split(key)
    inputs = jax.random.normal(input_key, (num_examples, 4))
    return inputs, jax.random.randint(label_key, (num_examples,), 0, 3)


def make_state(key, network, inputs, optimizer=None):
    return TrainState.create(network, network.init(key, inputs), optimizer or optax.adam(0.02))


def test_one_sgd_step_equals_the_step_by_hand(getkey):
    """Forward and backward through the thinned network, written out in NumPy."""
    network = softmax_regression(rate=0.5)
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), network, inputs, optax.sgd(0.1))
    mask_key = getkey()
    after, loss = train_step(mask_key, state, (inputs, labels))

    kernel, bias = (
        np.asarray(state.variables["params"][k], np.float64) for k in ("kernel", "bias")
    )

    mask = np.asarray(keep_mask(jax.random.clone(mask_key), inputs.shape, 0.5))
    thinned = np.where(mask, np.asarray(inputs, np.float64) / 0.5, 0)
    logits = thinned @ kernel + bias
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected_loss = -np.log(probs[np.arange(16), labels]).mean()
    delta = (probs - np.eye(3)[np.asarray(labels)]) / 16
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(
        after.variables["params"]["kernel"], kernel - 0.1 * thinned.T @ delta, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        after.variables["params"]["bias"], bias - 0.1 * delta.sum(0, keepdims=True), rtol=1e-5
    )
    assert int(after.step) == 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_fit_memorises_few_examples(getkey, kind):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS[kind], inputs)
    state, losses = fit(getkey(), state, inputs, labels, num_epochs=400, batch_size=16)
    logits = NETWORKS[kind](state.variables, inputs, None)
    assert losses[-1] < losses[0] / 2
    assert jnp.mean(jnp.argmax(logits, -1) == labels) > 0.9


@pytest.mark.parametrize("kind", NETWORKS)
def test_batch_statistics_follow_the_data(getkey, kind):
    """After many steps the running mean is that of the hidden layer's outputs over the data."""
    inputs, labels = make_data(getkey(), 64)
    inputs = inputs + 3
    state = make_state(getkey(), NETWORKS[kind], inputs, optax.sgd(0.0))
    state, _ = fit(getkey(), state, inputs, labels, num_epochs=600, batch_size=64)
    params = state.variables["params"]
    layer = params["Dense_0"] if kind == "linen" else params["hidden"]
    hidden = inputs @ layer["kernel"] + layer["bias"][None]
    statistics = (
        state.variables["batch_stats"]["BatchNorm_0"]
        if kind == "linen"
        else state.variables["state"]["norm"]
    )
    np.testing.assert_allclose(statistics["mean"], hidden.mean(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", NETWORKS)
def test_same_key_same_run_and_another_key_another(getkey, kind):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS[kind], inputs)
    key = getkey()

    def run(key):
        return fit(key, state, inputs, labels, num_epochs=3, batch_size=8)[1]

    first = run(key)
    np.testing.assert_array_equal(run(jax.random.clone(key)), first)
    assert not np.array_equal(run(getkey()), first)


@pytest.mark.slow
def test_a_fit_in_parts_equals_the_fit_in_one(getkey):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    key = getkey()
    whole, losses = fit(key, state, inputs, labels, num_epochs=5, batch_size=4)
    parts = []
    for num_epochs in (2, 3):
        state, part = fit(
            jax.random.clone(key), state, inputs, labels, num_epochs=num_epochs, batch_size=4
        )
        parts.append(part)
    np.testing.assert_array_equal(jnp.concatenate(parts), losses)
    jax.tree.map(np.testing.assert_array_equal, state.variables, whole.variables)


def counting_network(num_examples, num_steps):
    """A network whose state counts how often it saw each example, and keeps the keys it got."""

    def train_fn(variables, inputs, key):
        seen, step = variables["seen"], variables["step"]
        updated = {
            "seen": seen.at[inputs[:, 0].astype(int)].add(1),
            "keys": variables["keys"].at[step].set(jax.random.key_data(key)),
            "step": step + 1,
        }
        return inputs @ variables["params"], {**variables, **updated}

    def init_fn(key, inputs):
        return {
            "params": jax.random.normal(key, (1, 3)),
            "seen": jnp.zeros(num_examples, int),
            "keys": jnp.zeros((num_steps, 2), jnp.uint32),
            "step": jnp.zeros((), int),
        }

    return Network(lambda variables, inputs, key: inputs @ variables["params"], init_fn, train_fn)


@pytest.mark.parametrize(("batch_size", "left_over"), [(5, 0), (7, 6)])
def test_an_epoch_sees_every_example_once(getkey, batch_size, left_over):
    num_epochs = 4
    network = counting_network(20, num_epochs * (20 // batch_size))
    inputs = jnp.arange(20.0)[:, None]
    state = make_state(getkey(), network, inputs)
    state, _ = fit(
        getkey(), state, inputs, jnp.zeros(20, int), num_epochs=num_epochs, batch_size=batch_size
    )
    seen = np.asarray(state.variables["seen"])
    assert seen.sum() == num_epochs * (20 - left_over)
    assert seen.max() <= num_epochs
    if not left_over:
        assert (seen == num_epochs).all()


def test_an_epoch_sees_its_rows_as_often_as_they_are_given(getkey):
    num_examples, rows = 6, np.array([5, 5, 0, 2, 5, 3])
    network = counting_network(num_examples, 6)
    inputs = jnp.arange(num_examples, dtype=float)[:, None]
    state = make_state(getkey(), network, inputs)
    state, _ = fit(
        getkey(), state, inputs, jnp.zeros(num_examples, int), num_epochs=2, batch_size=2, rows=rows
    )
    np.testing.assert_array_equal(
        state.variables["seen"], 2 * np.bincount(rows, minlength=num_examples)
    )


@pytest.mark.slow
def test_training_on_rows_equals_training_on_their_examples(getkey):
    inputs, labels = make_data(getkey())
    rows = jnp.array([7, 1, 1, 4, 9, 3])
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    key = getkey()
    chosen, losses = fit(key, state, inputs, labels, num_epochs=3, batch_size=2, rows=rows)
    same, same_losses = fit(
        jax.random.clone(key), state, inputs[rows], labels[rows], num_epochs=3, batch_size=2
    )
    np.testing.assert_array_equal(losses, same_losses)
    jax.tree.map(np.testing.assert_array_equal, chosen.variables, same.variables)


@pytest.mark.parametrize("rows", [[0.0, 1.0], [[0, 1], [2, 3]], [True, False]])
def test_rows_that_are_no_indices_are_an_error(getkey, rows):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with pytest.raises(ValueError, match="rows must be integers"):
        fit(getkey(), state, inputs, labels, num_epochs=1, batch_size=1, rows=jnp.array(rows))


def test_every_step_has_its_own_key(getkey):
    network = counting_network(20, 12)
    inputs = jnp.arange(20.0)[:, None]
    state = make_state(getkey(), network, inputs)
    state, _ = fit(getkey(), state, inputs, jnp.zeros(20, int), num_epochs=3, batch_size=5)
    assert len({tuple(key) for key in np.asarray(state.variables["keys"]).tolist()}) == 12


def test_the_step_is_traced_once(getkey):
    traces = []

    def apply_fn(variables, inputs, key):
        traces.append(key)
        return inputs @ variables["params"]

    inputs, labels = make_data(getkey())
    state = TrainState.create(apply_fn, {"params": jnp.zeros((4, 3))}, optax.sgd(0.1))
    step = jax.jit(train_step)
    for _ in range(3):
        state, _ = step(getkey(), state, (inputs, labels))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-2),
        optax.chain(optax.clip(1.0), optax.lion(1e-3)),
    ],
    ids=["momentum", "adamw", "chain"],
)
def test_fit_lowers_the_loss_with_any_optax_optimizer(getkey, optimizer):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["nnx"], inputs, optimizer)
    _, losses = fit(getkey(), state, inputs, labels, num_epochs=60, batch_size=16)
    assert losses[-10:].mean() < losses[:10].mean()


def test_cross_entropy_is_the_negative_log_softmax_of_the_label(getkey):
    logits = jax.random.normal(getkey(), (5, 3)) * 10
    labels = jnp.array([0, 1, 2, 0, 1])
    expected = -jax.nn.log_softmax(logits)[jnp.arange(5), labels]
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6, atol=1e-6)


def test_a_step_without_a_key_is_an_error(getkey):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with pytest.raises(TypeError):
        train_step(None, state, (inputs, labels))


@pytest.mark.parametrize("batch_size", [0, 17])
def test_a_batch_size_that_does_not_fit_is_an_error(getkey, batch_size):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with pytest.raises(ValueError, match=rf"batch_size must lie in \[1, 16\].*got {batch_size}"):
        fit(getkey(), state, inputs, labels, num_epochs=1, batch_size=batch_size)


def test_unequal_numbers_of_inputs_and_labels_are_an_error(getkey):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with pytest.raises(ValueError, match="got 16 in inputs and 15 in labels"):
        fit(getkey(), state, inputs, labels[:15], num_epochs=1, batch_size=4)


def test_variables_without_params_are_an_error():
    with pytest.raises(ValueError, match="'params'"):
        TrainState.create(lambda v, x, key: x, {"weights": jnp.ones(2)}, optax.sgd(0.1))


def test_one_hot_labels_are_an_error():
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(4,\).*argmax"):
        cross_entropy(jnp.zeros((4, 3)), jnp.eye(4, 3))


def test_a_negative_number_of_epochs_is_an_error(getkey):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with pytest.raises(ValueError, match="num_epochs must be at least 0, got -1"):
        fit(getkey(), state, inputs, labels, num_epochs=-1, batch_size=4)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(0.1),
        optax.lbfgs(),
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    ],
    ids=["polyak", "lbfgs", "plateau"],
)
def test_fit_lowers_the_loss_with_optimizers_that_ask_for_it(getkey, optimizer):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs, optimizer)
    _, losses = fit(getkey(), state, inputs, labels, num_epochs=60, batch_size=16)
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_makes_the_loss_and_its_gradient_nan(label):
    def loss(logits):
        return cross_entropy(logits, jnp.array([0, label])).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3)))
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[1]).all()


@pytest.mark.parametrize(
    "module",
    [nn.Dense(2), nn.Dense, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear],
    ids=["linen", "linen class", "nnx", "nnx class"],
)
def test_a_module_in_place_of_a_network_is_an_error(module):
    with pytest.raises(TypeError, match="as_network"):
        TrainState.create(module, {"params": {}}, optax.sgd(0.1))


@pytest.mark.slow
def test_a_line_search_sees_the_masks_of_the_gradient(getkey):
    """An optimizer that is told the loss, and keeps how far that of its own parameters is off."""

    def update(updates, state, params, *, value, value_fn):
        return updates, value_fn(params) - value

    optimizer = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs, optimizer)
    state, loss = train_step(getkey(), state, (inputs, labels))
    assert abs(float(state.opt_state)) <= 1e-6 * float(loss)
