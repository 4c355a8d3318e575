import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import NETWORKS, LinenMLP, NnxMLP
from test_train import counting_network, make_data

import jdrop.linen
import jdrop.nnx
from jdrop import ensemble
from jdrop.inference import pool, weight_scaling
from jdrop.network import Network, predict
from jdrop.train import TrainState, fit

# Not Adam, which makes full steps of gradients that are nothing but rounding, such as those of a
# bias before a batch normalisation.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)

# Batched matrix products sum in another order than single ones: terms of order 1, rounded at 6e-8,
# through 20 steps of size 0.1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def train_members(key, network, inputs, labels, ensemble_size):
    init_key, fit_key = jax.random.split(key)
    state = ensemble.init_ensemble(
        init_key, network, OPTIMIZER, inputs, ensemble_size=ensemble_size
    )
    return ensemble.fit_ensemble(fit_key, state, inputs, labels, num_epochs=5, batch_size=4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_vmapped_member_equals_the_same_member_trained_alone(getkey, kind):
    network = NETWORKS[kind]
    inputs, labels = make_data(getkey())
    key = getkey()
    state, losses = train_members(key, network, inputs, labels, 3)
    init_key, fit_key = jax.random.split(jax.random.clone(key))
    init_keys, fit_keys = ensemble.member_keys(init_key, 3), ensemble.member_keys(fit_key, 3)
    for member in range(3):
        alone = TrainState.create(network, network.init(init_keys[member], inputs), OPTIMIZER)
        alone, alone_losses = fit(
            fit_keys[member], alone, inputs, labels, num_epochs=5, batch_size=4
        )
        np.testing.assert_allclose(losses[member], alone_losses, **ROUNDING)
        jax.tree.map(
            lambda many, one, member=member: np.testing.assert_allclose(
                many[member], one, **ROUNDING
            ),
            state.variables,
            alone.variables,
        )


def test_members_are_initialised_one_after_another():
    # A CPU can hang in the QR decompositions of several members at once.
    def init_fn(key, inputs):
        return {"params": nn.initializers.orthogonal()(key, (inputs.shape[1], 3))}

    network = Network(lambda variables, inputs, key: inputs @ variables["params"], init_fn)

    def init(key):
        inputs = jnp.ones((1, 4))
        state = ensemble.init_ensemble(key, network, OPTIMIZER, inputs, ensemble_size=5)
        return state.variables["params"]

    assert ":f32[3,3] = qr[" in str(jax.make_jaxpr(init)(jax.random.key(0)))
    assert init(jax.random.key(0)).shape == (5, 4, 3)


def test_each_member_trains_on_its_own_rows(getkey):
    num_examples = 5
    network = counting_network(num_examples, 8)
    inputs = jnp.arange(num_examples, dtype=float)[:, None]
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=2)
    rows = np.array([[0, 1, 2, 3], [4, 4, 4, 1]])
    state, _ = ensemble.fit_ensemble(
        getkey(),
        state,
        inputs,
        jnp.zeros(num_examples, int),
        num_epochs=2,
        batch_size=1,
        rows=rows,
    )
    np.testing.assert_array_equal(state.variables["seen"], [[2, 2, 2, 2, 0], [0, 2, 0, 0, 6]])


@pytest.mark.parametrize(
    "options", [{"batching": "vmap"}, {"batching": "scan"}, {"members_at_once": 2}], ids=str
)
def test_a_member_whose_loss_becomes_nan_changes_no_bit_of_the_others(getkey, options):
    inputs, labels = make_data(getkey())
    inputs = inputs.at[-1].set(jnp.nan)  # Only the second member trains on this example.
    clean = np.tile(np.arange(12), (4, 1))
    wild = clean.copy()
    wild[1, 5] = len(inputs) - 1
    init_key, fit_key = getkey(), getkey()
    (calm_state, calm_losses), (state, losses) = (
        ensemble.fit_ensemble(
            jax.random.clone(fit_key),
            ensemble.init_ensemble(
                jax.random.clone(init_key), NETWORKS["linen"], OPTIMIZER, inputs, ensemble_size=4
            ),
            inputs,
            labels,
            num_epochs=5,
            batch_size=4,
            rows=rows,
            **options,
        )
        for rows in (clean, wild)
    )
    others = np.array([0, 2, 3])
    assert np.isfinite(calm_losses).all()
    assert np.isnan(losses[1]).any()
    np.testing.assert_array_equal(losses[others], calm_losses[others])
    for leaf, calm in zip(*map(jax.tree.leaves, (state, calm_state)), strict=True):
        np.testing.assert_array_equal(leaf[others], calm[others])
    assert any(np.isnan(leaf[1]).any() for leaf in jax.tree.leaves(state.variables["params"]))


def test_rows_for_another_number_of_members_are_an_error(getkey):
    inputs, labels = make_data(getkey())
    state = ensemble.init_ensemble(getkey(), NETWORKS["linen"], OPTIMIZER, inputs, ensemble_size=3)
    with pytest.raises(ValueError, match="3 members"):
        ensemble.fit_ensemble(
            getkey(), state, inputs, labels, num_epochs=1, batch_size=2, rows=jnp.zeros((2, 4), int)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_member_does_not_depend_on_the_size_of_the_ensemble(getkey, kind):
    inputs, labels = make_data(getkey())
    key = getkey()
    few, few_losses = train_members(key, NETWORKS[kind], inputs, labels, 2)
    many, many_losses = train_members(jax.random.clone(key), NETWORKS[kind], inputs, labels, 5)
    np.testing.assert_allclose(many_losses[:2], few_losses, **ROUNDING)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[:2], b, **ROUNDING),
        many.variables,
        few.variables,
    )


def test_every_leaf_has_the_member_axis_first(getkey):
    inputs, labels = make_data(getkey())
    state, losses = train_members(getkey(), NETWORKS["linen"], inputs, labels, 3)
    assert losses.shape == (3, 5)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_members_differ_in_weights_order_and_masks(getkey):
    inputs, labels = make_data(getkey())
    state, losses = train_members(getkey(), NETWORKS["linen"], inputs, labels, 4)
    assert len(np.unique(np.asarray(losses[:, -1]))) == 4
    # Equal weights to begin with: what remains is the order of the examples and the masks.
    init = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 4), state)
    _, losses = ensemble.fit_ensemble(getkey(), init, inputs, labels, num_epochs=1, batch_size=16)
    assert len(np.unique(np.asarray(losses[:, 0]))) == 4


def test_all_keys_of_a_run_are_distinct(getkey):
    """The checker of key reuse is blind to `fold_in`, so the keys themselves are compared."""
    network = counting_network(20, 8)
    inputs = jnp.arange(20.0)[:, None]
    init_key, fit_key = jax.random.split(getkey())
    state = ensemble.init_ensemble(init_key, network, OPTIMIZER, inputs, ensemble_size=5)
    state, _ = ensemble.fit_ensemble(
        fit_key, state, inputs, jnp.zeros(20, int), num_epochs=2, batch_size=5
    )
    step_keys = np.asarray(state.variables["keys"]).reshape(-1, 2).tolist()
    members = [ensemble.member_keys(jax.random.clone(key), 5) for key in (init_key, fit_key)]
    member_keys = [jax.random.key_data(keys).tolist() for keys in members]
    keys = [tuple(key) for key in [*step_keys, *member_keys[0], *member_keys[1]]]
    assert len(set(keys)) == len(keys) == 5 * 8 + 10


@pytest.mark.parametrize("kind", NETWORKS)
def test_predictions_are_those_of_each_member(getkey, kind):
    network = NETWORKS[kind]
    inputs, labels = make_data(getkey())
    state, _ = train_members(getkey(), network, inputs, labels, 3)
    log_probs = ensemble.predict(None, network, state.variables, inputs)
    assert log_probs.shape == (3, 16, 3)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
    for member in range(3):
        variables = jax.tree.map(lambda leaf, member=member: leaf[member], state.variables)
        np.testing.assert_allclose(
            log_probs[member], weight_scaling(network, variables, inputs), rtol=1e-5, atol=1e-6
        )


def test_an_ensemble_of_none_is_an_error(getkey):
    with pytest.raises(ValueError, match="ensemble_size must be at least 1, got 0"):
        ensemble.member_keys(getkey(), 0)


def test_one_network_and_an_ensemble_are_not_mixed_up(getkey):
    network, (inputs, labels) = NETWORKS["linen"], make_data(getkey())
    one = TrainState.create(network, network.init(getkey(), inputs), OPTIMIZER)
    many = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=2)
    with pytest.raises(ValueError, match="fit_ensemble"):
        fit(getkey(), many, inputs, labels, num_epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=r"jdrop\.train\.fit"):
        ensemble.fit_ensemble(getkey(), one, inputs, labels, num_epochs=1, batch_size=4)


def test_a_module_in_place_of_a_network_is_an_error(getkey):
    with pytest.raises(TypeError, match="as_network"):
        ensemble.init_ensemble(getkey(), LinenMLP(), OPTIMIZER, jnp.ones((1, 4)), ensemble_size=2)


@pytest.mark.parametrize(
    ("as_network", "wrong"),
    [(jdrop.linen.as_network, LinenMLP), (jdrop.nnx.as_network, NnxMLP(nnx.Rngs(0)))],
    ids=["linen", "nnx"],
)
def test_a_class_is_no_module_and_a_module_no_class(as_network, wrong):
    with pytest.raises(TypeError, match="must be"):
        as_network(wrong)


def test_predicting_with_one_network_s_variables_is_an_error():
    variables = {"params": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="leading member axis"):
        ensemble.predict(None, lambda variables, x, key: x, variables, jnp.ones((4, 3)))


def test_member_i_draws_its_masks_from_the_key_folded_with_i(getkey):
    network, (inputs, _), key = NETWORKS["linen"], make_data(getkey()), getkey()
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=3)
    log_probs = ensemble.predict(jax.random.clone(key), network, state.variables, inputs)
    for member, member_key in enumerate(ensemble.member_keys(key, 3)):
        variables = jax.tree.map(lambda leaf, member=member: leaf[member], state.variables)
        expected = predict(member_key, network, variables, inputs)
        np.testing.assert_allclose(log_probs[member], expected, rtol=1e-5, atol=1e-5)


def test_outputs_of_a_regression_are_left_as_they_are():
    variables = {"params": jnp.arange(1.0, 4.0)}

    def network(variables, inputs, key):
        return variables["params"] * inputs

    with pytest.raises(ValueError, match="regression=True"):
        ensemble.predict(None, network, variables, jnp.ones(2))
    outputs = ensemble.predict(None, network, variables, jnp.ones(2), regression=True)
    assert jnp.array_equal(outputs, jnp.array([[1.0, 1], [2, 2], [3, 3]]))


def test_one_output_is_no_class(getkey):
    """Its log-softmax is 0 whatever the network says."""
    variables = {"params": jnp.arange(1.0, 4.0)}

    def network(variables, inputs, key):
        return variables["params"] * inputs[:, None]

    with pytest.raises(ValueError, match=r"at least 2 classes, got .*\(2, 1\); give `regression="):
        ensemble.predict(None, network, variables, jnp.ones(2))
    outputs = ensemble.predict(None, network, variables, jnp.ones(2), regression=True)
    assert jnp.array_equal(outputs, jnp.array([[[1.0], [1]], [[2], [2]], [[3], [3]]]))
    with pytest.raises(ValueError, match=r"at least 2 classes, got .*\(3, 2, 1\); .*mean\(0\)"):
        pool(outputs)


def test_predicting_without_any_variables_is_an_error():
    with pytest.raises(ValueError, match="leading member axis"):
        ensemble.predict(None, lambda variables, x, key: x, {"params": {}}, jnp.ones((4, 3)))
