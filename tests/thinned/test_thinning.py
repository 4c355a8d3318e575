"""Steps of thinned networks, what they draw, and what they leave alone."""

import inspect
import itertools
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bounds import chi_square_bounds
from exactness import QUICK, assert_close, drawn_inputs, drawn_variables, gradient_of_loss, masked
from flax import nnx
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

INPUTS, LABELS = drawn_inputs(8, 4), jnp.arange(8) % 3
BATCH = INPUTS, LABELS


class MLP(nn.Module):
    """Dropout on the inputs and on each hidden layer."""

    sizes: tuple[int, ...] = (32, 8)
    rate: float = 0.5
    input_rate: float = 0.25

    @nn.compact
    def __call__(self, x, train):
        x = jdrop.linen.Dropout(self.input_rate, deterministic=not train)(x)
        for units in self.sizes:
            x = nn.tanh(nn.Dense(units)(x))
            x = jdrop.linen.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(3)(x)


as_network = partial(jdrop.linen.as_network, MLP())


def drawn_state(network, optimizer, seed=0):
    return TrainState.create(network, drawn_variables(network, INPUTS, seed), optimizer)


def places_of(state):
    thinning = state.network.thinning
    params = state.variables["params"]
    return thinning.places, thinning.places_in_state(state.optimizer, state.opt_state, params)


def deleted_in(state, kept):
    """True where an entry of the variables, or of the optimizer's state, is of a deleted unit."""
    thinning, places = state.network.thinning, places_of(state)
    whole = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, bool), (state.variables, state.opt_state)
    )
    part = jax.tree.map(jnp.zeros_like, thinning.take(places, whole, kept))
    return thinning.put(places, whole, part, kept)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


# Taking out and putting back.


@pytest.mark.parametrize(("block_size", "inner"), [(1, 1), (2, 3), (16, 1), (32, 3)])
def test_take_and_put_are_those_of_numpy(block_size, inner, getkey):
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
    thinning = network.thinning
    assert [units.block_size for units in thinning.units] == [block_size] * 2
    params = drawn_variables(network, INPUTS)["params"]
    kept = thinning.draw(getkey())
    places = thinning.places["params"]
    part = quick(lambda kept: thinning.take(places, params, kept))(kept)
    one, two = (
        (np.asarray(kept[name])[:, None] * block_size + np.arange(block_size)).ravel()
        for name in ("one", "two")
    )
    assert (len(one), len(two)) == (32, 64)
    rows = (np.arange(inner)[:, None] * 64 + one).ravel()
    index = {"one": np.ix_(range(4), one), "two": np.ix_(rows, two), "out": np.ix_(two, range(3))}
    entries = thinning.entries(kept)
    whole = quick(lambda part: thinning.put(places, params, part, kept))(
        jax.tree.map(jnp.negative, part)
    )
    for name, where in index.items():
        expected = np.array(params[name])
        np.testing.assert_array_equal(part[name], expected[where])
        expected[where] *= -1
        np.testing.assert_array_equal(whole[name], expected)
        is_kept = np.zeros(expected.shape, bool)
        is_kept[where] = True
        np.testing.assert_array_equal(np.broadcast_to(entries[name], is_kept.shape), is_kept)


# Steps.

OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_masked_step_that_leaves_deleted_units_alone(name, getkey):
    state = drawn_state(thin(as_network(), INPUTS), OPTIMIZERS[name])
    thinning, frozen = state.network.thinning, freeze_deleted(OPTIMIZERS[name])

    @quick
    def both(key, state):
        kept = thinning.draw(jax.random.split(jax.random.clone(key))[0])
        after, loss = train_step(key, state, BATCH)
        network, params = masked(as_network, thinning, kept), state.variables["params"]
        grads, full_loss = gradient_of_loss(network, params, *BATCH)
        updates, opt_state = frozen.update(
            grads, state.opt_state, params, kept=thinning.entries(kept)
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
def test_statistics_of_deleted_units_stay(kind, getkey):
    state = drawn_state(thin(NETWORKS[kind], INPUTS), optax.adam(0.01))

    @quick
    def step(key, state):
        kept = state.network.thinning.draw(jax.random.split(jax.random.clone(key))[0])
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
def test_mean_over_all_masks_is_weight_scaling(size, rate, block_size):
    network = jdrop.linen.as_network(MLP((size,), rate, 0.0))
    variables = drawn_variables(network, INPUTS)
    scaled = thin(network, INPUTS, block_size=block_size).thinning
    unscaled = thin(network, INPUTS, block_size=block_size, scale=False).thinning
    (units,) = scaled.units
    assert units.block_size == block_size
    subsets = list(itertools.combinations(range(units.num_blocks), units.kept_blocks))
    assert units.kept_blocks == round((1 - rate) * size) // block_size

    @quick
    def mean_logits(variables):
        def logits(thinning, kept):
            kept = {units.name: kept}
            part = thinning.take(thinning.places, variables, kept)
            return thinning.network(kept).apply_train(part, INPUTS, jax.random.key(0))[0]

        every = jnp.array(subsets)
        return [jax.vmap(partial(logits, t))(every).mean(0) for t in (scaled, unscaled)]

    by_scaling, without = mean_logits(variables)
    np.testing.assert_allclose(by_scaling, network(variables, INPUTS, None), rtol=1e-4, atol=1e-5)
    at_test = {"params": jdrop.scale_weights(variables["params"], {"Dense_1/kernel": rate})}
    np.testing.assert_allclose(without, network(at_test, INPUTS, None), rtol=1e-4, atol=1e-5)


# Draws.


def test_every_choice_is_equally_probable():
    """Of both layers at once: 6 choices of 2 of 4 units, times 3 of 2 of 3 blocks."""
    network = jdrop.linen.as_network(MLP((4, 48), 1 / 3, 0.0))
    rates = {"Dropout_1": 0.5, "Dropout_2": 1 / 3}
    thinning = thin(network, INPUTS, rates, block_size=16).thinning
    thinning = replace(
        thinning, units=(replace(thinning.units[0], block_size=1), thinning.units[1])
    )
    keys = jax.random.split(jax.random.key(5), 4_000)
    kept = jax.vmap(thinning.draw)(keys)
    assert {name: blocks.shape[1] for name, blocks in kept.items()} == dict.fromkeys(rates, 2)
    pairs = np.concatenate(list(kept.values()), 1)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (pairs[:, 2] < pairs[:, 3]).all()
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 18
    low, high = chi_square_bounds(17)
    assert low < stats.chisquare(counts).statistic < high


def test_the_same_key_draws_the_same_units_and_another_key_others(getkey):
    thinning = thin(as_network(), INPUTS, block_size=1).thinning
    key = getkey()
    one, same, other = (thinning.draw(k) for k in (key, jax.random.clone(key), getkey()))
    assert {name: len(kept) for name, kept in one.items()} == {
        "Dropout_0": 3,
        "Dropout_1": 16,
        "Dropout_2": 4,
    }
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one["Dropout_1"] != other["Dropout_1"]).any()


@pytest.mark.parametrize(
    ("size", "rate", "at_most", "block_size", "kept"),
    [
        (1024, 0.5, 16, 16, 512),
        (1024, 0.1, 16, 16, 928),  # 928/1024 is within 1/64 of 922/1024.
        (64, 0.5, 64, 32, 32),  # Of a single block nothing could be dropped.
        (64, 0.1, 16, 2, 58),  # 7 of 8 blocks of 8 are too few, 4 of 4 of 16 drop nothing.
        (100, 0.5, 16, 10, 50),
        (61, 0.5, 16, 1, 30),
        (10, 0.25, 16, 2, 8),
        (8, 0.9, 16, 1, 1),
        (96, 0.5, 7, 6, 48),
        (1024, 0.5, 1, 1, 512),
    ],
)
def test_blocks_are_as_large_as_the_share_allows(size, rate, at_most, block_size, kept):
    def init_fn(key, inputs):
        return {"params": {"w": jnp.zeros((4, size)), "v": jnp.zeros((size, 3))}}

    def apply_fn(variables, inputs, key):
        return inputs @ variables["params"]["w"] @ variables["params"]["v"]

    network = thin(Network(apply_fn, init_fn), INPUTS, {"w": rate}, block_size=at_most)
    (units,) = network.thinning.units
    assert (units.block_size, units.kept_blocks * units.block_size) == (block_size, kept)
    assert units.scale == size / kept


def test_inputs_are_taken_one_by_one():
    units = thin(as_network(), INPUTS).thinning.units
    assert [(u.is_input, u.block_size) for u in units] == [(True, 1), (False, 16), (False, 4)]


# The order of units.


def batch_normalised():
    network = jdrop.linen.as_network(LinenMLP(32, rate=0.0))
    return drawn_state(thin(network, INPUTS, {"Dense_0": 0.5}), OPTIMIZERS["momentum"]), network


def test_a_new_order_of_units_changes_no_output_and_goes_with_the_step(getkey):
    """Of weights, statistics and moments alike: a step and a new order may change places."""
    state, network = batch_normalised()
    # Moments of their own, of which those of a step from zero would be a multiple.
    state = replace(
        state, opt_state=jax.tree.map(lambda leaf: jnp.cos(9 * leaf), moments_like(state))
    )
    thinning, places = state.network.thinning, places_of(state)

    @quick
    def both(key, state):
        def step(state):
            plain = replace(state, network=network)
            after = train_step(jax.random.key(0), plain, BATCH)[0]
            return after.variables, after.opt_state

        def shuffled(tree):
            return thinning.shuffled(jax.random.clone(key), places, tree)

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


def test_fit_changes_the_order_of_units_or_keeps_it(getkey):
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


def test_a_fit_in_parts_equals_the_fit_in_one(getkey):
    state = drawn_state(thin(as_network(), INPUTS), optax.adam(0.01))
    key = getkey()
    whole, losses = quick(partial(fit, num_epochs=2, batch_size=4))(key, state, *BATCH)
    one_epoch = quick(partial(fit, num_epochs=1, batch_size=4))
    parts = []
    for _ in range(2):
        state, part = one_epoch(jax.random.clone(key), state, *BATCH)
        parts.append(part)
    np.testing.assert_array_equal(jnp.concatenate(parts), losses)
    assert_same((state.variables, state.opt_state), (whole.variables, whole.opt_state))


# Groups.


@pytest.mark.parametrize("name", ["adamw"])
def test_with_groups_the_gradient_is_their_mean(name, getkey):
    state = drawn_state(thin(as_network(), INPUTS, num_groups=2), OPTIMIZERS[name])
    thinning, frozen = state.network.thinning, freeze_deleted(OPTIMIZERS[name])

    @quick
    def both(key, state):
        draw_key = jax.random.split(jax.random.clone(key))[0]
        after, loss = train_step(key, state, BATCH)
        params = state.variables["params"]
        of_groups, entries = [], []
        for group, group_key in enumerate(jax.random.split(draw_key, 2)):
            kept = thinning.draw(group_key)
            entries.append(thinning.entries(kept))
            rows = slice(4 * group, 4 * group + 4)
            network = masked(as_network, thinning, kept)
            of_groups.append(gradient_of_loss(network, params, INPUTS[rows], LABELS[rows]))
        grads, full_loss = jax.tree.map(lambda *of_group: sum(of_group) / 2, *of_groups)
        in_any = jax.tree.map(lambda one, two: one | two, *entries)
        updates, opt_state = frozen.update(grads, state.opt_state, params, kept=in_any)
        full = optax.apply_updates(params, updates), opt_state, full_loss
        in_none = jax.tree.map(lambda leaf, kept: ~kept & jnp.ones_like(leaf, bool), params, in_any)
        return after, (after.variables["params"], after.opt_state, loss), full, in_none

    for _ in range(2):
        before = state.variables["params"]
        state, *results = both(getkey(), state)
        got, expected, in_none = jax.device_get(results)
        assert_close(got, expected, rtol=1e-4, atol=2e-6)
        before, after = jax.device_get((before, state.variables["params"]))
        jax.tree.map(
            lambda where, old, new: np.testing.assert_array_equal(old[where], new[where]),
            in_none,
            before,
            after,
        )
        assert sum(where.sum() for where in jax.tree.leaves(in_none)) > 0


def test_groups_are_of_equal_size_and_without_batch_statistics(getkey):
    state = drawn_state(thin(as_network(), INPUTS, num_groups=3), optax.sgd(0.1))
    with pytest.raises(ValueError, match="8 examples cannot be divided into 3 groups"):
        jax.eval_shape(train_step, getkey(), state, BATCH)
    with pytest.raises(ThinningError, match="changes its state in training"):
        thin(NETWORKS["linen"], INPUTS, num_groups=2)


# Ensembles.


def test_a_member_on_a_device_of_its_own_equals_the_same_member_trained_alone(getkey):
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


def test_sixteen_bits_stay_sixteen_bits(getkey):
    network = thin(jdrop.linen.as_network(MLP(input_rate=0.0)), INPUTS)
    variables = drawn_variables(network, INPUTS)
    variables = jax.tree.map(lambda leaf: (leaf / 4).astype(jnp.bfloat16), variables)
    state = TrainState.create(network, variables, optax.sgd(0.05, momentum=0.9))
    inputs = INPUTS.astype(jnp.bfloat16)
    run = quick(partial(fit, num_epochs=40, batch_size=8))
    state, losses = run(getkey(), state, inputs, LABELS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-10:].mean() < losses[:10].mean()


# Rates and names.


class NnxMLP(nnx.Module):
    """The same in nnx, the second layer as in Flax."""

    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)
        self.Dropout_1 = nnx.Dropout(0.5, rngs=rngs)
        self.Dropout_2 = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.Dropout_1(nnx.tanh(self.one(x)))
        return self.out(self.Dropout_2(nnx.tanh(self.two(x))))


@pytest.mark.parametrize(
    "network",
    [
        jdrop.linen.as_network(MLP((32, 8), rate=0.5, input_rate=0.0)),
        jdrop.nnx.as_network(NnxMLP),
    ],
    ids=["linen", "nnx"],
)
def test_a_layer_of_rate_0_drops_nothing_and_one_not_named_goes_on(getkey, network):
    variables = drawn_variables(network, INPUTS)

    def distinct_outputs(rates):
        thinning = thin(network, INPUTS, rates).thinning
        kept = {"Dropout_1": jnp.array([0])}
        part = thinning.take(thinning.places, variables, kept)
        thinned = thinning.network(kept)
        keys = jax.random.split(getkey(), 5)
        outputs = jax.vmap(lambda key: thinned.apply_train(part, INPUTS, key)[0])(keys)
        return len(np.unique(outputs, axis=0))

    assert distinct_outputs({"Dropout_1": 0.5, "Dropout_2": 0}) == 1
    assert distinct_outputs({"Dropout_1": 0.5}) == 5


class LinenLayers(nn.Module):
    """Layers that drop units, drop examples, and are off."""

    @nn.compact
    def __call__(self, x, train):
        for layer in (
            jdrop.linen.Dropout(0.5, deterministic=not train, name="units"),
            nn.Dropout(0.5, broadcast_dims=(-1,), deterministic=not train, name="examples"),
            jdrop.linen.Dropout(0.5, deterministic=True, name="off"),
        ):
            x = layer(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        self.linears = nnx.List([nnx.Linear(4, 8, rngs=rngs)])
        self.linears += [nnx.Linear(8, 8, rngs=rngs) for _ in range(2)]
        self.out = nnx.Linear(8, 3, rngs=rngs)
        self.units = jdrop.nnx.Dropout(0.5, rngs=rngs)
        self.examples = nnx.Dropout(0.5, broadcast_dims=(1,), rngs=rngs)
        self.off = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        off = partial(self.off, deterministic=True)
        for linear, layer in zip(self.linears, (self.units, self.examples, off), strict=True):
            x = layer(nnx.relu(linear(x)))
        return self.out(x)


@pytest.mark.parametrize(
    "network",
    [jdrop.linen.as_network(LinenLayers()), jdrop.nnx.as_network(NnxLayers)],
    ids=["linen", "nnx"],
)
def test_layers_that_drop_no_units_do_as_ever(getkey, network):
    network = thin(network, INPUTS)
    (units,) = network.thinning.units
    assert units.name == "units"
    thinned = network.thinning.network({"units": jnp.arange(units.kept_blocks)})
    variables = drawn_variables(network, INPUTS)
    part = network.thinning.take(
        network.thinning.places, variables, {"units": jnp.arange(units.kept_blocks)}
    )
    outputs, _ = thinned.apply_train(part, jnp.ones((64, 4)), getkey())
    # The same examples: each is dropped as a whole or not, and nothing else is drawn.
    assert len(np.unique(outputs.round(4), axis=0)) == 2


@pytest.mark.parametrize("collection", ["frozen", "params"])
def test_weights_that_are_not_trained_stay(getkey, collection):
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


def test_reading_is_as_it_was(getkey):
    network = thin(as_network(), INPUTS)
    variables = drawn_variables(network, INPUTS)
    for key in (None, getkey()):
        other = None if key is None else jax.random.clone(key)
        np.testing.assert_array_equal(
            network(variables, INPUTS, key), as_network()(variables, INPUTS, other)
        )


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ThinningError, "drops none of its 8 units", {"rates": {"Dropout_2": 0.01}}),
        (ThinningError, "rates gives none a rate above 0", {"rates": {"Dropout_1": 0.0}}),
        (ThinningError, "rates gives none a rate above 0", {"rates": {}}),
        (ThinningError, "name 'Dropout_2' in `rates` in its place", {"rates": {"Dense_1": 0.5}}),
        (
            ValueError,
            r"'Dropout_1': rate must lie in \[0, 1\), got 1.5",
            {"rates": {"Dropout_1": 1.5}},
        ),
        (ThinningError, "among the outputs", {"rates": {"Dense_2": 0.5}}),
        (ValueError, "must be a Python number", {"rates": {"Dropout_1": jnp.array(0.5)}}),
        (
            ValueError,
            r"'Dense_7', which is no layer .*'Dropout_0'.*'Dense_0'",
            {"rates": {"Dense_7": 0.5}},
        ),
        (ValueError, "rate", {"rates": {"Dropout_1": 1.0}}),
        (ValueError, "rate", {"rates": {"Dense_0": -0.5}}),
        (ValueError, "block_size must be an integer of at least 1, got 0", {"block_size": 0}),
        (ValueError, "num_groups must be an integer of at least 1, got 0", {"num_groups": 0}),
    ],
)
def test_arguments_out_of_range_are_errors(error, message, options):
    with pytest.raises(error, match=message):
        thin(as_network(), INPUTS, **options)


def test_a_rate_that_is_made_at_the_call_is_an_error():
    class RateAtCall(nn.Module):
        @nn.compact
        def __call__(self, x):
            drop = jdrop.linen.Dropout(0.5, deterministic=False)
            return nn.Dense(3)(drop(nn.Dense(8)(x), rate=jnp.full(8, 0.25)))

    network = jdrop.linen.as_network(RateAtCall())
    # The check of reused keys does not tell of tracers that are used too late.
    with (
        jax.debug_key_reuse(False),
        pytest.raises(ValueError, match="'Dropout_0' must be a Python number"),
    ):
        thin(network, INPUTS)
    assert thin(network, INPUTS, {"Dropout_0": 0.5}).thinning.units[0].rate == 0.5


def test_a_rate_of_the_module_that_is_an_array_is_an_error():
    network = jdrop.linen.as_network(MLP(rate=jnp.array(0.5)))
    with pytest.raises(ValueError, match="'Dropout_1' must be a Python number"):
        thin(network, INPUTS)
    names = {units.name for units in thin(network, INPUTS, {"Dropout_1": 0.5}).thinning.units}
    assert names == {"Dropout_1"}


@pytest.mark.parametrize("wrong", [MLP(), MLP, lambda variables, inputs, key: inputs])
def test_what_is_no_network_is_an_error(wrong):
    with pytest.raises(TypeError, match="as_network"):
        thin(wrong, INPUTS)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "rates must be a dictionary .* got 0.5", {"rates": 0.5}),
        (TypeError, "'Dropout_1': ", {"rates": {"Dropout_1": "half"}}),
        (ValueError, "num_groups must be an integer of at least 1, got 2.0", {"num_groups": 2.0}),
        (ValueError, "block_size must be an integer of at least 1, got '16'", {"block_size": "16"}),
    ],
)
def test_arguments_of_other_types_are_errors(error, message, options):
    # As called by users, without the check of annotations that tests run with.
    with pytest.raises(error, match=message):
        inspect.unwrap(thin)(as_network(), INPUTS, **options)


def test_what_else_can_be_thinned_is_said():
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def drop(x, name):
                return nn.Dropout(0.5, deterministic=not train, name=name)(x)

            x = x + drop(nn.Dense(4)(drop(nn.relu(nn.Dense(8)(x)), "hidden")), "residual")
            return nn.Dense(3)(nn.LayerNorm()(x))

    network = jdrop.linen.as_network(Residual())
    with pytest.raises(ThinningError, match=r"residual: .* rates={'hidden': 0.5}; those not named"):
        thin(network, INPUTS)
    assert [units.name for units in thin(network, INPUTS, {"hidden": 0.5}).thinning.units] == [
        "hidden"
    ]


def test_inputs_of_another_shape_are_an_error(getkey):
    network = thin(as_network(), INPUTS)
    wide = jnp.ones((8, 5))
    variables = as_network().init(getkey(), wide)
    state = TrainState.create(network, variables, optax.adam(0.1))
    with pytest.raises(ThinningError, match=r"shape \(5, 32\) where `thin` found \(4, 32\)"):
        jax.eval_shape(train_step, getkey(), state, (wide, LABELS))


def test_an_optimizer_of_which_no_part_can_be_taken_is_an_error(getkey):
    factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
    state = drawn_state(thin(as_network(), INPUTS), factored)
    with pytest.raises(ThinningError, match="the optimizer keeps an array of shape"):
        jax.eval_shape(train_step, getkey(), state, BATCH)
