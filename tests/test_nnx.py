"""What is particular to nnx: its transformations, views of a model, and the adapter."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_reference import flax_drawing_our_bits

import jdrop
from jdrop.network import Network, dropout_sites, record_masks, replay_masks
from jdrop.nnx import Dropout, as_network

pytestmark = pytest.mark.grid

# Programs that drop in every way that nnx knows. Each takes the class of its dropout layers: so
# it is a project whose import can be changed.


class MLP(nnx.Module):
    def __init__(self, dropout: Callable[..., Any], rngs: nnx.Rngs):
        self.first, self.second = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.drop_first, self.drop_second = (dropout(0.5, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = self.drop_first(jnp.tanh(self.first(x)))
        return self.drop_second(jnp.tanh(self.second(x)))


class Shared(nnx.Module):
    """One layer, reached by two paths and called three times."""

    def __init__(self, dropout: Callable[..., Any], rngs: nnx.Rngs):
        self.drop = dropout(0.5, rngs=rngs)
        self.body = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), self.drop)

    def __call__(self, x):
        return self.drop(jnp.sin(self.drop(jnp.sin(self.body(x)))))


class Listed(nnx.Module):
    """Layers in a list, with streams of their own; the rngs are kept and used at the call."""

    def __init__(self, dropout: Callable[..., Any], rngs: nnx.Rngs):
        names = ("dropout", "noise", "params")
        self.drops = nnx.List([dropout(0.5, rngs=rngs, rng_collection=name) for name in names])
        self.without = dropout(0.5)
        self.rngs = rngs

    def __call__(self, x):
        for drop in self.drops:
            x = drop(x) + 1
        x = self.without(x, rngs=self.rngs) + 1
        x = self.without(x, rngs=self.rngs.noise) + 1
        return self.without(x, rngs=self.rngs.noise())


class Stacked(nnx.Module):
    """Three layers made by `vmap` and called by `scan`."""

    def __init__(self, dropout: Callable[..., Any], rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return MLP(dropout, rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x, layer):
            return layer(x) + x

        return step(x, self.layers)


class Remat(nnx.Module):
    def __init__(self, dropout: Callable[..., Any], rngs: nnx.Rngs):
        self.body = MLP(dropout, rngs)

    def __call__(self, x):
        return nnx.remat(lambda body, x: body(x))(self.body, x)


MODULES = {"mlp": MLP, "shared": Shared, "listed": Listed, "stacked": Stacked, "remat": Remat}


def twice(model: Any, x: Any) -> Any:
    """Two passes: the second draws anew."""
    return model(x), model(x)


def by_jit(model: Any, x: Any) -> Any:
    forward = nnx.jit(lambda model, x: model(x))
    return forward(model, x), forward(model, x)


def by_grad(model: Any, x: Any) -> Any:
    return nnx.value_and_grad(lambda model, x: (model(x) ** 2).sum(), argnums=1)(model, x)


def by_split_and_merge(model: Any, x: Any) -> Any:
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, x: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        return merged(x), nnx.state(merged)

    y, state = forward(state, x)
    return y, forward(state, x)[0]


def by_vmap(model: Any, x: Any) -> Any:
    """A mask of its own for each example."""

    @nnx.split_rngs(splits=6)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), 0))
    def forward(model, x):
        return model(x)

    return forward(model, x)


def by_modes(model: Any, x: Any) -> Any:
    model.eval()
    outputs = [model(x)]
    model.train()
    outputs += [model(x), nnx.view(model, deterministic=True)(x), model(x)]
    view = nnx.view(nnx.view(model, deterministic=True), deterministic=False)
    model.set_attributes(deterministic=True)
    return [*outputs, view(x), model(x)]


def by_reseed(model: Any, x: Any) -> Any:
    model(x)
    nnx.reseed(model, policy="match_shape", dropout=5, noise=6)
    return model(x)


PROGRAMS = [twice, by_jit, by_grad, by_split_and_merge, by_vmap, by_modes, by_reseed]


@pytest.mark.parametrize(
    ("name", "program"),
    # Stacked layers compile slowly, and streams that are split among them cannot be split again.
    [
        *itertools.product(sorted(MODULES.keys() - {"stacked"}), PROGRAMS),
        ("stacked", by_grad),
        ("stacked", by_reseed),
    ],
)
def test_equals_flax_with_the_same_bits(name, program, getkey):
    """Outputs and the state of the model: so checkpoints fit, and seeds lead to the same masks."""
    x = jax.random.normal(getkey(), (6, 4))

    def run(dropout: type[nnx.Module]) -> Any:
        model = MODULES[name](dropout, nnx.Rngs(0, noise=1))
        outputs = program(model, x)
        state = nnx.to_pure_dict(nnx.state(model))
        return outputs, jax.tree.map(
            lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state
        )

    with flax_drawing_our_bits():
        expected = run(nnx.Dropout)
    actual = run(Dropout)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def make_module(name: str) -> Callable[..., nnx.Module]:
    return partial(MODULES[name], Dropout)


@pytest.mark.parametrize("name", ["mlp", "shared", "listed"])
def test_recorded_masks_replay_the_pass(name, getkey):
    network, x = as_network(make_module(name)), jax.random.normal(getkey(), (6, 4))
    variables, key = network.init(getkey(), x), getkey()
    y, masks = record_masks(jax.random.clone(key), network, variables, x)
    assert jnp.array_equal(y, network(variables, x, key))
    assert len(jax.tree.leaves(masks)) > 1

    def run(network: Network) -> jax.Array:
        return network(variables, x, None)

    replayed = replay_masks(network, masks)
    assert jnp.array_equal(run(replayed), y)
    jitted = jax.jit(run, static_argnums=0)(replayed)
    np.testing.assert_allclose(jitted, y, rtol=1e-6, atol=1e-6)
    flipped = replay_masks(network, jax.tree.map(jnp.logical_not, masks))
    assert not jnp.array_equal(run(flipped), y)


def test_layers_of_a_list_are_named_by_their_index(getkey):
    network, x = as_network(make_module("listed")), jnp.ones((6, 4))
    sites = dropout_sites(network, network.init(getkey(), x), x)
    assert [(site.name, site.index) for site in sites] == [
        *((f"drops/{index}", 0) for index in range(3)),
        *(("without", call) for call in range(3)),
    ]


@pytest.mark.parametrize("name", ["stacked", "remat"])
def test_masks_inside_a_transformation_cannot_be_recorded(name, getkey):
    network, x = as_network(make_module(name)), jax.random.normal(getkey(), (6, 4))
    variables = network.init(getkey(), x)
    with pytest.raises(ValueError, match="cannot be recorded, because the layer is inside a trans"):
        record_masks(getkey(), network, variables, x)


def test_the_iterations_of_a_loop_share_the_masks_that_are_replayed(getkey):
    network, x = as_network(make_module("stacked")), jax.random.normal(getkey(), (6, 4))
    variables = network.init(getkey(), x)
    masks = jax.random.bernoulli(getkey(), 0.5, (2, 6, 4))
    replayed = replay_masks(
        network, {"layers/drop_first": (masks[0],), "layers/drop_second": (masks[1],)}
    )
    expected = x
    for step in range(3):
        layers = jax.tree.map(lambda leaf: leaf[step], variables["params"]["layers"])  # noqa: B023
        hidden = expected
        for linear, mask in zip((layers["first"], layers["second"]), masks, strict=True):
            hidden = jnp.tanh(hidden @ linear["kernel"] + linear["bias"][None])
            hidden = jdrop.apply_mask(mask, hidden, 0.5)
        expected = hidden + expected
    np.testing.assert_allclose(replayed(variables, x, None), expected, rtol=1e-5, atol=1e-5)


def test_rngs_of_another_type_raise(getkey):
    with pytest.raises(TypeError, match="rngs"):
        Dropout(0.5, rngs=getkey())
    with pytest.raises(TypeError, match="rngs"):
        Dropout(0.5)(jnp.ones(3), rngs=0)


def test_another_rate_at_the_call_is_no_other_trace():
    traces = []

    @nnx.jit
    def forward(layer: Dropout, x: jax.Array, rate: jax.Array) -> jax.Array:
        traces.append(rate)
        return layer(x, rate=rate)

    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    kept = [int((forward(layer, jnp.ones(1000), rate) != 0).sum()) for rate in (0.0, 0.5, 1.0)]
    assert kept[0] == 1000 > kept[1] > kept[2] == 0
    assert len(traces) == 1


# The adapter.


class Normalised(nnx.Module):
    """Batch and spectral normalisation beside dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.spectral = nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.drop = Dropout(0.5, rngs=rngs)
        self.readout = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.drop(self.norm(self.spectral(x))))


def test_the_key_sets_the_mode_of_dropout_and_training_that_of_batch_statistics(getkey):
    network, x = as_network(Normalised), 3 + jax.random.normal(getkey(), (16, 4))
    variables = network.init(getkey(), x)
    assert set(variables) == {"params", "state"}
    key = getkey()
    outputs, updated = network.apply_train(variables, x, jax.random.clone(key))
    assert jax.tree.structure(updated) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updated["params"], variables["params"]))
    moved = jax.tree.map(jnp.array_equal, updated["state"], variables["state"])
    assert not any(jax.tree.leaves(moved))
    assert not jnp.array_equal(network(updated, x, None), network(variables, x, None))
    # A sample uses the running averages: an example does not see the others.
    others = x.at[1:].add(5.0)
    one, two = (network(variables, inputs, jax.random.clone(key)) for inputs in (x, others))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4, atol=1e-5)
    trained, _ = network.apply_train(variables, others, key)
    assert not np.allclose(outputs[0], trained[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODULES)
def test_networks_of_every_kind_of_module(name, getkey):
    """Deterministic without a key; with one, a pure function of it; mapped, each key alone."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return MODULES[name](Dropout, rngs)

    network, x = as_network(make), jax.random.normal(getkey(), (6, 4))
    variables, key = network.init(getkey(), x), getkey()
    y = network(variables, x, jax.random.clone(key))
    assert jnp.array_equal(y, network(variables, x, jax.random.clone(key)))
    assert not jnp.array_equal(y, network(variables, x, getkey()))
    assert jnp.array_equal(network(variables, x, None), network(variables, x, None))

    model = make(nnx.Rngs(0))
    nnx.update(model, nnx.State(variables["params"]))
    model.eval()
    np.testing.assert_allclose(network(variables, x, None), model(x), rtol=1e-6)

    keys = jax.random.split(key, 3)
    member = jax.jit(jax.vmap(lambda key: network(network.init(jax.random.clone(key), x), x, key)))
    outputs = np.asarray(member(keys))
    assert outputs.shape == (3, 6, 4)
    assert len(np.unique(outputs.reshape(3, -1), axis=0)) == 3


def test_layers_with_one_default_stream_draw_different_masks(getkey):
    class Drops(nnx.Module):
        def __init__(self, rngs):
            self.drops = nnx.List([Dropout(0.5, rngs=rngs) for _ in range(3)])
            make = nnx.vmap(lambda rngs: Dropout(0.5, rngs=rngs))
            self.stacked = nnx.split_rngs(splits=2)(make)(rngs)

        def __call__(self, x):
            apart = jnp.stack([drop(x) for drop in self.drops])
            stacked = nnx.vmap(lambda drop, x: drop(x), in_axes=(0, None))(self.stacked, x)
            return jnp.concatenate([apart, stacked])

    y = as_network(Drops)({"params": {}, "state": {}}, jnp.ones(256), getkey())
    assert len(np.unique(np.asarray(y), axis=0)) == 5


def test_a_module_without_dropout(getkey):
    network = as_network(lambda rngs: nnx.Linear(4, 2, rngs=rngs), has_dropout=False)
    x = jax.random.normal(getkey(), (5, 4))
    variables = network.init(getkey(), x)
    assert jnp.array_equal(network(variables, x, None), network(variables, x, getkey()))


def test_attention_beside_dropout(getkey):
    """Flax's own layers with a mode follow the key as well."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.5, rngs=rngs)

        def __call__(self, x):
            return self.attention(x)

    network, x = as_network(Block), jax.random.normal(getkey(), (3, 5, 4))
    variables = network.init(getkey(), x)
    assert not jnp.array_equal(network(variables, x, getkey()), network(variables, x, getkey()))
    assert jnp.array_equal(network(variables, x, None), network(variables, x, None))
