"""What the linen and the nnx layer have in common, and networks made of them.

Each layer is registered once, beside the layer of Flax that it replaces; the same tests run over
both, and Flax is the reference wherever a jdrop layer must do as Flax does.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_reference import flax_drawing_our_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import Network, record_masks, replay_masks

pytestmark = pytest.mark.grid

# One dropout layer, whose output is a function of (constructor arguments, inputs, call arguments).


def call_linen(layer: type, inputs: Any, key: Any = None, rate: Any = 0.5, **options: Any) -> Any:
    at_call = options.pop("at_call", {})
    rngs = None if key is None else {"dropout": key}
    return layer(rate, **options).apply({}, inputs, **at_call, rngs=rngs)


def call_nnx(layer: type, inputs: Any, key: Any = None, rate: Any = 0.5, **options: Any) -> Any:
    at_call = options.pop("at_call", {})
    rngs = None if key is None else nnx.Rngs(dropout=key)
    return layer(rate, rngs=rngs, **options)(inputs, **at_call)


@dataclass(frozen=True)
class Layer:
    """A layer of jdrop, the one of Flax that it replaces, and how both are called."""

    ours: type
    flax: type
    call: Callable[..., Any]
    key_argument: str
    """The name of the call's argument that takes a key."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.call(self.ours, *args, **options)

    def with_key(self, key: jax.Array, inputs: Any, rate: Any, **options: Any) -> Any:
        """The output for a key given at the call."""
        at_call = {self.key_argument: key, "deterministic": False, **options.pop("at_call", {})}
        if self.flax is nnx.Dropout:
            options["deterministic"] = None
        return self(inputs, None, rate, at_call=at_call, **options)


@pytest.fixture(params=["linen", "nnx"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return {
        "linen": Layer(jdrop.linen.Dropout, flax.linen.Dropout, call_linen, "rng"),
        "nnx": Layer(jdrop.nnx.Dropout, nnx.Dropout, call_nnx, "rngs"),
    }[request.param]


def parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return {each.name: (each.kind, each.default) for each in found}


@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_arguments_are_those_of_flax_and_at_the_call_a_rate(layer, method):
    flax_parameters = parameters(getattr(layer.flax, method))
    our_parameters = parameters(getattr(layer.ours, method))
    rate = our_parameters.pop("rate") if method == "__call__" else None
    assert list(our_parameters.items()) == list(flax_parameters.items())
    assert rate in (None, (inspect.Parameter.KEYWORD_ONLY, None))


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return np.asarray(call())
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("at_call", [None, True, False])
@pytest.mark.parametrize("in_constructor", [None, True, False])
def test_mode_rate_and_key_lead_where_they_lead_in_flax(
    layer, in_constructor, at_call, rate, with_key, getkey
):
    """To the same output or to an error of the same type, in each of the combinations."""
    key = getkey() if with_key else None
    options = {"deterministic": in_constructor, "at_call": {"deterministic": at_call}}
    # linen hands out the key in silence; nnx consumes it when the layer is made.
    twin = None if key is None else jax.random.clone(key)
    with flax_drawing_our_bits():
        expected = outcome(lambda: layer.call(layer.flax, jnp.ones((4, 3)), key, rate, **options))
    actual = outcome(lambda: layer(jnp.ones((4, 3)), twin, rate, **options))
    np.testing.assert_equal(actual, expected)


@pytest.mark.parametrize("broadcast_dims", [(), (-1,), (0, 2)])
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_given_a_key_the_layer_is_the_function(layer, rate, broadcast_dims, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (4, 5, 6))
    expected = jdrop.dropout(jax.random.clone(key), x, rate, broadcast_dims=broadcast_dims)
    actual = layer.with_key(key, x, rate, broadcast_dims=broadcast_dims)
    assert jnp.array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize(
    ("rng_collection", "broadcast_dims"), [("dropout", ()), ("noise", [1]), ("params", (0, -1))]
)
def test_equals_flax_with_the_same_bits(layer, rng_collection, broadcast_dims, dtype, getkey):
    """So the key of a layer, made from the stream's key, is Flax's too."""
    key, x = getkey(), jax.random.normal(getkey(), (4, 5, 6), dtype)
    options = {"deterministic": False, "broadcast_dims": broadcast_dims}

    def run(cls: type) -> jax.Array:
        rngs = {rng_collection: jax.random.clone(key)}
        if layer.flax is nnx.Dropout:
            stream = nnx.Rngs(**rngs)
            return cls(0.5, rng_collection=rng_collection, rngs=stream, **options)(x)
        return cls(0.5, rng_collection=rng_collection, **options).apply({}, x, rngs=rngs)

    with flax_drawing_our_bits():
        expected = run(layer.flax)
    actual = run(layer.ours)
    assert actual.dtype == dtype
    assert jnp.array_equal(actual, expected)


@pytest.mark.parametrize(
    "options",
    [{"rate": 0.0, "deterministic": False}, {"rate": 0.0, "at_call": {"deterministic": False}},
     {"rate": 0.5, "deterministic": True}, {"rate": 1.0, "at_call": {"deterministic": True}},
     {"rate": 0.5, "at_call": {"rate": 0.0, "deterministic": False}}],
    ids=str,
)  # fmt: skip
def test_without_noise_the_inputs_come_back_and_nothing_is_drawn(layer, options):
    if layer.flax is nnx.Dropout:
        options = {"deterministic": None, **options}
    x = jnp.ones((4, 3))
    assert layer(x, None, **options) is x
    integers = jnp.arange(3)
    assert layer(integers, None, **options) is integers
    assert not jax.make_jaxpr(lambda x: layer(x, None, **options))(x).eqns


@pytest.mark.parametrize("at_call", [{}, {"rate": 1.0}])
def test_at_rate_one_the_output_is_zeros_and_so_is_the_gradient(layer, at_call):
    def total(x: jax.Array) -> jax.Array:
        return layer(x, None, 0.3 if at_call else 1.0, deterministic=False, at_call=at_call).sum()

    x = jnp.array([1.0, jnp.inf, jnp.nan])
    value, gradient = jax.value_and_grad(total)(x)
    assert value == 0
    assert jnp.array_equal(gradient, jnp.zeros(3))


@pytest.mark.parametrize("rate", [-0.5, 1.5, math.nan, math.inf, -1e-9])
def test_a_rate_out_of_range_raises_in_the_constructor_and_at_the_call(layer, rate, getkey):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got"):
        layer.ours(rate)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got"):
        layer.with_key(getkey(), jnp.ones(3), 0.5, at_call={"rate": rate})


def test_a_rate_set_after_construction_is_checked(getkey):
    dropout = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(getkey()))
    dropout.rate = 0.0
    assert dropout(jnp.ones(3)).sum() == 3
    dropout.rate = 1.5
    with pytest.raises(ValueError, match="rate must lie in"):
        dropout(jnp.ones(3))


@pytest.mark.parametrize("where", ["constructor", "call"])
def test_a_traced_rate_compiles_once_and_gives_what_a_number_gives(layer, where, getkey):
    if where == "constructor" and layer.flax is nnx.Dropout:
        pytest.skip("attributes of an nnx module are static")
    key, x, traces = getkey(), jax.random.normal(getkey(), (16, 16)), []

    @jax.jit
    def run(rate: jax.Array, key: jax.Array) -> jax.Array:
        traces.append(rate)
        if where == "constructor":
            return layer.with_key(key, x, rate)
        return layer.with_key(key, x, 0.5, at_call={"rate": rate})

    for rate in (0.0, 0.15, 0.3, 0.9):
        expected = layer.with_key(jax.random.clone(key), x, rate)
        # Scaled in the same precision, but a traced scale is not rounded by the same code.
        actual = run(jnp.float32(rate), jax.random.clone(key))
        assert jnp.array_equal(actual == 0, expected == 0)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert (run(jnp.float32(1), jax.random.clone(key)) == 0).all()
    assert jnp.isnan(run(jnp.float32(-0.5), jax.random.clone(key))).all()
    assert len(traces) == 1


def test_layers_take_one_rate_for_each_channel(layer, getkey):
    rates = jnp.array([0.0, 0.5, 1.0])
    y = layer.with_key(getkey(), jnp.ones((2000, 3)), 0.1, at_call={"rate": rates})
    assert (y[:, 0] == 1).all()
    assert set(np.unique(y[:, 1])) == {0, 2}
    assert (y[:, 2] == 0).all()


def test_the_gradient_with_respect_to_the_rate_is_zero(layer, getkey):
    def total(rate: jax.Array, key: jax.Array) -> jax.Array:
        return layer.with_key(key, jnp.ones(64), 0.5, at_call={"rate": rate}).sum()

    for rate in (0.0, 0.5, 1.0):
        assert jax.grad(total)(rate, getkey()) == 0


def test_the_gradient_is_the_mask_over_the_probability_to_keep(layer, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (8, 8))
    gradient = jax.grad(lambda x: layer.with_key(key, x, 0.75).sum())(x)
    mask = jdrop.keep_mask(jax.random.clone(key), (8, 8), 0.75)
    assert jnp.array_equal(gradient, 4.0 * mask)


def test_jit_remat_and_vmap_leave_the_masks_as_they_are(layer, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (8, 8))

    def run(key: jax.Array) -> jax.Array:
        return layer(x, key, 0.5, deterministic=False)

    for transform in (jax.jit, jax.checkpoint):
        expected = run(jax.random.clone(key))
        assert jnp.array_equal(transform(run)(jax.random.clone(key)), expected)
    keys = jax.random.split(key, 3)
    expected = jnp.stack([run(key) for key in jax.random.clone(keys)])
    assert jnp.array_equal(jax.vmap(run)(keys), expected)


def test_the_mask_does_not_depend_on_the_dtype(layer, getkey):
    key = getkey()
    outputs = [
        layer.with_key(jax.random.clone(key), jnp.ones(256, dtype), 0.3) != 0
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    ]
    assert jnp.array_equal(outputs[0], outputs[1])
    assert jnp.array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("broadcast_dims", [(), (0,), (1,)])
@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("jit", [False, True])
def test_works_on_a_mesh_of_explicit_axes(layer, jit, rate, broadcast_dims, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (8, 6))
    expected = layer(x, jax.random.clone(key), rate, deterministic=False,
                     broadcast_dims=broadcast_dims)  # fmt: skip

    def run(x: jax.Array, key: jax.Array) -> jax.Array:
        return layer(x, key, rate, deterministic=False, broadcast_dims=broadcast_dims)

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("batch", None))
        y = (jax.jit(run) if jit else run)(jax.device_put(x, sharding), key)
    assert y.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integers_cannot_be_dropped(layer, dtype, getkey):
    with pytest.raises(TypeError, match="must be a float or complex array, got"):
        layer.with_key(getkey(), jnp.ones(3, dtype), 0.5)


@pytest.mark.parametrize("broadcast_dims", [(2,), (-3,), (0, 0)])
def test_broadcast_dims_that_name_no_axis_or_one_twice_raise(layer, broadcast_dims, getkey):
    with pytest.raises(ValueError, match="broadcast_dims must"):
        layer.with_key(getkey(), jnp.ones((2, 3)), 0.5, broadcast_dims=broadcast_dims)


# Networks: the same one of linen and of nnx, with three sites, of which one is called twice.


RATES = (0.5, 0.25, 0.125)
"""Such that 16 bits realise them exactly."""


class LinenNet(flax.linen.Module):
    rates: tuple[float, float, float]

    def setup(self):
        self.of_inputs, self.of_hidden, self.shared = map(jdrop.linen.Dropout, self.rates)
        self.hidden, self.readout = flax.linen.Dense(2), flax.linen.Dense(2)

    def __call__(self, x, train):
        x = jax.nn.relu(self.hidden(self.of_inputs(x, not train)))
        x = self.shared(self.of_hidden(x, not train), not train)
        return self.shared(self.readout(x), not train)


class NnxNet(nnx.Module):
    def __init__(self, rngs, rates):
        self.of_inputs, self.of_hidden, self.shared = (
            jdrop.nnx.Dropout(rate, rngs=rngs) for rate in rates
        )
        self.hidden, self.readout = nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.hidden(self.of_inputs(x)))
        x = self.shared(self.of_hidden(x))
        return self.shared(self.readout(x))


def linen_network(*rates: float) -> Network:
    return jdrop.linen.as_network(LinenNet(rates))


def nnx_network(*rates: float) -> Network:
    return jdrop.nnx.as_network(lambda rngs: NnxNet(rngs, rates))


MakeNetwork = Callable[..., Network]


@pytest.fixture(params=[linen_network, nnx_network], ids=["linen", "nnx"])
def make_network(request: pytest.FixtureRequest) -> MakeNetwork:
    return request.param


def test_recording_changes_nothing_and_replaying_repeats_the_pass(make_network, getkey):
    network, x, key = make_network(*RATES), jax.random.normal(getkey(), (50, 3)), getkey()
    variables = network.init(getkey(), x)
    y, masks = record_masks(jax.random.clone(key), network, variables, x)
    assert jnp.array_equal(y, network(variables, x, key))
    assert {name: tuple(map(jnp.shape, calls)) for name, calls in masks.items()} == {
        "of_inputs": ((50, 3),),
        "of_hidden": ((50, 2),),
        "shared": ((50, 2), (50, 2)),
    }
    replayed = replay_masks(network, masks)
    for _ in range(2):
        assert jnp.array_equal(replayed(variables, x, None), y)
        # The keys change nothing.
        assert jnp.array_equal(replayed(variables, x, getkey()), y)
        trained, updated = replayed.apply_train(variables, x, getkey())
        assert jnp.array_equal(trained, y)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, updated, variables))
    flipped = jax.tree.map(jnp.logical_not, masks)
    assert not jnp.array_equal(replay_masks(network, flipped)(variables, x, None), y)


def test_recording_and_replaying_work_inside_jit_and_vmap(make_network, getkey):
    network, x, keys = make_network(*RATES), jax.random.normal(getkey(), (5, 3)), getkey()
    keys = jax.random.split(keys, 3)
    variables = network.init(getkey(), x)

    @jax.jit
    @jax.vmap
    def record_and_replay(key: jax.Array) -> tuple[Any, Any, Any]:
        y, masks = record_masks(key, network, variables, x)
        return y, masks, replay_masks(network, masks)(variables, x, None)

    y, masks, replayed = record_and_replay(jax.random.clone(keys))
    np.testing.assert_allclose(y, replayed, rtol=1e-5, atol=1e-6)
    for index, key in enumerate(keys):
        _, expected = record_masks(key, network, variables, x)
        recorded = jax.tree.map(lambda mask, index=index: mask[index], masks)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, recorded, expected))


def test_a_layer_without_a_mask_draws_as_before(make_network, getkey):
    network, x = make_network(*RATES), jax.random.normal(getkey(), (64, 3))
    variables = network.init(getkey(), x)
    _, masks = record_masks(getkey(), network, variables, x)
    without_inputs = {name: calls for name, calls in masks.items() if name != "of_inputs"}
    replayed, key = replay_masks(network, without_inputs), getkey()
    y, recorded = record_masks(jax.random.clone(key), replayed, variables, x)
    assert jnp.array_equal(y, replayed(variables, x, jax.random.clone(key)))
    # From the key from which the network itself draws.
    _, drawn = record_masks(key, network, variables, x)
    assert list(recorded) == ["of_inputs"]
    assert jnp.array_equal(recorded["of_inputs"][0], drawn["of_inputs"][0])
    assert not jnp.array_equal(y, replayed(variables, x, getkey()))
    # Without a key it is switched off.
    kept = {**without_inputs, "of_inputs": (jnp.array(True),)}
    scaled = replay_masks(network, kept)(variables, x * (1 - RATES[0]), None)
    np.testing.assert_allclose(replayed(variables, x, None), scaled, rtol=1e-6)


def test_no_masks_are_recorded_where_none_are_drawn(make_network, getkey):
    network, x = make_network(0.0, 1.0, 0.0), jax.random.normal(getkey(), (5, 3))
    variables = network.init(getkey(), x)
    y, masks = record_masks(getkey(), network, variables, x)
    assert list(masks) == ["of_hidden"]
    assert not masks["of_hidden"][0].any()
    # At the rate 1 the output is zeros, with a key and, replayed, without.
    for outputs in (y, replay_masks(network, masks)(variables, x, None)):
        bias = variables["params"]["readout"]["bias"]
        assert jnp.array_equal(outputs, jnp.broadcast_to(bias, (5, 2)))


def test_one_mask_serves_every_call_and_every_example(make_network, getkey):
    network, x = make_network(*RATES), jnp.ones((5, 3))
    variables = network.init(getkey(), x)
    masks = {
        "of_inputs": (jnp.array([True, False, True]),),
        "of_hidden": (jnp.array([[True, True]]),),
        "shared": [jnp.array([True, False])],
    }
    y = replay_masks(network, masks)(variables, x, getkey())
    assert (y == y[:1]).all()
    assert (y[:, 1] == 0).all()
    hidden, readout = (
        jax.tree.map(np.asarray, variables["params"][name]) for name in ("hidden", "readout")
    )
    h = np.maximum(np.array([2, 0, 2]) @ hidden["kernel"] + hidden["bias"], 0)
    h = h / 0.75 * np.array([1 / 0.875, 0])
    expected = (h @ readout["kernel"] + readout["bias"])[0] / 0.875
    np.testing.assert_allclose(y[:, 0], np.full(5, expected), rtol=1e-5)


def test_the_masks_of_several_calls_are_used_in_turn(make_network, getkey):
    network, x = make_network(*RATES), jnp.ones((5, 3))
    variables = network.init(getkey(), x)
    keep, drop = jnp.array(True), jnp.array(False)
    both, first, second = (
        replay_masks(network, {"shared": calls})(variables, x, None)
        for calls in ((keep, keep), (keep, drop), (None, drop))
    )
    assert (both != 0).any()
    assert (first == 0).all()
    assert (second == 0).all()
    # None leaves the first call as it is, which without a key is switched off.
    only_second = replay_masks(network, {"shared": (None, keep)})(variables, x, None)
    np.testing.assert_allclose(only_second, network(variables, x, None) / 0.875, rtol=1e-6)


class LinenSometimesOff(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        drop = jdrop.linen.Dropout(0.5, name="drop")
        return jnp.stack([drop(x, deterministic=off) for off in (True, False, True, False)])


class NnxSometimesOff(nnx.Module):
    def __init__(self, rngs):
        self.drop = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.drop(x, deterministic=off) for off in (True, False, True, False)])


@pytest.mark.parametrize(
    "network",
    [jdrop.linen.as_network(LinenSometimesOff()), jdrop.nnx.as_network(NnxSometimesOff)],
    ids=["linen", "nnx"],
)
def test_calls_that_are_switched_off_have_none_in_place_of_a_mask(network, getkey):
    x, key = jnp.ones((4, 8)), getkey()
    variables = network.init(getkey(), x)
    y, masks = record_masks(jax.random.clone(key), network, variables, x)
    assert jnp.array_equal(y, network(variables, x, key))
    assert [mask is None for mask in masks["drop"]] == [True, False, True, False]
    assert jnp.array_equal(y[1] != 0, masks["drop"][1])
    assert jnp.array_equal(replay_masks(network, masks)(variables, x, None), y)


@pytest.mark.parametrize("name", ["hidden", "of", "of_inputs/mask", ""])
def test_masks_for_what_is_no_dropout_layer_raise(make_network, name, getkey):
    network, x = make_network(*RATES), jnp.ones((5, 3))
    variables = network.init(getkey(), x)
    replayed = replay_masks(network, {"shared": (jnp.array(True),), name: (jnp.array(True),)})
    message = f"masks names {name}, but the network has no such dropout layer"
    with pytest.raises(ValueError, match=message):
        replayed(variables, x, None)
    with pytest.raises(ValueError, match=message):
        replayed.apply_train(variables, x, getkey())


def test_masks_that_are_no_tuple_or_an_empty_one_raise(make_network):
    network = make_network(*RATES)
    # In the tests jaxtyping may refuse the array first.
    with pytest.raises(TypeError, match="masks"):
        replay_masks(network, {"shared": jnp.array([True, False])})
    with pytest.raises(ValueError, match=r"masks\['shared'\] must hold at least 1 mask"):
        replay_masks(network, {"shared": ()})


def test_a_mask_that_does_not_fit_raises(make_network, getkey):
    network, x = make_network(*RATES), jnp.ones((5, 3))
    variables = network.init(getkey(), x)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        replay_masks(network, {"of_inputs": (jnp.ones(7, bool),)})(variables, x, getkey())


def test_the_mask_of_sharded_inputs_is_sharded_as_they_are(make_network, getkey):
    """Not replicated, though the output would be the same."""
    network = make_network(*RATES)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("batch", None))
        x = jax.device_put(jnp.ones((8, 3)), sharding)
        variables = network.init(getkey(), x)
        _, masks = record_masks(getkey(), network, variables, x)
        assert masks["of_inputs"][0].sharding.is_equivalent_to(sharding, 2)


def test_a_replayed_network_initialises_with_another_batch_size():
    network = jdrop.linen.as_network(flax.linen.Dropout(0.5))
    masks = {"": (jnp.ones((4, 8), bool),)}
    assert replay_masks(network, masks).init(jax.random.key(0), jnp.ones((1, 8))) == {}


def test_a_function_without_layers_cannot_be_recorded_or_replayed(getkey):
    network = Network(lambda variables, inputs, key: inputs)
    with pytest.raises(ValueError, match=r"no replace_fn.*as_network"):
        record_masks(getkey(), network, {}, jnp.ones(3))
    with pytest.raises(ValueError, match=r"no replace_fn.*as_network"):
        replay_masks(network, {})


def test_layers_and_their_calls_draw_independent_masks(make_network, getkey):
    """Any two of the four masks agree in half of the places where both drop with 1/2."""
    rates, n = (0.5, 0.5, 0.5), 4096
    network = make_network(*rates)
    variables = network.init(getkey(), jnp.ones((1, 3)))
    _, masks = record_masks(getkey(), network, variables, jnp.ones((n, 3)))
    drawn = [mask[:, :2].reshape(-1) for mask in jax.tree.leaves(masks)]
    assert len(drawn) == 4
    for one, two in itertools.combinations(drawn, 2):
        # Hoeffding: the mean of 2n fair bits strays this far with probability below 1e-8.
        assert abs(float((one == two).mean()) - 0.5) < math.sqrt(math.log(2e8) / (4 * n))


def test_the_network_is_a_pure_function_of_its_arguments(make_network, getkey):
    network, x = make_network(*RATES), jax.random.normal(getkey(), (5, 3))
    variables, key = network.init(getkey(), x), getkey()
    y = network(variables, x, jax.random.clone(key))
    assert jnp.array_equal(network(variables, x, jax.random.clone(key)), y)
    jitted = jax.jit(network.apply_fn)(variables, x, jax.random.clone(key))
    np.testing.assert_allclose(jitted, y, rtol=1e-5, atol=1e-6)
    assert not jnp.array_equal(network(variables, x, getkey()), y)
    deterministic = network(variables, x, None)
    assert jnp.array_equal(network(variables, x, None), deterministic)
    assert not jax.make_jaxpr(lambda x: network(variables, x, None))(x).effects
    assert "random_bits" not in str(jax.make_jaxpr(lambda x: network(variables, x, None))(x))


def test_members_are_mapped_over_keys(make_network, getkey):
    network, x = make_network(*RATES), jax.random.normal(getkey(), (5, 3))
    keys = jax.random.split(getkey(), 3)

    def member(key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        init_key, sample_key, train_key = jax.random.split(key, 3)
        variables = network.init(init_key, x)
        outputs, variables = network.apply_train(variables, x, train_key)
        return variables, network(variables, x, sample_key), outputs

    mapped = jax.jit(jax.vmap(member))(jax.random.clone(keys))
    looped = [member(key) for key in keys]
    for i, expected in enumerate(looped):
        for leaf, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf[i], other, rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(mapped[1]), axis=0)) == 3


def all_masks(*sites: tuple[float, int]) -> tuple[list[jax.Array], np.ndarray]:
    """Every mask of sites of these rates and sizes, with a leading axis, and the probabilities."""
    rates, sizes = zip(*sites, strict=True)
    bits = np.array(list(itertools.product([False, True], repeat=sum(sizes))))
    drop = np.repeat(rates, sizes)
    probabilities = np.where(bits, 1 - drop, drop).prod(axis=1)
    return [
        jnp.array(mask) for mask in np.split(bits, np.cumsum(sizes)[:-1], axis=1)
    ], probabilities


def outputs_of_all(network: Network, variables: Any, x: jax.Array, masks: Any) -> np.ndarray:
    """The outputs of every thinned network, by one `vmap` over the masks; no key is used."""

    @jax.vmap
    def thinned(masks: Any) -> jax.Array:
        return replay_masks(network, masks)(variables, x, None)

    return np.asarray(thinned(masks), np.float64)


def test_the_mean_over_all_masks_of_a_linear_part_is_the_deterministic_network(
    make_network, getkey
):
    """Behind the last nonlinearity weight scaling is exact: for the arithmetic mean of logits,
    and so for the normalised geometric mean of the predictions."""
    network, x = make_network(0.0, *RATES[1:]), jax.random.normal(getkey(), (5, 3))
    variables = network.init(getkey(), x)
    (of_hidden, *shared), probabilities = all_masks((0.25, 2), (0.125, 2), (0.125, 2))
    assert len(probabilities) == 2**6
    masks = {"of_hidden": (of_hidden,), "shared": tuple(shared)}
    logits = outputs_of_all(network, variables, x, masks)
    expected = network(variables, x, None)
    np.testing.assert_allclose(np.tensordot(probabilities, logits, 1), expected, atol=1e-5)

    log_probs = jax.nn.log_softmax(logits)
    pooled = jax.nn.log_softmax(np.tensordot(probabilities, log_probs, 1))
    np.testing.assert_allclose(pooled, jax.nn.log_softmax(expected), atol=1e-5)


def test_samples_are_thinned_networks_and_converge_to_their_mean(make_network, getkey):
    network, x = make_network(0.5, 0.25, 0.0), jax.random.normal(getkey(), (1, 3))
    variables = network.init(getkey(), x)
    (of_inputs, of_hidden), probabilities = all_masks((0.5, 3), (0.25, 2))
    masks = {"of_inputs": (of_inputs,), "of_hidden": (of_hidden,)}
    outputs = outputs_of_all(network, variables, x, masks)[:, 0]

    n = 20_000
    samples = jax.jit(jax.vmap(lambda key: network(variables, x, key)[0]))(
        jax.random.split(getkey(), n)
    )
    distances = abs(np.asarray(samples)[:, None] - outputs).max(axis=-1)
    assert distances.min(axis=1).max() < 1e-5
    mean = probabilities @ outputs
    variance = probabilities @ (outputs - mean) ** 2
    # Six standard errors: each of the two outputs fails with probability 2e-9.
    errors = abs(np.asarray(samples, np.float64).mean(axis=0) - mean)
    assert (errors < 6 * np.sqrt(variance / n) + 1e-6).all(), (errors, variance)


class OtherFlag(flax.linen.Module):
    """A linen module with a mode flag under a name that nobody can know."""

    @flax.linen.compact
    def __call__(self, x, is_train=False):
        return jdrop.linen.Dropout(0.5)(flax.linen.Dense(2)(x), deterministic=not is_train)


class TwoFlags(flax.linen.Module):
    """A linen module with two mode flags that mean the same."""

    @flax.linen.compact
    def __call__(self, x, deterministic=True, train=False):
        x = flax.linen.BatchNorm(use_running_average=not train)(x)
        return jdrop.linen.Dropout(0.5)(x, deterministic=deterministic)


class NnxFlag(nnx.Module):
    """An nnx module whose mode is an argument of its call."""

    def __init__(self, rngs):
        self.dropout = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        return self.dropout(x, deterministic=not train)


class NnxNormalised(nnx.Module):
    """An nnx module that tells its normalisation by the call what to use."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(x, use_running_average=not train)
        return self.dropout(x, deterministic=not train)


class NnxOtherFlag(NnxFlag):
    """The same under a name that nobody can know."""

    def __call__(self, x, is_train=False):
        return self.dropout(x, deterministic=not is_train)


def test_a_mode_flag_under_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="'is_train'"):
        jdrop.linen.as_network(OtherFlag())
    with pytest.raises(ValueError, match="'is_train'"):
        jdrop.nnx.as_network(NnxOtherFlag)


def test_every_known_mode_flag_is_set(getkey):
    network = jdrop.linen.as_network(TwoFlags())
    x = jax.random.normal(getkey(), (4, 3))
    variables = network.init(getkey(), x)
    y, updated = network.apply_train(variables, x, getkey())
    assert (y == 0).any()
    before, after = (v["batch_stats"]["BatchNorm_0"]["mean"] for v in (variables, updated))
    assert not jnp.allclose(before, after)


def test_the_mode_flag_of_an_nnx_call_is_set(getkey):
    network = jdrop.nnx.as_network(NnxFlag)
    x = jnp.ones((40, 3))
    variables = network.init(getkey(), x)
    assert (network(variables, x, getkey()) == 0).any()
    assert (network.apply_train(variables, x, getkey())[0] == 0).any()
    assert (network(variables, x, None) == 1).all()


def test_masks_are_drawn_with_running_averages_whatever_the_call_says(getkey):
    network = jdrop.nnx.as_network(NnxNormalised)
    x = 5 * jax.random.normal(getkey(), (40, 3)) + 7
    variables = network.init(getkey(), x)
    sampled, plain = network(variables, x, getkey()), network(variables, x, None)
    kept = sampled != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(sampled[kept], 2 * plain[kept], rtol=1e-6)
    _, updated = network.apply_train(variables, x, getkey())
    assert not jnp.allclose(updated["state"]["norm"]["mean"], variables["state"]["norm"]["mean"])
