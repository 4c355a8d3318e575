"""Which layers `thin` chooses, its block sizes, and its errors about arguments."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import (
    MLP,
    drawn_inputs,
    drawn_variables,
)
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import Network
from jdrop.thinned import ThinningError, thin
from jdrop.train import TrainState, fit

pytestmark = pytest.mark.grid

INPUTS = drawn_inputs(8, 4)


NETWORK = jdrop.linen.as_network(MLP())


# Blocks.


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
        (192, 0.1, 16, 6, 174),  # Blocks of 16 deviate by 1/64, and rounding makes it more.
        (832, 0.6, 64, 26, 338),
        (1024, 0.5, 1, 1, 512),
    ],
)
def test_blocks_are_as_large_as_the_fraction_kept_allows(size, rate, at_most, block_size, kept):
    def init_fn(key, inputs):
        return {"params": {"w": jnp.zeros((4, size)), "v": jnp.zeros((size, 3))}}

    def apply_fn(variables, inputs, key):
        return inputs @ variables["params"]["w"] @ variables["params"]["v"]

    network = thin(Network(apply_fn, init_fn), INPUTS, {"w": rate}, block_size=at_most)
    (units,) = network.step_rule.units
    assert (units.block_size, units.kept_blocks * units.block_size) == (block_size, kept)
    assert units.scale == size / kept


def test_inputs_of_the_network_form_no_blocks():
    units = thin(NETWORK, INPUTS).step_rule.units
    assert [(u.is_input, u.block_size) for u in units] == [(True, 1), (False, 16), (False, 4)]


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
def test_a_layer_of_rate_0_drops_nothing_and_an_unnamed_layer_draws_masks(getkey, network):
    variables = drawn_variables(network, INPUTS)

    def distinct_outputs(rates):
        rule = thin(network, INPUTS, rates).step_rule
        kept = {"Dropout_1": jnp.array([0])}
        part = rule.take(rule.axes, variables, kept)
        thinned = rule.thinned_network(kept)
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
def test_layers_that_are_off_or_drop_whole_examples_are_not_thinned(getkey, network):
    network = thin(network, INPUTS)
    (units,) = network.step_rule.units
    assert units.name == "units"
    thinned = network.step_rule.thinned_network({"units": jnp.arange(units.kept_blocks)})
    variables = drawn_variables(network, INPUTS)
    part = network.step_rule.take(
        network.step_rule.axes, variables, {"units": jnp.arange(units.kept_blocks)}
    )
    outputs, _ = thinned.apply_train(part, jnp.ones((64, 4)), getkey())
    # The same examples: each is dropped as a whole or not, and nothing else is drawn.
    assert len(np.unique(outputs.round(4), axis=0)) == 2


def test_calling_a_thinned_network_equals_calling_the_original(getkey):
    network = thin(NETWORK, INPUTS)
    variables = drawn_variables(network, INPUTS)
    for key in (None, getkey()):
        other = None if key is None else jax.random.clone(key)
        np.testing.assert_array_equal(
            network(variables, INPUTS, key), NETWORK(variables, INPUTS, other)
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
    ],
)
def test_thin_raises_for_arguments_out_of_range(error, message, options):
    with pytest.raises(error, match=message):
        thin(NETWORK, INPUTS, **options)


def test_a_traced_rate_needs_a_number_in_rates():
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
    assert thin(network, INPUTS, {"Dropout_0": 0.5}).step_rule.units[0].rate == 0.5


def test_an_array_as_rate_needs_a_number_in_rates():
    network = jdrop.linen.as_network(MLP(rate=jnp.array(0.5)))
    with pytest.raises(ValueError, match="'Dropout_1' must be a Python number"):
        thin(network, INPUTS)
    names = {units.name for units in thin(network, INPUTS, {"Dropout_1": 0.5}).step_rule.units}
    assert names == {"Dropout_1"}


@pytest.mark.parametrize("wrong", [MLP(), MLP, lambda variables, inputs, key: inputs])
def test_thin_raises_for_a_module_or_function_in_place_of_a_network(wrong):
    with pytest.raises(TypeError, match="as_network"):
        thin(wrong, INPUTS)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "rates must be a dictionary .* got 0.5", {"rates": 0.5}),
        (TypeError, "'Dropout_1': ", {"rates": {"Dropout_1": "half"}}),
        (ValueError, "block_size must be an integer of at least 1, got '16'", {"block_size": "16"}),
    ],
)
def test_thin_raises_for_arguments_of_wrong_types(error, message, options):
    # As called by users, without the check of annotations that tests run with.
    with pytest.raises(error, match=message):
        inspect.unwrap(thin)(NETWORK, INPUTS, **options)


def test_an_error_names_the_layers_that_can_be_thinned():
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
    assert [units.name for units in thin(network, INPUTS, {"hidden": 0.5}).step_rule.units] == [
        "hidden"
    ]


def test_boxed_parameters_are_thinned_as_those_without_a_box(getkey):
    """As `nn.with_logical_partitioning` makes them, to say along which axes to shard."""

    class Hidden(nn.Module):
        boxed: bool

        @nn.compact
        def __call__(self, x, train):
            init = nn.initializers.lecun_normal()
            boxed = nn.with_logical_partitioning(init, ("inputs", "hidden"))
            x = nn.Dense(8, kernel_init=boxed if self.boxed else init, name="hidden")(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(3, name="out")(x)

    init_key, fit_key, results = getkey(), getkey(), []
    for boxed in (False, True):
        network = thin(jdrop.linen.as_network(Hidden(boxed)), INPUTS, block_size=2)
        variables = network.init(jax.random.clone(init_key), INPUTS)
        is_boxed = isinstance(variables["params"]["hidden"]["kernel"], nn.LogicallyPartitioned)
        assert is_boxed == boxed
        state = TrainState.create(network, variables, optax.adam(0.1))
        state, _ = fit(
            jax.random.clone(fit_key), state, INPUTS, jnp.arange(8) % 3, num_epochs=2, batch_size=4
        )
        results.append((network.step_rule.units, nn.meta.unbox(state.variables)))
    assert results[0][0] == results[1][0]
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])


def test_a_boxed_weight_has_the_name_of_its_layer():
    class Hidden(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "hidden"))
            return nn.Dense(3)(nn.Dense(8, kernel_init=init, name="hidden")(x))

    network = jdrop.linen.as_network(Hidden(), has_dropout=False)
    network = thin(network, INPUTS, {"hidden": 0.5}, block_size=2)
    assert [units.size for units in network.step_rule.units] == [8]


class LinenOff(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jdrop.linen.Dropout(0.5, deterministic=True)(nn.relu(nn.Dense(8, name="hidden")(x)))
        return nn.Dense(3)(x)


class NnxOff(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.dropout = jdrop.nnx.Dropout(0.5)

    def __call__(self, x, train):
        return self.out(self.dropout(nnx.relu(self.hidden(x)), deterministic=True))


OFF = {
    "linen": partial(jdrop.linen.as_network, LinenOff()),
    "nnx": partial(jdrop.nnx.as_network, NnxOff),
}


@pytest.mark.parametrize("framework", OFF)
def test_a_network_whose_mode_reaches_no_layer_is_thinned_only_if_it_may_have_no_dropout(framework):
    rates = {"hidden": 0.5}
    with pytest.raises(ValueError, match="draws no mask in training"):
        thin(OFF[framework](), INPUTS, rates)
    plain = OFF[framework](has_dropout=False)
    assert [units.name for units in thin(plain, INPUTS, rates).step_rule.units] == ["hidden"]
    with pytest.raises(ThinningError, match="no dropout layer that is on in training"):
        thin(plain, INPUTS)
