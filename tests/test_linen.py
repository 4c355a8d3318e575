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

import jdrop
from jdrop.linen import Dropout, as_network
from jdrop.network import Network, dropout_sites, record_masks, replay_masks

pytestmark = pytest.mark.grid

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
    "variable_axes": {"params": 0},
    "split_rngs": {"params": True, "dropout": True},
}
SAME_IN_EACH_STEP: dict[str, Any] = {
    "variable_axes": {"params": 0},
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


LIFTED = [name for name in MODULES if name.startswith(("jit", "remat", "vmap", "scan"))]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in LIFTED])
def test_recorded_masks_replay_the_pass(name, getkey):
    network, x = as_network(MODULES[name](Dropout)), jax.random.normal(getkey(), (6, 4))
    variables, key = network.init(getkey(), x), getkey()
    y, masks = record_masks(jax.random.clone(key), network, variables, x)
    assert jnp.array_equal(y, network(variables, x, key))
    assert len(jax.tree.leaves(masks)) > 1

    # A module that makes keys itself needs a stream; that nothing of it is used, the result shows.
    needs_key = name == "keys at the call"

    def run(network: Network) -> jax.Array:
        return network(variables, x, jax.random.key(0) if needs_key else None)

    replayed = replay_masks(network, masks)
    assert jnp.array_equal(run(replayed), y)
    jitted = jax.jit(run, static_argnums=0)(replayed)
    np.testing.assert_allclose(jitted, y, rtol=1e-6, atol=1e-6)
    flipped = replay_masks(network, jax.tree.map(jnp.logical_not, masks))
    assert not jnp.array_equal(run(flipped), y)


@pytest.mark.parametrize("name", LIFTED)
def test_masks_inside_a_transformation_cannot_be_recorded(name, getkey):
    network, x = as_network(MODULES[name](Dropout)), jax.random.normal(getkey(), (6, 4))
    variables = network.init(getkey(), x)
    with pytest.raises(ValueError, match="cannot be recorded, because the layer is inside a trans"):
        record_masks(getkey(), network, variables, x)


@pytest.mark.parametrize("name", LIFTED)
def test_masks_are_replayed_inside_a_transformation(name, getkey):
    """The same in every iteration: dropping everything leaves what does not go through dropout."""
    network, x = as_network(MODULES[name](Dropout)), jax.random.normal(getkey(), (6, 4))
    variables = network.init(getkey(), x)
    layers = {site.name for site in dropout_sites(network, variables, x)}
    y = replay_masks(network, dict.fromkeys(layers, (jnp.array(False),)))(variables, x, None)
    assert jnp.array_equal(y, x if name.startswith("scan") else jnp.zeros_like(x))


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

    network, x = as_network(Net(), has_dropout=False), jnp.ones((3, 4))
    variables = network.init(getkey(), x)
    seen.clear()
    network(variables, x, getkey())
    network(variables, x, None)
    assert seen == [False, True]


def test_a_module_without_modes(getkey):
    network = as_network(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]), has_dropout=False)
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


def test_the_layer_is_the_function_of_the_key_that_flax_makes(getkey):
    x = jnp.ones((3, 4))

    class Site(nn.Module):
        @nn.compact
        def __call__(self):
            return jax.random.key_data(self.make_rng("dropout"))

    key = getkey()
    data = Site().apply({}, rngs={"dropout": jax.random.clone(key)})
    y = Dropout(0.3).apply({}, x, False, rngs={"dropout": key})
    expected = jdrop.keep_mask(jax.random.wrap_key_data(data), x.shape, 0.3)
    assert jnp.array_equal(y != 0, expected)


def test_a_collection_named_masks_is_state_like_any_other(getkey):
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            calls = self.variable("masks", "calls", jnp.zeros, ())
            if train:
                calls.value += 1
            return Dropout(0.5, deterministic=not train)(x)

    network, x = as_network(Counting()), jnp.ones((3, 4))
    variables = network.init(getkey(), x)
    outputs, updated = network.apply_train(variables, x, getkey())
    assert updated["masks"]["calls"] == 1
    assert (outputs == 0).any()


class JittedPart(nn.Module):
    """A part that `nn.jit` compiles, with a state beside."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counts", "calls", jnp.zeros, ())
        calls.value += 1
        return Dropout(0.5, deterministic=False)(x)


def test_a_compiled_module_among_the_attributes_is_compiled_again_for_each_replacement(getkey):
    module = nn.Sequential([nn.jit(JittedPart)()])
    network, x = as_network(module, has_dropout=False), jnp.ones((3, 4))
    variables = network.init(getkey(), x)
    assert (network.apply_train(variables, x, getkey())[0] != 1).all()
    for value in (3.0, 5.0):
        replaced = network.replace_dropout(lambda site, inputs, v=value: jnp.full_like(inputs, v))
        outputs, updated = replaced.apply_train(variables, x, getkey())
        assert (outputs == value).all()
        before, after = (v["counts"]["layers_0"]["calls"] for v in (variables, updated))
        assert after == before + 1
