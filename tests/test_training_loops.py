"""Loops of one's own: steps of all members, one after another or at once, and modules that sow."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import NETWORKS, softmax_regression

import jdrop.linen
import jdrop.nnx
from jdrop import ensemble, train
from jdrop.network import Network, dropout_sites
from jdrop.thinned import thin
from jdrop.train import TrainState

pytestmark = pytest.mark.grid

NETWORK = softmax_regression(rate=0.5)

STEP = jax.jit(train.train_step)

OPTIMIZER = optax.sgd(0.1, momentum=0.9)

# Batched products sum in another order: terms of order 1 through a few steps of size 0.1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def make_data(getkey, num_examples=16):
    inputs = jax.random.normal(getkey(), (num_examples, 4))
    return inputs, jax.random.randint(getkey(), (num_examples,), 0, 3)


def assert_close(one, other):
    for leaf, other_leaf in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, other_leaf, **ROUNDING)


def member_of(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


# Steps of all members.


@pytest.mark.parametrize("batching", ["vmap", "scan"])
@pytest.mark.parametrize("member_batches", [False, True])
def test_a_step_of_all_members_equals_the_step_of_each(getkey, batching, member_batches):
    inputs, labels = make_data(getkey)
    if member_batches:
        inputs, labels = jnp.stack([inputs, inputs + 1, -inputs]), jnp.stack([labels] * 3)
    state = ensemble.init_ensemble(getkey(), NETWORK, OPTIMIZER, jnp.ones((1, 4)), ensemble_size=3)
    key = getkey()
    after, losses = ensemble.train_step(
        key, state, (inputs, labels), member_batches=member_batches, batching=batching
    )
    assert losses.shape == (3,)
    for member, member_key in enumerate(ensemble.member_keys(jax.random.clone(key), 3)):
        batch = (inputs, labels)
        batch = member_of(batch, member) if member_batches else batch
        alone, loss = STEP(member_key, member_of(state, member), batch)
        assert_close(losses[member], loss)
        assert_close(member_of(after, member), alone)


def test_steps_of_a_shared_batch_draw_other_masks_for_each_member(getkey):
    inputs, labels = make_data(getkey)
    state = ensemble.init_ensemble(getkey(), NETWORK, OPTIMIZER, inputs, ensemble_size=4)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 4), state)
    _, losses = ensemble.train_step(getkey(), same, (inputs, labels))
    assert len(np.unique(np.asarray(losses))) == 4


def test_a_loop_over_batches_compiles_one_step(getkey):
    traces = []

    def apply_fn(variables, inputs, key):
        traces.append(inputs.shape)
        return inputs @ variables["params"]

    network = Network(apply_fn, lambda key, inputs: {"params": jnp.zeros((4, 3))})
    inputs, labels = make_data(getkey)
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=2)
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        # NumPy arrays, as a loader gives them.
        batch = np.asarray(inputs[rows]), np.asarray(labels[rows])
        state, _ = ensemble.train_step(getkey(), state, batch)
    assert state.step.tolist() == [3, 3]
    assert len(traces) == 1


def test_a_loop_of_steps_with_the_keys_of_fit_equals_fit(getkey):
    inputs, labels = make_data(getkey)
    network, key = NETWORK, getkey()
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=2)
    fitted, losses = ensemble.fit_ensemble(key, state, inputs, labels, num_epochs=1, batch_size=16)
    for member, member_key in enumerate(ensemble.member_keys(jax.random.clone(key), 2)):
        order_key, mask_key, _ = jax.random.split(member_key, 3)
        order = jax.random.permutation(jax.random.fold_in(order_key, 0), 16)
        alone, loss = STEP(
            jax.random.fold_in(mask_key, 0),
            member_of(state, member),
            (inputs[order], labels[order]),
        )
        assert_close(losses[member, 0], loss)
        assert_close(member_of(fitted, member), alone)


def test_a_step_of_all_members_without_a_key_is_an_error(getkey):
    inputs, labels = make_data(getkey)
    state = ensemble.init_ensemble(getkey(), NETWORK, OPTIMIZER, inputs, ensemble_size=2)
    with pytest.raises(TypeError):
        ensemble.train_step(None, state, (inputs, labels))


def test_batches_for_another_number_of_members_are_an_error(getkey):
    inputs, labels = make_data(getkey)
    state = ensemble.init_ensemble(getkey(), NETWORK, OPTIMIZER, inputs, ensemble_size=2)
    with pytest.raises(ValueError, match="with the 2 members of the state, got the shapes"):
        ensemble.train_step(getkey(), state, (inputs, labels), member_batches=True)


def test_a_step_of_all_members_of_one_network_is_an_error(getkey):
    inputs, labels = make_data(getkey)
    network = NETWORK
    one = TrainState.create(network, network.init(getkey(), inputs), OPTIMIZER)
    with pytest.raises(ValueError, match=r"jdrop\.train\.train_step"):
        ensemble.train_step(getkey(), one, (inputs, labels))


# One member after another.


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETWORKS)
def test_members_trained_one_after_another_equal_members_trained_at_once(getkey, framework):
    inputs, labels = make_data(getkey)
    network, key = NETWORKS[framework], getkey()
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=3)
    rows = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    at_once, in_turn = (
        ensemble.fit_ensemble(
            jax.random.clone(key),
            state,
            inputs,
            labels,
            num_epochs=3,
            batch_size=2,
            rows=rows,
            batching=batching,
        )
        for batching in ("vmap", "scan")
    )
    assert_close(in_turn, at_once)


@pytest.mark.parametrize("function", ["fit_ensemble", "train_step"])
def test_an_unknown_batching_is_an_error(getkey, function):
    inputs, labels = make_data(getkey)
    state = ensemble.init_ensemble(getkey(), NETWORK, OPTIMIZER, inputs, ensemble_size=2)
    functions = {
        "train_step": lambda: ensemble.train_step(
            getkey(), state, (inputs, labels), batching="map"
        ),
        "fit_ensemble": lambda: ensemble.fit_ensemble(
            getkey(), state, inputs, labels, num_epochs=1, batch_size=4, batching="map"
        ),
    }
    with pytest.raises(ValueError, match="batching must be 'vmap', 'scan' or 'auto', got 'map'"):
        functions[function]()


def test_convolutions_of_members_in_turn_are_not_grouped(getkey):
    """A grouped convolution is what makes batching slow."""

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(nn.Conv(4, (3, 3))(x))
            return nn.Dense(3)(x.mean((1, 2)))

    inputs, labels = jnp.ones((2, 4, 4, 1)), jnp.zeros(2, int)
    network = jdrop.linen.as_network(CNN(), has_dropout=False)
    state = ensemble.init_ensemble(getkey(), network, OPTIMIZER, inputs, ensemble_size=2)

    def program(batching):
        step = partial(ensemble.train_step, batching=batching)
        return str(jax.make_jaxpr(step)(jax.random.key(0), state, (inputs, labels)))

    assert "feature_group_count=2" in program("vmap")
    assert "feature_group_count=2" not in program("scan")


# Gradient accumulation.


def test_accumulated_gradients_of_parts_equal_a_step_on_the_whole_batch(getkey):
    inputs, labels = make_data(getkey)
    network = Network(
        lambda variables, inputs, key: inputs @ variables["params"],
        lambda key, inputs: {"params": jax.random.normal(key, (4, 3))},
    )
    key = getkey()
    states = {
        every: ensemble.init_ensemble(
            jax.random.clone(key),
            network,
            optax.MultiSteps(optax.adam(0.1), every).gradient_transformation(),
            inputs,
            ensemble_size=2,
        )
        for every in (1, 4)
    }
    whole, _ = ensemble.train_step(getkey(), states[1], (inputs, labels))
    parts = states[4]
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        before = parts.variables
        parts, _ = ensemble.train_step(getkey(), parts, (inputs[rows], labels[rows]))
        changed = any(
            map(np.any, jax.tree.leaves(jax.tree.map(jnp.not_equal, before, parts.variables)))
        )
        assert changed == (start == 12)
    assert_close(parts.variables, whole.variables)


# Modules that sow.


class SowingLinen(nn.Module):
    """A network that stores what it computes, in a collection that `init` makes and another."""

    sows: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(nn.relu(x))
        if self.sows:
            self.sow("losses", "penalty", jnp.square(x).mean())
            self.sow("intermediates", "hidden", x)
        return nn.Dense(3)(x)


class SowingNnx(nnx.Module):
    """The same in nnx; the stored values lie beside the batch statistics."""

    def __init__(self, rngs, sows=True):
        self.sows = sows
        self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.hidden(x))))
        if self.sows:
            self.sow(nnx.Intermediate, "stored", x)
            self.sow(nnx.Intermediate, "stored", x)
        return self.out(x)


OLD_SOW = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

SOWING = {
    "linen": lambda sows: jdrop.linen.as_network(SowingLinen(sows)),
    "nnx": lambda sows: jdrop.nnx.as_network(lambda rngs: SowingNnx(rngs, sows)),
}


@OLD_SOW
@pytest.mark.parametrize("framework", SOWING)
def test_a_module_that_sows_trains_as_one_that_does_not(getkey, framework):
    inputs, labels = make_data(getkey)
    init_key, key = getkey(), getkey()
    results = {}
    for sows in (False, True):
        network = SOWING[framework](sows)
        state = TrainState.create(
            network, network.init(jax.random.clone(init_key), inputs), OPTIMIZER
        )
        state, losses = train.fit(
            jax.random.clone(key), state, inputs, labels, num_epochs=2, batch_size=4
        )
        statistics = "batch_stats" if framework == "linen" else "state"
        before = network.init(jax.random.clone(init_key), inputs)[statistics]
        assert all(
            np.any(old != new)
            for old, new in zip(
                jax.tree.leaves(before), jax.tree.leaves(state.variables[statistics]), strict=True
            )
        )
        results[sows] = losses, state.variables["params"], state.variables[statistics]
    jax.tree.map(np.testing.assert_array_equal, results[True], results[False])


@OLD_SOW
@pytest.mark.parametrize("framework", SOWING)
def test_steps_of_a_module_that_sows_are_compiled_once_and_keep_nothing(getkey, framework):
    inputs, labels = make_data(getkey)
    network = SOWING[framework](True)
    traces = []

    def loss_fn(outputs, labels):
        traces.append(outputs)
        return train.cross_entropy(outputs, labels)

    state = TrainState.create(network, network.init(getkey(), inputs), OPTIMIZER, loss_fn)
    structure = jax.tree.structure(state)
    for _ in range(3):
        state, _ = STEP(getkey(), state, (inputs, labels))
    assert len(traces) == 1
    assert jax.tree.structure(state) == structure


@OLD_SOW
@pytest.mark.parametrize("framework", SOWING)
def test_the_sites_of_a_module_that_sows_are_listed(getkey, framework):
    inputs, _ = make_data(getkey)
    network = SOWING[framework](True)
    sites = dropout_sites(network, network.init(getkey(), inputs), inputs)
    assert [site.shape for site in sites] == [(16, 8)]


@pytest.mark.slow
def test_a_thinned_module_that_sows_trains_as_one_that_does_not(getkey):
    class Hidden(nn.Module):
        sows: bool

        @nn.compact
        def __call__(self, x, train):
            x = jdrop.linen.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
            if self.sows:
                self.sow("losses", "squares", jnp.square(x))
            return nn.Dense(3)(x)

    inputs, labels = make_data(getkey)
    init_key, fit_key = getkey(), getkey()
    results = []
    for sows in (False, True):
        network = thin(jdrop.linen.as_network(Hidden(sows)), inputs, block_size=2)
        variables = network.init(jax.random.clone(init_key), inputs)
        state, losses = train.fit(
            jax.random.clone(fit_key),
            TrainState.create(network, variables, OPTIMIZER),
            inputs,
            labels,
            num_epochs=2,
            batch_size=16,
        )
        results.append((losses, state.variables["params"]))
    jax.tree.map(np.testing.assert_array_equal, *results)
