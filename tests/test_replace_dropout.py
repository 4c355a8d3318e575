"""Dropout layers replaced by a function: `network.replace_dropout(f)`."""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.network import StepRule, dropout_sites

pytestmark = pytest.mark.grid

RATE = 0.5


class LinenBlock(nn.Module):
    dropout: Any
    rate: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(4, name="dense")(x))
        return self.dropout(self.rate, name="drop")(x, deterministic=not train)


class LinenNet(nn.Module):
    """Two hidden layers, the second in a block, with batch statistics."""

    dropout: Any
    rate: Any = RATE

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        x = nn.relu(norm(nn.Dense(5, name="dense")(x)))
        x = self.dropout(self.rate, name="drop", deterministic=not train)(x)
        x = LinenBlock(self.dropout, self.rate, name="block")(x, train)
        return nn.Dense(2, name="out")(x)


class NnxBlock(nnx.Module):
    def __init__(self, dropout, rate, rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.drop = dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.dense(x)))


class NnxNet(nnx.Module):
    def __init__(self, dropout, rngs, rate=RATE):
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = dropout(rate, rngs=rngs)
        self.block = NnxBlock(dropout, rate, rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.block(self.drop(nnx.relu(self.norm(self.dense(x))))))


def replaced(network, f):
    return network if f is None else network.replace_dropout(f)


def linen_network(dropout, f, **options):
    return replaced(jdrop.linen.as_network(LinenNet(dropout, **options)), f)


def nnx_network(dropout, f, **options):
    return replaced(jdrop.nnx.as_network(partial(NnxNet, dropout, **options)), f)


NETWORKS = {
    "linen, Flax's": partial(linen_network, nn.Dropout),
    "linen, ours": partial(linen_network, jdrop.linen.Dropout),
    "nnx, Flax's": partial(nnx_network, nnx.Dropout),
    "nnx, ours": partial(nnx_network, jdrop.nnx.Dropout),
}
each_layer = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
each_framework = pytest.mark.parametrize(
    "make", [NETWORKS["linen, ours"], NETWORKS["nnx, ours"]], ids=["linen", "nnx"]
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


def identity(site, x):
    return x


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@each_layer
def test_dropout_left_out_is_the_network_of_rate_0(make, getkey):
    without, of_rate_0 = make(identity), make(None, rate=0.0)
    key = getkey()
    variables = without.init(jax.random.clone(key), X)
    assert_same(variables, of_rate_0.init(key, X))
    for key in (None, getkey()):
        other = None if key is None else jax.random.clone(key)
        assert_same(without(variables, X, key), of_rate_0(variables, X, other))
    key = getkey()
    outputs, trained = without.apply_train(variables, X, key)
    assert_same((outputs, trained), of_rate_0.apply_train(variables, X, jax.random.clone(key)))
    # Not because nothing is trained, or because nothing would be dropped.
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), variables, trained)
    assert any(jax.tree.leaves(changed))
    dropping, _ = make(None).apply_train(variables, X, jax.random.clone(key))
    assert (dropping != outputs).any()


@each_layer
def test_the_replacement_is_called_in_every_mode_with_name_and_rate(make, getkey):
    calls = []

    def look(site, x):
        assert site.shape == x.shape
        calls.append((site.name, site.index, site.shape, site.rate, site.deterministic))
        return x

    network = make(look)
    variables = network.init(getkey(), X)
    del calls[:]  # linen runs the network for this, nnx does not.
    network(variables, X, None)
    network(variables, X, getkey())
    network.apply_train(variables, X, getkey())
    assert calls == [
        (name, 0, shape, RATE, deterministic)
        for deterministic in (True, False, False)
        for name, shape in (("drop", (6, 5)), ("block/drop", (6, 4)))
    ]


@each_framework
def test_parameters_do_not_depend_on_the_replacement(make, getkey):
    key = getkey()
    variables = make(lambda site, x: 0 * x).init(jax.random.clone(key), X)
    assert_same(variables, make(None).init(key, X))


def drawn_variables(network, seed=0):
    """Any numbers: quicker than `init`, and batch statistics are not those of no training."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(network.init, jax.random.key(0), X)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(values) if path[-1].key == "var" else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, like)


def by_hand(variables, x, kept_first=1.0, kept_second=1.0):
    """The hidden layers and the outputs, in numpy."""
    params = jax.tree.map(np.asarray, variables["params"])
    stats = variables.get("batch_stats", variables.get("state"))["norm"]

    def dense(of, x):
        return x @ of["kernel"] + of["bias"]

    one = dense(params["dense"], np.asarray(x, np.float64)) - np.asarray(stats["mean"])
    one = one / np.sqrt(np.asarray(stats["var"]) + 1e-5) * params["norm"]["scale"]
    one = np.maximum(one + params["norm"]["bias"], 0)
    two = np.maximum(dense(params["block"]["dense"], one * kept_first), 0)
    return one, two, dense(params["out"], two * kept_second)


@each_framework
def test_activations_are_those_computed_by_hand(make):
    found = {}

    def look(site, x):
        found[site.name] = x
        return x

    network = make(look)
    variables = drawn_variables(network)
    outputs = network(variables, X, None)
    one, two, expected = by_hand(variables, X)
    np.testing.assert_allclose(found["drop"], one, atol=1e-5)
    np.testing.assert_allclose(found["block/drop"], two, atol=1e-5)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert (one == 0).any()
    assert (two > 0).any()


@each_framework
def test_a_deleted_unit_is_one_whose_outgoing_weights_are_0(make):
    def delete(site, x):
        return x.at[:, 1].set(0) if site.name == "block/drop" else x

    variables = drawn_variables(make(None))
    outputs = make(delete)(variables, X, None)
    out = variables["params"]["out"]
    cut = {**out, "kernel": out["kernel"].at[1].set(0)}
    cut_variables = {**variables, "params": {**variables["params"], "out": cut}}
    assert_same(outputs, make(None)(cut_variables, X, None))
    assert (outputs != make(None)(variables, X, None)).any()


@each_framework
def test_vmapped_members_apply_their_own_masks(make):
    members = [drawn_variables(make(None), seed) for seed in range(3)]
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    rng = np.random.default_rng(1)
    first, second = (jnp.asarray(rng.random((3, units)) < 0.5) for units in (5, 4))

    @jax.jit
    def predict(variables, first, second):
        def one(variables, first, second):
            masks = {"drop": first, "block/drop": second}

            def apply(site, x):
                return jdrop.apply_mask(masks[site.name][None], x, site.rate)

            return make(apply)(variables, X, None)

        return jax.vmap(one)(variables, first, second)

    outputs = predict(variables, first, second)
    for member, output in enumerate(outputs):
        # The scale of what is kept is 1/(1 - rate) = 2.
        kept = 2 * np.asarray(first[member]), 2 * np.asarray(second[member])
        np.testing.assert_allclose(output, by_hand(members[member], X, *kept)[-1], rtol=1e-4)


@each_layer
def test_sites_are_listed_without_computing(make, getkey):
    network = make(None)
    variables = jax.eval_shape(network.init, jax.random.key(0), X)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    sites = dropout_sites(network, variables, shapes)
    assert [(site.name, site.index, site.shape, site.rate) for site in sites] == [
        ("drop", 0, (6, 5), RATE),
        ("block/drop", 0, (6, 4), RATE),
    ]
    assert all(site.drops_units and not site.deterministic for site in sites)
    with pytest.raises(RuntimeError, match="only during the pass"):
        sites[0].make_key()


@each_layer
def test_a_replacement_that_returns_none_leaves_the_layer_unchanged(make, getkey):
    calls = []
    network = make(None)
    looked_at = network.replace_dropout(lambda site, x: calls.append(site.name))
    variables = drawn_variables(network)
    key = getkey()
    assert_same(looked_at(variables, X, jax.random.clone(key)), network(variables, X, key))
    assert_same(looked_at(variables, X, None), network(variables, X, None))
    assert calls == 2 * ["drop", "block/drop"]


@each_framework
def test_the_site_gives_the_key_of_the_layer(make, getkey):
    def drop(site, x):
        return jdrop.dropout(site.make_key(), x, site.rate)

    network, key = make(None), getkey()
    variables = drawn_variables(network)
    replaced = network.replace_dropout(drop)
    assert_same(replaced(variables, X, jax.random.clone(key)), network(variables, X, key))


@each_framework
def test_a_second_replacement_replaces_what_the_first_left(make):
    calls = []

    def only_first(site, x):
        return 3 * x if site.name == "drop" else None

    def double(site, x):
        calls.append(site.name)
        return 2 * x

    network = make(None)
    variables = drawn_variables(network)
    outputs = network.replace_dropout(only_first).replace_dropout(double)(variables, X, None)
    assert calls == ["block/drop"]
    np.testing.assert_allclose(outputs, by_hand(variables, X, 3, 2)[-1], rtol=1e-4)


FEWER_UNITS = {
    "Dense": (nn.Dense(5), (2, 3), (3, 2)),
    "DenseGeneral": (nn.DenseGeneral(5), (2, 3), (3, 2)),
    "DenseGeneral of two axes": (nn.DenseGeneral((2, 5)), (2, 3), (3, 2, 4)),
    "Conv": (nn.Conv(5, (1,)), (2, 4, 3), (1, 3, 2)),
    "ConvTranspose": (nn.ConvTranspose(5, (1,)), (2, 4, 3), (1, 3, 2)),
}


@pytest.mark.parametrize(("layer", "shape", "kernel_shape"), FEWER_UNITS.values(), ids=FEWER_UNITS)
def test_layers_of_a_replaced_network_accept_weights_of_fewer_units(layer, shape, kernel_shape):
    network = jdrop.linen.as_network(nn.Sequential([layer]))
    features = kernel_shape[-2:] if layer.features == (2, 5) else kernel_shape[-1:]
    bias = jnp.arange(math.prod(features)).reshape(features).astype(float)
    layer_params = {"kernel": jnp.ones(kernel_shape), "bias": bias}
    variables = {"params": {"layers_0": layer_params}}
    outputs = network.replace_dropout(identity)(variables, jnp.ones(shape), None)
    np.testing.assert_array_equal(outputs, jnp.broadcast_to(3 + bias, (*shape[:-1], *bias.shape)))
    with pytest.raises(flax.errors.ScopeParamShapeError):
        network(variables, jnp.ones(shape), None)


class LinenSubclass(jdrop.linen.Dropout):
    def __call__(self, x, **options):
        return super().__call__(x, **options)


class NnxSubclass(jdrop.nnx.Dropout):
    def __call__(self, x, **options):
        return super().__call__(x, **options)


@pytest.mark.parametrize(
    "network",
    [linen_network(LinenSubclass, None), nnx_network(NnxSubclass, None)],
    ids=["linen", "nnx"],
)
def test_a_subclass_that_calls_its_base_class_is_one_layer(network, getkey):
    sites = dropout_sites(network, drawn_variables(network), X)
    assert [(site.name, site.index) for site in sites] == [("drop", 0), ("block/drop", 0)]


def test_a_replaced_network_has_no_step_rule():
    network = dataclasses.replace(NETWORKS["linen, ours"](None), step_rule=StepRule)
    assert network.replace_dropout(identity).step_rule is None


@pytest.mark.parametrize(
    ("broadcast_dims", "drops_units"),
    [((), True), ((0,), True), ((-1,), False), ((1,), False), ((0, 1), False), ((-2,), True)],
)
def test_a_layer_that_shares_decisions_along_the_last_axis_drops_no_units(
    broadcast_dims, drops_units
):
    layer = jdrop.linen.Dropout(0.5, broadcast_dims, deterministic=False)
    (site,) = dropout_sites(jdrop.linen.as_network(nn.Sequential([layer])), {}, X)
    assert site.broadcast_dims == broadcast_dims
    assert site.drops_units == drops_units


def test_a_rate_that_the_pass_computes_is_listed_as_nan():
    class OneRatePerUnit(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jdrop.linen.Dropout(0.5, deterministic=False)(x, rate=jax.nn.sigmoid(x[:1]))

    (site,) = dropout_sites(jdrop.linen.as_network(OneRatePerUnit()), {}, X)
    assert np.isnan(site.rate)


# A layer called twice, a rate at the call, and streams of other names.


class LinenTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        drop = jdrop.linen.Dropout(0.1, deterministic=False)
        x = drop(drop(x), rate=0.3)
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return x + noise if self.has_rng("dropout") else x


class NnxTwice(nnx.Module):
    def __init__(self, rngs):
        self.drops = nnx.List([jdrop.nnx.Dropout(0.1, rngs=rngs)])
        self.noise = rngs["noise"].fork()

    def __call__(self, x):
        x = self.drops[0](self.drops[0](x), rate=0.3, rngs=jax.random.key(0))
        return x + jax.random.normal(self.noise(), x.shape)


@pytest.mark.parametrize(
    ("as_network", "name"),
    [
        (partial(jdrop.linen.as_network, LinenTwice()), "Dropout_0"),
        (partial(jdrop.nnx.as_network, NnxTwice), "drops/0"),
    ],
    ids=["linen", "nnx"],
)
def test_a_layer_called_twice_and_other_rng_streams_are_replaced_too(as_network, name, getkey):
    calls = []

    def look(site, x):
        calls.append((site.name, site.index, site.rate))
        return x

    network = as_network().replace_dropout(look)
    variables = network.init(getkey(), X)
    del calls[:]
    one, other = (network(variables, X, getkey()) for _ in range(2))
    assert calls == 2 * [(name, 0, 0.1), (name, 1, 0.3)]
    assert (one != X).all()
    assert (one != other).all()


# Modules whose layers are within a transformation: three times `scale(dense(x))`, or once.


class LinenStep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(RATE, deterministic=True)(nn.Dense(3)(x))


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda step, x, _: (step(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(LinenStep(name="step"), x, None)[0]


class LinenMapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        each = nn.vmap(LinenStep, variable_axes={"params": None}, split_rngs={"params": False})
        return each(name="step")(x)


class LinenDecorated(LinenStep):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(RATE, deterministic=True)(nn.Dense(3)(x))


class NnxStep(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.drop = nnx.Dropout(RATE, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.dense(x))


@nnx.jit
def jitted_step(step, x):
    return step(x)


@nnx.remat
def checkpointed_step(step, x):
    return step(x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scanned_step(step, x):
    return step(x)


class NnxLifted(nnx.Module):
    def __init__(self, call, rngs):
        self.call = call
        if call is scanned_step:
            self.step = nnx.vmap(NnxStep, in_axes=0, out_axes=0)(rngs.split(3))
        else:
            self.step = NnxStep(rngs)

    def __call__(self, x):
        return self.call(self.step, x)


# Their dropout layers are switched off, also in training.
switched_off = partial(jdrop.linen.as_network, has_dropout=False)

LIFTED = {
    # Made once: `nn.jit` keeps what it compiled with the class that it makes.
    "nn.jit": partial(switched_off, nn.jit(LinenStep)()),
    "nn.jit of the call": partial(switched_off, LinenDecorated()),
    "nn.remat": partial(switched_off, nn.remat(LinenStep)()),
    "nn.vmap": partial(switched_off, LinenMapped()),
    "nn.scan": partial(switched_off, LinenScanned()),
    "nnx.jit": partial(jdrop.nnx.as_network, partial(NnxLifted, jitted_step)),
    "nnx.remat": partial(jdrop.nnx.as_network, partial(NnxLifted, checkpointed_step)),
    "nnx.scan": partial(jdrop.nnx.as_network, partial(NnxLifted, scanned_step)),
}


@pytest.mark.parametrize("as_network", LIFTED.values(), ids=LIFTED)
def test_lifted_modules_call_the_replacement_anew_at_each_pass(as_network):
    variables = drawn_variables(as_network())
    kernel, bias = sorted(jax.tree.leaves(variables["params"]), key=jnp.ndim, reverse=True)
    kernel, bias = np.asarray(kernel).reshape(-1, 3, 3), np.asarray(bias).reshape(-1, 3)

    def outputs(variables, scale):
        # A hook that closes over a tracer.
        return as_network().replace_dropout(lambda site, x: scale * x)(variables, X, None)

    def expected(scale):
        x = np.asarray(X)
        for step in range(len(kernel)):
            x = scale * (x @ kernel[step] + bias[step])
        return x

    for scale in (1.0, 2.0):
        np.testing.assert_allclose(outputs(variables, scale), expected(scale), rtol=1e-4, atol=1e-5)
    jitted = jax.jit(outputs)(variables, 3.0)
    np.testing.assert_allclose(jitted, expected(3.0), rtol=1e-4, atol=1e-5)

    scale = [1.0]
    network = as_network().replace_dropout(lambda site, x: scale[0] * x)
    network(variables, X, None)
    scale[0] = 2.0
    np.testing.assert_allclose(network(variables, X, None), expected(2.0), rtol=1e-4, atol=1e-5)


# Attention has no site, and drops nothing.


class LinenAttention(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x, train):
        layer = self.layer(num_heads=1, dropout_rate=0.9)
        if self.layer is nn.SelfAttention:
            return layer(x, None, not train)  # As an argument by place.
        return layer(x, deterministic=not train)


class NnxAttention(nnx.Module):
    def __init__(self, layer, rngs):
        self.layer = layer(1, 3, dropout_rate=0.9, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


ATTENTION = {
    "linen, Flax's": partial(
        jdrop.linen.as_network, LinenAttention(nn.MultiHeadDotProductAttention)
    ),
    "linen, of one's own": partial(jdrop.linen.as_network, LinenAttention(nn.SelfAttention)),
    "linen, ours": partial(
        jdrop.linen.as_network, LinenAttention(jdrop.linen.MultiHeadDotProductAttention)
    ),
    "nnx, Flax's": partial(jdrop.nnx.as_network, partial(NnxAttention, nnx.MultiHeadAttention)),
    "nnx, ours": partial(jdrop.nnx.as_network, partial(NnxAttention, jdrop.nnx.MultiHeadAttention)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
@pytest.mark.parametrize("as_network", ATTENTION.values(), ids=ATTENTION)
def test_attention_of_a_replaced_network_drops_nothing(as_network, getkey):
    x = X[None]
    dropping, without = as_network(), as_network().replace_dropout(identity)
    variables = drawn_variables(dropping)
    expected = np.asarray(dropping(variables, x, None))
    in_training, _ = without.apply_train(variables, x, getkey())
    for outputs in (without(variables, x, None), without(variables, x, getkey()), in_training):
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
    # The network itself still drops: the replacement changed nothing in its layers.
    assert not np.allclose(dropping(variables, x, getkey()), expected, atol=1e-3)
    key = getkey()
    still_dropping = as_network().replace_dropout(identity, attention_dropout=True)
    with_key = still_dropping(variables, x, jax.random.clone(key))
    np.testing.assert_array_equal(with_key, dropping(variables, x, key))
