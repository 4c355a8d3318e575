"""What is particular to linen: its transformations, its collections, and the adapter."""

from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_reference import flax_drawing_our_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdrop
from jdrop.linen import Dropout, as_network

# Modules that drop in every way that linen knows. Each takes the class of its dropout layers, and
# lays no more store by it than by its name: so it is a project whose import can be changed.


class Compact(nn.Module):
    dropout: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(4)(x)))
        return x


class Shared(nn.Module):
    """One layer, made in `setup`, called twice."""

    dropout: type[nn.Module]

    def setup(self):
        self.drop = self.dropout(0.5)
        self.dense = nn.Dense(4)

    def __call__(self, x):
        x = self.drop(self.dense(x), deterministic=False)
        return self.drop(jnp.sin(x), deterministic=False)


class Nested(nn.Module):
    """A layer handed to a submodule, and called there and here."""

    dropout: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        drop = self.dropout(0.5, deterministic=False)
        return drop(nn.Sequential([nn.Dense(4), drop, nn.Dense(4), drop])(x))


class Collections(nn.Module):
    """One layer with a stream of its own, one with the stream of the parameters."""

    dropout: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = self.dropout(0.5, deterministic=False, rng_collection="noise")(x)
        return self.dropout(0.5, deterministic=False, rng_collection="params")(nn.Dense(4)(x))


class Given(nn.Module):
    """Keys made by the module, the second given twice on purpose."""

    dropout: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        drop = self.dropout(0.5, deterministic=False)
        one, two = self.make_rng("dropout"), self.make_rng("dropout")
        x = drop(nn.Dense(4)(x), rng=one)
        return drop(x, rng=jax.random.clone(two)) + drop(jnp.sin(x), rng=two)


class Step(nn.Module):
    dropout: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return Compact(self.dropout)(x) + x, None


def lifted(transform: Callable[..., Any], module: type[nn.Module], *args: Any, **options: Any):
    class Lifted(nn.Module):
        dropout: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            y = transform(module, **options)(self.dropout)(x, *args)
            return y[0] if isinstance(y, tuple) else y

    return Lifted


PER_STEP: dict[str, Any] = {
    "variable_axes": {"params": 0, "masks": 0},
    "split_rngs": {"params": True, "dropout": True},
}
SAME_IN_EACH_STEP: dict[str, Any] = {
    "variable_axes": {"params": 0, "masks": 0},
    "split_rngs": {"params": True, "dropout": False},
}

MODULES: dict[str, Any] = {
    "compact": Compact,
    "shared": Shared,
    "nested": Nested,
    "collections": Collections,
    "keys at the call": Given,
    "jit": lifted(nn.jit, Compact),
    "jit, shared": lifted(nn.jit, Shared),
    "remat": lifted(nn.remat, Compact),
    "remat, shared": lifted(nn.remat, Shared),
    "vmap": lifted(nn.vmap, Compact, in_axes=0, axis_size=6, **PER_STEP),
    "vmap, shared": lifted(nn.vmap, Shared, in_axes=0, axis_size=6, **PER_STEP),
    "vmap, one mask": lifted(nn.vmap, Compact, in_axes=0, axis_size=6, **SAME_IN_EACH_STEP),
    "scan": lifted(nn.scan, Step, None, length=3, **PER_STEP),
    "scan, one mask": lifted(nn.scan, Step, None, length=3, **SAME_IN_EACH_STEP),
    "scan of remat": lifted(
        lambda module, **options: nn.scan(nn.remat(module, prevent_cse=False), **options),
        Step, None, length=3, **PER_STEP,
    ),
}  # fmt: skip


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Any:
    return MODULES[request.param]


def rngs(key: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(("params", "dropout", "noise"), jax.random.split(key, 3), strict=True))


def test_equals_flax_with_the_same_bits(module, getkey):
    """Variables, outputs and gradients: so checkpoints fit, and seeds lead to the same masks."""
    init_rngs, apply_rngs = rngs(getkey()), rngs(getkey())
    x = jax.random.normal(getkey(), (6, 4))

    def run(dropout: type[nn.Module]) -> Any:
        model = module(dropout)
        variables = model.init(jax.tree.map(jax.random.clone, init_rngs), x)

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            streams = jax.tree.map(jax.random.clone, apply_rngs)
            y = model.apply({"params": params}, x, rngs=streams)
            return (y**2).sum(), y

        return variables, jax.value_and_grad(loss, has_aux=True)(variables["params"])

    with flax_drawing_our_bits():
        expected = run(nn.Dropout)
    actual = run(Dropout)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_recorded_masks_replay_the_pass(module, getkey):
    """Eagerly and under `jit`, without any rng."""
    model, x = module(Dropout), jax.random.normal(getkey(), (6, 4))
    variables = model.init(rngs(getkey()), x)
    assert set(variables) == {"params"}
    streams = rngs(getkey())
    plain = model.apply(variables, x, rngs=jax.tree.map(jax.random.clone, streams))
    y, drawn = model.apply(variables, x, rngs=streams, mutable=["masks"])
    # Recording changes nothing.
    assert jnp.array_equal(y, plain)
    assert len(jax.tree.leaves(drawn)) > 1

    # A module that makes keys itself needs a stream; that nothing of it is used, the result shows.
    other = rngs(getkey()) if module is Given else None

    def replay(masks: Any) -> jax.Array:
        return model.apply(variables | masks, x, rngs=other)

    assert jnp.array_equal(replay(drawn), y)
    np.testing.assert_allclose(jax.jit(replay)(drawn), y, rtol=1e-6, atol=1e-6)
    # Given and mutable: they are used and come back as they were.
    again, same = model.apply(variables | drawn, x, rngs=other, mutable=["masks"])
    assert jnp.array_equal(again, y)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, drawn))
    assert not jnp.array_equal(replay(jax.tree.map(jnp.logical_not, drawn)), y)


def test_the_calls_of_a_layer_are_recorded_in_their_order(getkey):
    x = jnp.ones((2, 5))
    layer = Dropout(0.5, deterministic=False)

    def call_thrice(layer: nn.Module) -> jax.Array:
        return jnp.stack([layer(x), layer(2 * x), layer(3 * x)])

    y, drawn = nn.apply(call_thrice, layer, mutable=["masks"])({}, rngs={"dropout": getkey()})
    assert jnp.array_equal(jnp.stack(drawn["masks"]["mask"]), y != 0)
    assert jnp.array_equal(nn.apply(call_thrice, layer)(drawn), y)
    # Three masks in a tuple serve the passes after the first as well.
    bound = layer.bind(drawn)
    for _ in range(2):
        assert jnp.array_equal(call_thrice(bound), y)


def test_the_steps_of_a_scan_have_masks_of_their_own(getkey):
    model, x = MODULES["scan"](Dropout), jnp.ones((6, 4))
    variables = model.init(rngs(getkey()), x)
    _, drawn = model.apply(variables, x, rngs=rngs(getkey()), mutable=["masks"])
    masks = jax.tree.leaves(drawn)
    assert [mask.shape for mask in masks] == [(3, 6, 4)] * 2
    distinct = {mask[step].tobytes() for mask in map(np.asarray, masks) for step in range(3)}
    assert len(distinct) == 6


def test_without_masks_and_without_rngs_the_error_is_that_of_flax(getkey):
    model, x = Compact(Dropout), jnp.ones((6, 4))
    variables = model.init(rngs(getkey()), x)
    _, drawn = model.apply(variables, x, rngs=rngs(getkey()), mutable=["masks"])
    misplaced = {"masks": {"Dropout_7": drawn["masks"]["Dropout_0"]}}
    for given in ({}, misplaced, {"masks": {"Dropout_0": drawn["masks"]["Dropout_0"]}}):
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            model.apply(variables | given, x)


def test_nothing_is_recorded_during_init_even_if_it_draws(getkey):
    layer, x = Dropout(0.5, deterministic=False), jnp.ones((6, 4))
    y, variables = layer.init_with_output({"dropout": getkey()}, x)
    assert variables == {}
    assert (y == 0).any()


def test_no_mask_is_recorded_where_none_is_drawn(getkey):
    for layer in (Dropout(0.5, deterministic=True), Dropout(0.0, deterministic=False)):
        _, drawn = layer.apply({}, jnp.ones(4), rngs={"dropout": getkey()}, mutable=["masks"])
        assert drawn == {}


def test_recording_inside_jit(getkey):
    model, x, key = Shared(Dropout), jnp.ones((6, 4)), getkey()
    variables = model.init(rngs(getkey()), x)

    @jax.jit
    def record(key: jax.Array) -> Any:
        return model.apply(variables, x, rngs={"dropout": key}, mutable=["masks"])

    y, drawn = record(key)
    np.testing.assert_allclose(model.apply(variables | drawn, x), y, rtol=1e-6)


def test_the_mask_of_sharded_inputs_is_sharded_as_they_are(getkey):
    """Not replicated, though the output would be the same; and whole where it is shared."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("batch", None))
        x = jax.device_put(jnp.ones((8, 6)), sharding)
        for broadcast_dims, spec in (((), ("batch", None)), ((1,), ("batch", None)), ((0,), ())):
            layer = Dropout(0.5, broadcast_dims, deterministic=False)
            _, drawn = layer.apply({}, x, rngs={"dropout": getkey()}, mutable=["masks"])
            (mask,) = drawn["masks"]["mask"]
            assert mask.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)


# The adapter.


class Flagged(nn.Module):
    """Subclasses have a mode flag, or none."""

    @nn.compact
    def run(self, x, training):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.5)(x)
        return nn.Dense(2)(Dropout(0.5, deterministic=not training)(x))


class Train(Flagged):
    def __call__(self, x, train):
        return self.run(x, train)


class Training(Flagged):
    def __call__(self, x, *, training=False):
        return self.run(x, training)


class IsTraining(Flagged):
    def __call__(self, x, is_training: bool = True):
        return self.run(x, is_training)


class Deterministic(Flagged):
    def __call__(self, x, deterministic):
        return self.run(x, not deterministic)


class Nesting(nn.Module):
    """Batch normalisation under lifted transformations, traced for each mode anew."""

    transform: Callable[..., Any]

    @nn.compact
    def __call__(self, x, train):
        return self.transform(Train, static_argnums=(2,))()(x, train)


class Positional(nn.Module):
    """Batch normalisation with its flag as second argument."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(momentum=0.5)(nn.Dense(4)(x), not train)
        return nn.Dense(2)(Dropout(0.5)(x, not train))


class Named(nn.Module):
    """Batch normalisation with arguments by name, spectral normalisation, own streams."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        x = nn.BatchNorm(momentum=0.5)(x=x, use_running_average=not train)
        x = Dropout(0.5, rng_collection="noise")(x, not train)
        return nn.Dense(2)(Dropout(0.5, rng_collection="more noise")(x, not train))


NETWORKS = [
    Train(),
    Training(),
    IsTraining(),
    Deterministic(),
    Nesting(nn.jit),
    Nesting(nn.remat),
    Positional(),
    Named(),
]


@pytest.mark.parametrize("module", NETWORKS, ids=lambda module: type(module).__name__)
def test_the_key_sets_the_mode_of_dropout_and_training_that_of_batch_statistics(module, getkey):
    network, x = as_network(module), 3 + jax.random.normal(getkey(), (16, 4))
    variables = network.init(getkey(), x)
    assert set(variables) == {"params", "batch_stats"}

    # Training, before and after anything else: whatever is traced once must not serve two modes.
    key, sample_key = getkey(), getkey()
    _, updated = network.apply_train(variables, x, jax.random.clone(key))
    deterministic = network(variables, x, None)
    sampled = network(variables, x, jax.random.clone(sample_key))
    _, again = network.apply_train(variables, x, key)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updated, again))

    assert jnp.array_equal(network(variables, x, None), deterministic)
    assert jnp.array_equal(network(variables, x, jax.random.clone(sample_key)), sampled)
    assert not jnp.array_equal(sampled, network(variables, x, getkey()))
    # In training the statistics move, and the parameters stay.
    assert updated["params"] is variables["params"]
    moved = jax.tree.map(jnp.array_equal, updated["batch_stats"], variables["batch_stats"])
    assert not any(jax.tree.leaves(moved))
    assert not jnp.array_equal(network(updated, x, None), deterministic)


@pytest.mark.parametrize("module", NETWORKS, ids=lambda module: type(module).__name__)
def test_samples_use_running_averages(module, getkey):
    """So an example of a batch does not see the others; in training it does."""
    network, x = as_network(module), 3 + jax.random.normal(getkey(), (16, 4))
    variables = network.init(getkey(), x)
    others, key = x.at[1:].add(5.0), getkey()
    one, two = (network(variables, inputs, jax.random.clone(key)) for inputs in (x, others))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4, atol=1e-5)
    one, two = (
        network.apply_train(variables, inputs, jax.random.clone(key))[0] for inputs in (x, others)
    )
    assert not np.allclose(one[0], two[0], rtol=1e-2, atol=1e-2)


def test_sampling_leaves_the_flag_of_batch_normalisation_as_it_was(getkey):
    seen = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train)
            y = norm(x)
            seen.append(norm.use_running_average)
            return y

    network, x = as_network(Net()), jnp.ones((3, 4))
    variables = network.init(getkey(), x)
    network(variables, x, getkey())
    network(variables, x, None)
    assert seen == [True, False, True]


def test_a_module_without_modes(getkey):
    network = as_network(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]))
    x = jax.random.normal(getkey(), (5, 4))
    variables = network.init(getkey(), x)
    assert jnp.array_equal(network(variables, x, None), network(variables, x, getkey()))
    outputs, updated = network.apply_train(variables, x, getkey())
    assert jnp.array_equal(outputs, network(variables, x, None))
    assert jax.tree.structure(updated) == jax.tree.structure(variables)


def test_a_module_that_always_drops_needs_a_key(getkey):
    network = as_network(Compact(Dropout))
    variables = network.init(getkey(), jnp.ones((2, 4)))
    assert (network(variables, jnp.ones((2, 4)), getkey()) == 0).any()
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        network(variables, jnp.ones((2, 4)), None)


def test_streams_with_names_of_their_own_draw_different_masks(getkey):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            names = ("dropout", "noise", "more noise")
            layers = [Dropout(0.5, rng_collection=name, name=f"at_{name[:2]}") for name in names]
            return jnp.stack([layer(x, not train) for layer in layers])

    y = as_network(Net())({}, jnp.ones(256), getkey())
    assert len(np.unique(np.asarray(y), axis=0)) == 3


def test_members_are_initialised_and_sampled_under_vmap(getkey):
    network, x = as_network(Train()), jax.random.normal(getkey(), (5, 4))

    @jax.jit
    @jax.vmap
    def member(key: jax.Array) -> Any:
        init_key, train_key, sample_key = jax.random.split(key, 3)
        variables = network.init(init_key, x)
        _, variables = network.apply_train(variables, x, train_key)
        return variables, network(variables, x, sample_key), network(variables, x, None)

    variables, sampled, deterministic = member(jax.random.split(getkey(), 3))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(variables)} == {3}
    for outputs in (sampled, deterministic):
        assert len(np.unique(np.asarray(outputs).reshape(3, -1), axis=0)) == 3


def test_the_layer_is_the_function_in_a_network_too(getkey):
    """The mask that a site records is `keep_mask` of the key that Flax makes for it."""
    x = jnp.ones((3, 4))

    class Site(nn.Module):
        @nn.compact
        def __call__(self):
            return jax.random.key_data(self.make_rng("dropout"))

    key = getkey()
    data = Site().apply({}, rngs={"dropout": jax.random.clone(key)})
    _, drawn = Dropout(0.3).apply({}, x, False, rngs={"dropout": key}, mutable=["masks"])
    expected = jdrop.keep_mask(jax.random.wrap_key_data(data), x.shape, 0.3)
    assert jnp.array_equal(drawn["masks"]["mask"][0], expected)
