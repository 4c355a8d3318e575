"""Losses in training: their shapes, weights, labels per token, and auxiliary outputs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import softmax_regression
from scipy import stats

from jdrop import ensemble
from jdrop.network import Network
from jdrop.thinned import thin
from jdrop.train import TrainState, cross_entropy, fit, gaussian_nll, train_step, weighted

BATCH_SIZE = 8

STEP = jax.jit(train_step)


def make_state(key, outputs_shape, loss_fn, rate=0.0):
    """A linear network whose outputs have this shape, without the batch axis."""

    def apply_fn(variables, inputs, key):
        return (inputs @ variables["params"]).reshape(len(inputs), *outputs_shape)

    params = jax.random.normal(key, (4, int(np.prod(outputs_shape))))
    return TrainState.create(Network(apply_fn), {"params": params}, optax.sgd(0.1), loss_fn)


def squared_error(outputs, labels):
    return (outputs - labels) ** 2


def step(state, labels, key=0):
    inputs = jax.random.normal(jax.random.key(1), (len(jax.tree.leaves(labels)[0]), 4))
    return STEP(jax.random.key(key), state, (inputs, labels))


# Shapes.


@pytest.mark.parametrize("batch_size", [1, BATCH_SIZE])
@pytest.mark.parametrize(("outputs_shape", "labels_shape"), [((1,), ()), ((), (1,))])
def test_losses_of_pairs_of_examples_are_an_error(getkey, batch_size, outputs_shape, labels_shape):
    """As where `[batch, 1]` meets `[batch]`, which broadcasts to `[batch, batch]`."""
    state = make_state(getkey(), outputs_shape, squared_error)
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=rf"got the shape \({batch_size}, {batch_size}\) for"),
    ):
        step(state, jnp.ones((batch_size, *labels_shape)))


def test_the_error_about_the_losses_names_all_shapes(getkey):
    state = make_state(getkey(), (1,), squared_error)
    message = r"got the shape \(8, 8\) for outputs of shape \(8, 1\) and labels of shape \(8,\)"
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
        step(state, jnp.ones(8))


def test_losses_of_pairs_are_an_error_beside_wider_outputs(getkey):
    """No array among outputs and labels is as small as the losses."""

    def loss_fn(outputs, labels):
        return squared_error(outputs["mean"], labels["target"][None])

    def apply_fn(variables, inputs, key):
        return {"mean": inputs @ variables["params"], "hidden": jnp.tile(inputs, (1, 20))}

    state = TrainState.create(
        Network(apply_fn), {"params": jnp.ones((4, 1))}, optax.sgd(0.1), loss_fn
    )
    with pytest.raises(ValueError, match=r"\(8, 8\) for outputs of shape .*'mean': \(8, 1\)"):
        step(state, {"target": jnp.ones(8)})


def test_losses_of_pairs_are_an_error_for_an_ensemble(getkey):
    def init_fn(key, inputs):
        return {"params": jax.random.normal(key, (4, 1))}

    network = Network(lambda variables, inputs, key: inputs @ variables["params"], init_fn)
    state = ensemble.init_ensemble(
        getkey(),
        network,
        optax.sgd(0.1),
        jnp.ones((1, 4)),
        ensemble_size=3,
        loss_fn=lambda outputs, labels: squared_error(outputs, labels[None]),
    )
    with pytest.raises(ValueError, match=r"got the shape \(2, 2\)"):
        ensemble.fit_ensemble(
            getkey(), state, jnp.ones((8, 4)), jnp.ones(8), num_epochs=1, batch_size=2
        )


def test_a_loss_that_runs_with_one_batch_size_alone_is_an_error(getkey):
    """Eight classes against the numbers of eight examples."""
    state = make_state(getkey(), (BATCH_SIZE,), lambda outputs, labels: outputs - labels[None])
    with pytest.raises(ValueError, match="must not depend on the size of the batch"):
        step(state, jnp.ones(BATCH_SIZE))


def test_losses_without_an_axis_of_examples_are_an_error(getkey):
    state = make_state(getkey(), (3,), lambda outputs, labels: (outputs - labels).sum(0))
    with pytest.raises(ValueError, match=r"one loss for each example.*got the shape \(3,\)"):
        step(state, jnp.ones((BATCH_SIZE, 3)))


@pytest.mark.parametrize("result", [None, 0.0, {"loss": 1.0}, (1, 2, 3)], ids=repr)
def test_a_loss_function_that_returns_no_array_is_an_error(getkey, result):
    state = make_state(getkey(), (3,), lambda outputs, labels: result)
    with pytest.raises(TypeError, match="loss_fn must return an array of losses"):
        step(state, jnp.ones((BATCH_SIZE, 3)))


@pytest.mark.parametrize("length", [5, BATCH_SIZE, BATCH_SIZE + 1])
def test_losses_of_each_token_are_averaged(getkey, length):
    """Also where as many tokens as examples have a loss."""
    state = make_state(
        getkey(),
        (length, 3),
        lambda logits, tokens: cross_entropy(logits[:, :-1], tokens[:, 1:]),
    )
    tokens = jax.random.randint(getkey(), (BATCH_SIZE, length), 0, 3)
    inputs = jax.random.normal(getkey(), (BATCH_SIZE, 4))
    _, loss = STEP(getkey(), state, (inputs, tokens))
    log_probs = np.asarray(jax.nn.log_softmax(state.network(state.variables, inputs, None)))
    expected = [
        log_probs[example, position - 1, tokens[example, position]]
        for example in range(BATCH_SIZE)
        for position in range(1, length)
    ]
    assert float(loss) == pytest.approx(-np.mean(expected), rel=1e-5)


def test_a_loss_of_the_whole_batch_is_minimised_as_it_is(getkey):
    key, labels = getkey(), jax.random.normal(getkey(), (BATCH_SIZE, 3))
    each = make_state(key, (3,), squared_error)
    whole = replace(each, loss_fn=lambda outputs, labels: squared_error(outputs, labels).mean())
    (each, each_loss), (whole, whole_loss) = step(each, labels), step(whole, labels)
    assert float(whole_loss) == pytest.approx(float(each_loss), rel=1e-6)
    np.testing.assert_allclose(whole.variables["params"], each.variables["params"], rtol=1e-5)


# Weights.


def test_weighted_losses_are_averaged_with_their_weights(getkey):
    logits = jax.random.normal(getkey(), (BATCH_SIZE, 5, 3))
    labels = jax.random.randint(getkey(), (BATCH_SIZE, 5), 0, 3)
    losses = np.asarray(cross_entropy(logits, labels), np.float64)
    for shape in [(BATCH_SIZE, 5), (BATCH_SIZE,)]:
        weights = jax.random.uniform(getkey(), shape)
        all_weights = np.broadcast_to(
            np.asarray(weights, np.float64).reshape(*shape, *[1] * (2 - len(shape))), losses.shape
        )
        expected = (losses * all_weights).sum() / all_weights.sum()
        loss = weighted(cross_entropy)(logits, (labels, weights))
        assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [bool, int, float])
def test_training_with_weights_of_0_equals_training_without_those_examples(getkey, dtype):
    """Whatever stands for their labels: -1 is no class, and would make the loss NaN."""
    state = make_state(getkey(), (3,), weighted(cross_entropy))
    inputs = jax.random.normal(getkey(), (BATCH_SIZE, 4))
    labels = jnp.array([0, -1, 2, 1, -1, 9, 0, 2])
    kept = np.array([0, 2, 3, 6, 7])
    weights = jnp.array([1, 0, 1, 1, 0, 0, 1, 1]).astype(dtype)
    padded, padded_loss = STEP(getkey(), state, (inputs, (labels, weights)))
    plain = replace(state, loss_fn=cross_entropy)
    left_out, loss = STEP(getkey(), plain, (inputs[kept], labels[kept]))
    assert float(padded_loss) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(
        padded.variables["params"], left_out.variables["params"], rtol=1e-5, atol=1e-6
    )


def test_labels_that_are_a_pytree_may_have_weights(getkey):
    def loss_fn(outputs, labels):
        return cross_entropy(outputs, labels["class"]) + labels["offset"]

    state = make_state(getkey(), (3,), weighted(loss_fn))
    labels = {"class": jnp.array([0, -1]), "offset": jnp.array([1.0, jnp.nan])}
    _, loss = step(state, (labels, jnp.array([1, 0])))
    assert np.isfinite(loss)


def test_a_batch_without_any_weight_trains_nothing(getkey):
    state = make_state(getkey(), (3,), weighted(cross_entropy))
    after, loss = step(state, (jnp.full(BATCH_SIZE, -1), jnp.zeros(BATCH_SIZE)))
    assert float(loss) == 0
    np.testing.assert_array_equal(after.variables["params"], state.variables["params"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weighted_losses_of_half_precision_are_rounded_once(getkey, dtype):
    """Weights, their sum, or a sum of losses in this dtype would each add an error of its own."""
    losses = jax.random.uniform(getkey(), (100, 300)).astype(dtype)
    weights = jax.random.uniform(getkey(), (100, 300))
    loss_fn = weighted(lambda outputs, labels: outputs)
    rounded = jax.vmap(lambda losses, weights: loss_fn(losses, (losses, weights)))(losses, weights)
    assert rounded.dtype == dtype
    exact_losses, exact_weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    exact = (exact_losses * exact_weights).sum(1) / exact_weights.sum(1)
    # Half a unit in the last place, and two sums of 300 positive numbers in float32.
    half_unit = 2.0 ** np.floor(np.log2(exact)) * float(jnp.finfo(dtype).eps) / 2
    bound = half_unit + exact * 600 * 2.0**-24
    assert np.all(np.abs(np.asarray(rounded, np.float64) - exact) <= bound)


def test_weighted_losses_of_pairs_are_an_error(getkey):
    loss_fn = weighted(lambda outputs, labels: squared_error(outputs, labels[None]))
    state = make_state(getkey(), (1,), loss_fn)
    with pytest.raises(ValueError, match=r"got the shape \(8, 8\)"):
        step(state, (jnp.ones(BATCH_SIZE), jnp.ones(BATCH_SIZE)))


@pytest.mark.parametrize("shape", [(BATCH_SIZE, 1), (3,), (BATCH_SIZE, 5)])
def test_weights_of_another_shape_are_an_error(shape, getkey):
    state = make_state(getkey(), (3,), weighted(cross_entropy))
    with pytest.raises(ValueError, match=r"weights of shape .* and losses of shape \(8,\)"):
        step(state, (jnp.zeros(BATCH_SIZE, int), jnp.ones(shape)))


def test_weights_of_a_loss_of_the_whole_batch_are_an_error(getkey):
    state = make_state(getkey(), (3,), weighted(lambda outputs, labels: outputs.mean()))
    with pytest.raises(ValueError, match="weights must have the leading axes of the losses"):
        step(state, (jnp.zeros(BATCH_SIZE, int), jnp.ones(BATCH_SIZE)))


@pytest.mark.parametrize("labels", [jnp.zeros(BATCH_SIZE, int), {"labels": jnp.zeros(8, int)}])
def test_a_weighted_loss_without_weights_is_an_error(getkey, labels):
    state = make_state(getkey(), (3,), weighted(cross_entropy))
    with pytest.raises(TypeError, match=r"labels that are a tuple \(labels, weights\)"):
        step(state, labels)


def test_a_weighted_loss_made_twice_is_compiled_once(getkey):
    traces = []

    def loss_fn(outputs, labels):
        traces.append(outputs)
        return cross_entropy(outputs, labels)

    first = make_state(getkey(), (3,), weighted(loss_fn))
    compiled = jax.jit(train_step)
    batch = jnp.ones((2, 4)), (jnp.zeros(2, int), jnp.ones(2))
    for state in (first, replace(first, loss_fn=weighted(loss_fn))):
        compiled(getkey(), state, batch)
    assert len(traces) == 1


# Auxiliary outputs.


def loss_and_accuracy(outputs, labels):
    return cross_entropy(outputs, labels), {"right": outputs.argmax(-1) == labels}


def test_a_step_returns_the_auxiliary_outputs_of_its_loss(getkey):
    state = make_state(getkey(), (3,), loss_and_accuracy)
    inputs, labels = jax.random.normal(getkey(), (8, 4)), jnp.arange(8) % 3
    after, (loss, aux) = STEP(getkey(), state, (inputs, labels))
    plain, plain_loss = STEP(getkey(), replace(state, loss_fn=cross_entropy), (inputs, labels))
    assert float(loss) == float(plain_loss)
    np.testing.assert_array_equal(after.variables["params"], plain.variables["params"])
    outputs = state.network(state.variables, inputs, None)
    np.testing.assert_array_equal(aux["right"], outputs.argmax(-1) == labels)


def test_fit_averages_auxiliary_outputs_over_the_steps_of_an_epoch(getkey):
    network = softmax_regression(rate=0.5)
    inputs, labels = jax.random.normal(getkey(), (8, 4)), jnp.arange(8) % 3
    state = TrainState.create(
        network,
        network.init(getkey(), inputs),
        optax.sgd(0.0),
        lambda outputs, labels: (cross_entropy(outputs, labels), labels.sum()),
    )
    state, (losses, sums) = fit(getkey(), state, inputs, labels, num_epochs=3, batch_size=2)
    assert losses.shape == (3,)
    # Each epoch has four steps, whose labels are all labels.
    np.testing.assert_allclose(sums, labels.sum() / 4, rtol=1e-6)


def test_an_ensemble_and_thinned_steps_pass_auxiliary_outputs_on(getkey):
    def init_fn(key, inputs):
        return {"params": {"w": jnp.ones((4, 8)), "v": jnp.ones((8, 3))}}

    def apply_fn(variables, inputs, key):
        return jnp.tanh(inputs @ variables["params"]["w"]) @ variables["params"]["v"]

    inputs, labels = jax.random.normal(getkey(), (8, 4)), jnp.arange(8) % 3
    network = thin(Network(apply_fn, init_fn), inputs, {"w": 0.5})
    state = ensemble.init_ensemble(
        getkey(), network, optax.sgd(0.1), inputs, ensemble_size=2, loss_fn=loss_and_accuracy
    )
    state, (losses, aux) = ensemble.fit_ensemble(
        getkey(), state, inputs, labels, num_epochs=3, batch_size=4
    )
    assert losses.shape == (2, 3)
    assert aux["right"].shape == (2, 3, 4)


# A predicted normal distribution.


def test_the_loss_of_a_predicted_normal_distribution_is_that_of_scipy(getkey):
    mean, noise, labels = jax.random.normal(getkey(), (3, 50, 2))
    variance = jnp.exp(2 * noise)
    expected = -stats.norm.logpdf(labels, mean, np.exp(noise))
    np.testing.assert_allclose(gaussian_nll((mean, variance), labels), expected, rtol=1e-5)


def test_a_predicted_normal_distribution_learns_mean_and_variance(getkey):
    """At the minimum of the loss they are those of the labels."""
    labels = 3 + 2 * jax.random.normal(getkey(), (1000,))

    def apply_fn(variables, inputs, key):
        mean, raw = variables["params"]
        ones = jnp.ones(len(inputs))
        return mean * ones, jax.nn.softplus(raw) * ones

    params = (jnp.zeros(()), jnp.ones(()))
    state = TrainState.create(apply_fn, {"params": params}, optax.adam(0.05), gaussian_nll)
    state, _ = fit(getkey(), state, jnp.zeros((1000, 1)), labels, num_epochs=2000, batch_size=1000)
    mean, raw = state.variables["params"]
    np.testing.assert_allclose(mean, labels.mean(), rtol=1e-2)
    np.testing.assert_allclose(jax.nn.softplus(raw), labels.var(), rtol=1e-2)


def test_a_weight_of_0_leaves_a_normal_example_out():
    loss_fn = weighted(gaussian_nll)
    outputs = jnp.zeros(2), jnp.ones(2)
    loss = loss_fn(outputs, (jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(loss, gaussian_nll((jnp.zeros(1), jnp.ones(1)), jnp.ones(1))[0])


def test_a_negative_variance_gives_nan():
    assert jnp.isnan(gaussian_nll((jnp.zeros(1), -jnp.ones(1)), jnp.ones(1))).all()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_normal_distribution_of_another_shape_is_an_error(position):
    mean, variance, labels = (jnp.ones((4, 1) if i == position else 4) for i in range(3))
    with pytest.raises(ValueError, match="must have the same shape, got"):
        gaussian_nll((mean, variance), labels)


def test_a_single_array_is_no_normal_distribution():
    with pytest.raises(TypeError, match=r"must return a tuple \(mean, variance\)"):
        gaussian_nll(jnp.ones((4, 2)), jnp.ones(4))
