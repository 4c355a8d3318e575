"""Steps of thinned networks: what they draw, what they train, and what they leave unchanged."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bounds import chi_square_bounds
from exactness import (
    MLP,
    QUICK,
    assert_close,
    drawn_inputs,
    drawn_variables,
    gradient_of_loss,
    kept_entries,
    masked,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from networks import NETWORKS, LinenMLP
from scipy import stats

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop import ensemble
from jdrop.network import Network
from jdrop.thinned import ThinningError, freeze_deleted, thin
from jdrop.train import TrainState, fit, train_step

pytestmark = pytest.mark.grid

INPUTS, LABELS = drawn_inputs(8, 4), jnp.arange(8) % 3
BATCH = INPUTS, LABELS


NETWORK = jdrop.linen.as_network(MLP())


def drawn_state(network, optimizer, seed=0):
    return TrainState.create(network, drawn_variables(network, INPUTS, seed), optimizer)


def deleted_in(state, kept):
    """True where an entry of the variables, or of the optimizer's state, is of a deleted unit."""
    rule, trees = state.network.step_rule, (state.variables, state.opt_state)
    return jax.tree.map(jnp.logical_not, kept_entries(rule, rule.axes_in(state), trees, kept))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


# Taking out and putting back.


@pytest.mark.parametrize(("block_size", "inner"), [(1, 1), (2, 3), (16, 1), (32, 3)])
def test_take_and_put_equal_indexing_in_numpy(block_size, inner, getkey):
    """Kernels cut along rows, columns and both; behind a flattened axis if `inner` is not 1."""

    def apply_fn(variables, x, key):
        p = variables["params"]
        hidden = jnp.tanh(x @ p["one"])
        hidden = jnp.tanh(jnp.repeat(hidden[:, None], inner, 1).reshape(len(x), -1) @ p["two"])
        return hidden @ p["out"]

    def init_fn(key, x):
        shapes = {"one": (4, 64), "two": (inner * 64, 96), "out": (96, 3)}
        return {"params": {name: jnp.zeros(shape) for name, shape in shapes.items()}}

    network = thin(
        Network(apply_fn, init_fn), INPUTS, {"one": 0.5, "two": 1 / 3}, block_size=block_size
    )
    rule = network.step_rule
    assert [units.block_size for units in rule.units] == [block_size] * 2
    params = drawn_variables(network, INPUTS)["params"]
    kept = rule.draw(getkey())
    axes = rule.axes["params"]
    taken = quick(lambda kept: rule.take(axes, params, kept))(kept)
    one, two = (
        (np.asarray(kept[name])[:, None] * block_size + np.arange(block_size)).ravel()
        for name in ("one", "two")
    )
    assert (len(one), len(two)) == (32, 64)
    rows = (np.arange(inner)[:, None] * 64 + one).ravel()
    index = {"one": np.ix_(range(4), one), "two": np.ix_(rows, two), "out": np.ix_(two, range(3))}
    whole = quick(lambda taken: rule.put(axes, params, taken, kept))(
        jax.tree.map(jnp.negative, taken)
    )
    for name, where in index.items():
        expected = np.array(params[name])
        np.testing.assert_array_equal(taken[name], expected[where])
        expected[where] *= -1
        np.testing.assert_array_equal(whole[name], expected)


# Steps.

OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thinned_step_equals_a_masked_step_that_leaves_deleted_units_unchanged(name, getkey):
    state = drawn_state(thin(NETWORK, INPUTS), OPTIMIZERS[name])
    rule, frozen = state.network.step_rule, freeze_deleted(OPTIMIZERS[name])

    @quick
    def both(key, state):
        kept = rule.draw(jax.random.split(jax.random.clone(key))[0])
        after, loss = train_step(key, state, BATCH)
        network, params = masked(NETWORK, rule, kept), state.variables["params"]
        grads, full_loss = gradient_of_loss(network, params, *BATCH)
        updates, opt_state = frozen.update(
            grads,
            state.opt_state,
            params,
            kept=kept_entries(rule, rule.axes["params"], params, kept),
        )
        full = optax.apply_updates(params, updates), opt_state, full_loss
        return (
            after,
            (after.variables["params"], after.opt_state, loss),
            full,
            deleted_in(state, kept),
        )

    # The second step finds moments of units that it deletes.
    for _ in range(2):
        before = state.variables, state.opt_state
        state, got, expected, deleted = both(getkey(), state)
        assert_close(got, expected, rtol=1e-4, atol=2e-6)
        assert_unchanged(deleted, before, (state.variables, state.opt_state))


def assert_unchanged(deleted, before, after):
    """Bit for bit where deleted; elsewhere most entries are others."""
    kept_entries = changed_entries = deleted_entries = 0
    leaves = (jax.tree.leaves(jax.device_get(tree)) for tree in (deleted, before, after))
    for where, old, new in zip(*leaves, strict=True):
        np.testing.assert_array_equal(old[where], new[where])
        deleted_entries += where.sum()
        kept_entries += (~where).sum()
        changed_entries += (old[~where] != new[~where]).sum()
    assert deleted_entries > 0.4 * kept_entries
    assert changed_entries > 0.9 * kept_entries


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_leaves_the_batch_statistics_of_deleted_units_unchanged(kind, getkey):
    state = drawn_state(thin(NETWORKS[kind], INPUTS), optax.adam(0.01))

    @quick
    def step(key, state):
        kept = state.network.step_rule.draw(jax.random.split(jax.random.clone(key))[0])
        return train_step(key, state, BATCH)[0], deleted_in(state, kept)

    after, deleted = step(getkey(), state)
    (name,) = state.variables.keys() - {"params"}
    statistics = jax.tree.leaves(deleted[0][name])
    assert [int(leaf.sum()) for leaf in statistics] == [4, 4]
    for tree in ("variables", "opt_state"):
        where = deleted[tree == "opt_state"]
        assert_unchanged(where, getattr(state, tree), getattr(after, tree))


# Expectations.


@pytest.mark.parametrize(("size", "rate", "block_size"), [(5, 0.4, 1), (12, 0.25, 3)])
def test_mean_over_all_masks_of_a_hidden_layer_equals_weight_scaling(size, rate, block_size):
    network = jdrop.linen.as_network(MLP((size,), rate, 0.0))
    variables = drawn_variables(network, INPUTS)
    scaled = thin(network, INPUTS, block_size=block_size).step_rule
    unscaled = thin(network, INPUTS, block_size=block_size, scale=False).step_rule
    (units,) = scaled.units
    assert units.block_size == block_size
    subsets = list(itertools.combinations(range(units.num_blocks), units.kept_blocks))
    assert units.kept_blocks == round((1 - rate) * size) // block_size

    @quick
    def mean_logits(variables):
        def logits(rule, kept):
            kept = {units.name: kept}
            part = rule.take(rule.axes, variables, kept)
            return rule.thinned_network(kept).apply_train(part, INPUTS, jax.random.key(0))[0]

        every = jnp.array(subsets)
        return [jax.vmap(partial(logits, t))(every).mean(0) for t in (scaled, unscaled)]

    by_scaling, without = mean_logits(variables)
    np.testing.assert_allclose(by_scaling, network(variables, INPUTS, None), rtol=1e-4, atol=1e-5)
    at_test = {"params": jdrop.scale_weights(variables["params"], {"Dense_1/kernel": rate})}
    np.testing.assert_allclose(without, network(at_test, INPUTS, None), rtol=1e-4, atol=1e-5)


# Draws.


def test_every_choice_of_kept_blocks_is_equally_probable():
    """Of both layers at once: 6 choices of 2 of 4 units, times 3 of 2 of 3 blocks."""
    network = jdrop.linen.as_network(MLP((4, 48), 1 / 3, 0.0))
    rates = {"Dropout_1": 0.5, "Dropout_2": 1 / 3}
    rule = thin(network, INPUTS, rates, block_size=16).step_rule
    rule = replace(rule, units=(replace(rule.units[0], block_size=1), rule.units[1]))
    keys = jax.random.split(jax.random.key(5), 4_000)
    kept = jax.vmap(rule.draw)(keys)
    assert {name: blocks.shape[1] for name, blocks in kept.items()} == dict.fromkeys(rates, 2)
    pairs = np.concatenate(list(kept.values()), 1)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (pairs[:, 2] < pairs[:, 3]).all()
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 18
    low, high = chi_square_bounds(17)
    assert low < stats.chisquare(counts).statistic < high


def test_the_same_key_draws_the_same_units_and_another_key_others(getkey):
    rule = thin(NETWORK, INPUTS, block_size=1).step_rule
    key = getkey()
    one, same, other = (rule.draw(k) for k in (key, jax.random.clone(key), getkey()))
    assert {name: len(kept) for name, kept in one.items()} == {
        "Dropout_0": 3,
        "Dropout_1": 16,
        "Dropout_2": 4,
    }
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one["Dropout_1"] != other["Dropout_1"]).any()


# The order of units.


def batch_normalised():
    network = jdrop.linen.as_network(LinenMLP(32, rate=0.0))
    return drawn_state(thin(network, INPUTS, {"Dense_0": 0.5}), OPTIMIZERS["momentum"]), network


@pytest.mark.slow
def test_shuffling_units_changes_no_output_and_commutes_with_a_step(getkey):
    """Of weights, statistics and moments alike: a step and a new order may change places."""
    state, network = batch_normalised()
    # Moments of their own, of which those of a step from zero would be a multiple.
    state = replace(
        state, opt_state=jax.tree.map(lambda leaf: jnp.cos(9 * leaf), moments_like(state))
    )
    rule, axes = state.network.step_rule, state.network.step_rule.axes_in(state)

    @quick
    def both(key, state):
        def step(state):
            plain = replace(state, network=network)
            after = train_step(jax.random.key(0), plain, BATCH)[0]
            return after.variables, after.opt_state

        def shuffled(tree):
            return rule.shuffle(jax.random.clone(key), axes, tree)

        before = state.variables, state.opt_state
        variables, opt_state = shuffled(before)
        outputs = [network(tree, INPUTS, None) for tree in (state.variables, variables)]
        first = replace(state, variables=variables, opt_state=opt_state)
        return outputs, (before, (variables, opt_state)), step(first), shuffled(step(state))

    outputs, (before, after), shuffled_first, stepped_first = both(getkey(), state)
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    assert_close(shuffled_first, stepped_first, rtol=1e-4, atol=1e-5)
    kernel = [variables["params"]["Dense_0"]["kernel"] for variables, _ in (before, after)]
    assert (kernel[0] != kernel[1]).any()
    np.testing.assert_array_equal(np.sort(kernel[0]), np.sort(kernel[1]))


def moments_like(state):
    keys = itertools.count()
    return jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(next(keys)), leaf.shape), state.opt_state
    )


@pytest.mark.slow
def test_fit_shuffles_units_unless_shuffle_is_false(getkey):
    """Without gradients, an epoch only changes the order, that of the moments too."""
    network = jdrop.linen.as_network(MLP())
    for shuffle in (True, False):
        state = drawn_state(thin(network, INPUTS, shuffle=shuffle), optax.sgd(0.1))
        moments = optax.TraceState(jax.tree.map(jnp.copy, state.variables["params"]))
        optimizer = optax.chain(optax.trace(1.0), optax.scale(0.0))
        opt_state = (moments, optax.ScaleState())
        state = replace(
            state, optimizer=optimizer, opt_state=opt_state, loss_fn=lambda out, _: 0 * out[:, 0]
        )
        after, _ = quick(partial(fit, num_epochs=1, batch_size=8))(getkey(), state, *BATCH)
        assert_same(after.opt_state[0].trace, after.variables["params"])
        before, after = state.variables["params"], after.variables["params"]
        same = [
            bool((before[name]["kernel"] == after[name]["kernel"]).all()) for name in sorted(before)
        ]
        assert same == ([False] * 3 if shuffle else [True] * 3)
        for name in before:
            ordered = [np.sort(np.ravel(params[name]["kernel"])) for params in (before, after)]
            np.testing.assert_array_equal(*ordered)


@pytest.mark.slow
def test_a_thinned_fit_in_parts_equals_the_fit_in_one(getkey):
    state = drawn_state(thin(NETWORK, INPUTS), optax.adam(0.01))
    key = getkey()
    whole, losses = quick(partial(fit, num_epochs=2, batch_size=4))(key, state, *BATCH)
    one_epoch = quick(partial(fit, num_epochs=1, batch_size=4))
    parts = []
    for _ in range(2):
        state, part = one_epoch(jax.random.clone(key), state, *BATCH)
        parts.append(part)
    np.testing.assert_array_equal(jnp.concatenate(parts), losses)
    assert_same((state.variables, state.opt_state), (whole.variables, whole.opt_state))


# Ensembles.


@pytest.mark.slow
def test_a_thinned_member_on_its_own_device_equals_the_same_member_trained_alone(getkey):
    network, optimizer = thin(NETWORKS["nnx"], INPUTS), optax.sgd(0.1, momentum=0.9)
    init_key, fit_key = getkey(), getkey()
    state = ensemble.init_ensemble(init_key, network, optimizer, INPUTS, ensemble_size=8)
    run = quick(partial(ensemble.fit_ensemble, num_epochs=2, batch_size=4))
    mesh = jax.make_mesh((8,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(state, NamedSharding(mesh, P("member")))
    trained, losses = run(fit_key, sharded, *BATCH)
    kernel = trained.variables["params"]["hidden"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert not kernel.sharding.is_fully_replicated
    alone = jax.tree.map(lambda leaf: leaf[5], state)
    member_key = ensemble.member_keys(jax.random.clone(fit_key), 8)[5]
    run_alone = quick(partial(fit, num_epochs=2, batch_size=4))
    alone, alone_losses = run_alone(member_key, alone, *BATCH)
    member = jax.tree.map(lambda leaf: leaf[5], (trained.variables, losses))
    assert_close((alone.variables, alone_losses), member, rtol=1e-4, atol=1e-5)
    assert len(np.unique(losses[:, -1])) == 8


@pytest.mark.slow
def test_a_thinned_fit_keeps_bfloat16_variables_in_bfloat16(getkey):
    network = thin(jdrop.linen.as_network(MLP(input_rate=0.0)), INPUTS)
    variables = drawn_variables(network, INPUTS)
    variables = jax.tree.map(lambda leaf: (leaf / 4).astype(jnp.bfloat16), variables)
    state = TrainState.create(network, variables, optax.sgd(0.05, momentum=0.9))
    inputs = INPUTS.astype(jnp.bfloat16)
    run = quick(partial(fit, num_epochs=40, batch_size=8))
    state, losses = run(getkey(), state, inputs, LABELS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.slow
@pytest.mark.parametrize("collection", ["frozen", "params"])
def test_scaled_weights_that_are_not_trained_stay_unchanged(getkey, collection):
    """Those that read units are scaled while they are read."""

    def apply_fn(variables, inputs, key):
        return jnp.tanh(inputs @ variables["params"]["w"]) @ variables[collection]["v"]

    def init_fn(key, inputs):
        variables = {"params": {"w": jnp.ones((4, 8))}, "frozen": {}}
        variables[collection]["v"] = jnp.ones((8, 3))
        return variables

    trained = {"w": True, **({"v": False} if collection == "params" else {})}
    optimizer = optax.partition({True: optax.sgd(0.1), False: optax.set_to_zero()}, trained)
    network = thin(Network(apply_fn, init_fn), INPUTS, {"w": 0.5})
    state = TrainState.create(network, network.init(getkey(), INPUTS), optimizer)
    state, _ = train_step(getkey(), state, BATCH)
    np.testing.assert_array_equal(state.variables[collection]["v"], jnp.ones((8, 3)))


def test_a_step_raises_for_variables_of_another_shape(getkey):
    network = thin(NETWORK, INPUTS)
    wide = jnp.ones((8, 5))
    variables = NETWORK.init(getkey(), wide)
    state = TrainState.create(network, variables, optax.adam(0.1))
    with pytest.raises(ThinningError, match=r"shape \(5, 32\) where `thin` found \(4, 32\)"):
        jax.eval_shape(train_step, getkey(), state, (wide, LABELS))


def test_a_step_raises_for_an_optimizer_with_factored_state(getkey):
    factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
    state = drawn_state(thin(NETWORK, INPUTS), factored)
    with pytest.raises(ThinningError, match="the optimizer keeps an array of shape"):
        jax.eval_shape(train_step, getkey(), state, BATCH)
