"""Stochastic depth in Flax: the layers, and networks made of them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop import ensemble, thinned
from jdrop.inference import enumerate_masks
from jdrop.network import dropout_sites, predict, record_masks, replay_masks

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)


def branch(x):
    return 3 * x + 1


def call_linen(inputs, key, rate=0.5, at_call=(), **options):
    options = {"deterministic": False, **options}
    return jdrop.linen.DropPath(rate, **options).apply({}, inputs, rng=key, **dict(at_call))


def call_nnx(inputs, key, rate=0.5, at_call=(), **options):
    return jdrop.nnx.DropPath(rate, **options)(inputs, rngs=key, **dict(at_call))


@pytest.fixture(params=[call_linen, call_nnx], ids=["linen", "nnx"])
def layer(request):
    return request.param


@pytest.mark.parametrize("per_sample", [True, False])
def test_given_a_key_the_layer_is_the_function(layer, per_sample, getkey):
    key = getkey()
    expected = jdrop.drop_path(jax.random.clone(key), X, 0.3, per_sample=per_sample)
    np.testing.assert_array_equal(layer(X, key, 0.3, per_sample=per_sample), expected)


def test_given_a_branch_the_layer_computes_the_kept_samples(layer, getkey):
    key, sizes = getkey(), []

    def counting(x):
        sizes.append(len(x))
        return branch(x)

    expected = jdrop.drop_branch(jax.random.clone(key), branch, X, 0.25)
    actual = layer(X, key, 0.25, at_call={"branch": counting})
    np.testing.assert_array_equal(actual, expected)
    assert sizes == [6]


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"deterministic": True}], ids=str)
def test_switched_off_it_returns_the_inputs_or_their_branch(layer, options):
    assert layer(X, None, **options) is X
    np.testing.assert_array_equal(layer(X, None, at_call={"branch": branch}, **options), branch(X))


def test_at_rate_1_the_output_is_zeros(layer):
    assert not layer(X, None, 1).any()
    assert not layer(X, None, 1, at_call={"branch": branch}).any()


def test_a_traced_rate_at_the_call_takes_precedence(layer, getkey):
    key = getkey()
    expected = jdrop.drop_path(jax.random.clone(key), X, jnp.float32(0.7))
    actual = jax.jit(lambda rate: layer(X, key, 0.1, at_call={"rate": rate}))(0.7)
    np.testing.assert_array_equal(actual, expected)


def test_wrong_arguments_raise(layer, getkey):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        layer(X, getkey(), 1.5)
    with pytest.raises(ValueError, match="branch needs per_sample=True"):
        layer(X, getkey(), per_sample=False, at_call={"branch": branch})
    with pytest.raises(TypeError, match="rate must be a Python scalar"):
        layer(X, getkey(), at_call={"branch": branch, "rate": jnp.array(0.5)})


def test_the_mode_of_an_nnx_layer_is_set_with_the_model():
    model = nnx.List([jdrop.nnx.DropPath(0.5, rngs=nnx.Rngs(0))])
    assert (model[0](X) != X).any()
    model.eval()
    assert model[0](X) is X
    assert (nnx.view(model, deterministic=False)[0](X) != X).any()


# Networks with residual blocks. `skips`: the branches of dropped samples are not computed.


class LinenNet(nn.Module):
    skips: bool
    per_sample: bool = True
    hidden_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        for rate in jdrop.depth_linear_rates(0.5, 3):
            drop = jdrop.linen.DropPath(rate, per_sample=self.per_sample, deterministic=not train)
            hidden = jdrop.linen.Dropout(self.hidden_rate, deterministic=not train)
            block = nn.Sequential([nn.Dense(16), nn.relu, hidden, nn.Dense(4)])
            x = x + (drop(x, branch=block) if self.skips else drop(block(x)))
        return nn.Dense(3)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, *, skips, per_sample=True, hidden_rate=0.0):
        self.skips = skips
        self.blocks, self.drops = nnx.List(), nnx.List()
        for rate in jdrop.depth_linear_rates(0.5, 3):
            hidden = jdrop.nnx.Dropout(hidden_rate, rngs=rngs)
            linear = [nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)]
            self.blocks.append(nnx.Sequential(linear[0], nnx.relu, hidden, linear[1]))
            self.drops.append(jdrop.nnx.DropPath(rate, per_sample=per_sample, rngs=rngs))
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x = x + (drop(x, branch=block) if self.skips else drop(block(x)))
        return self.out(x)


def linen_network(**options):
    return jdrop.linen.as_network(LinenNet(**options))


def nnx_network(**options):
    return jdrop.nnx.as_network(lambda rngs: NnxNet(rngs, **options))


NAMES = {linen_network: "DropPath_{}", nnx_network: "drops/{}"}
each_framework = pytest.mark.parametrize("make", NAMES, ids=["linen", "nnx"])
with_and_without_branch = pytest.mark.parametrize("skips", [True, False])


@pytest.fixture
def variables_of(getkey):
    return lambda network: network.init(getkey(), X)


@each_framework
@with_and_without_branch
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_network_lists_its_paths_as_dropout_sites(make, skips, per_sample, variables_of):
    if skips and not per_sample:
        pytest.skip("a layer cannot leave out a whole batch")
    network = make(skips=skips, per_sample=per_sample)
    sites = dropout_sites(network, variables_of(network), X)
    paths = [site for site in sites if site.rate or not site.drops_units]
    assert [site.name for site in paths] == [NAMES[make].format(index) for index in range(3)]
    assert [site.rate for site in paths] == [0.0, 0.25, 0.5]
    assert {site.broadcast_dims for site in paths} == {(1,) if per_sample else (0, 1)}
    assert {site.shape for site in paths} == {(8, 4)}
    assert {site.fixed_count for site in paths} == {skips}


@each_framework
@with_and_without_branch
def test_the_network_without_dropout_draws_no_path(make, skips, variables_of, getkey):
    network = make(skips=skips, hidden_rate=0.5)
    variables = variables_of(network)
    plain = network.replace_dropout(lambda site, inputs: inputs)
    outputs, _ = plain.apply_train(variables, X, getkey())
    np.testing.assert_allclose(outputs, network(variables, X, None), rtol=1e-5, atol=1e-6)
    dropped, _ = network.apply_train(variables, X, getkey())
    assert (dropped != outputs).any()


@each_framework
@with_and_without_branch
def test_recorded_masks_are_those_of_the_network_and_can_be_replayed(
    make, skips, variables_of, getkey
):
    # A branch that is computed for fewer samples draws other masks inside.
    network, key = make(skips=skips, hidden_rate=0.0 if skips else 0.5), getkey()
    variables = variables_of(network)
    outputs, masks = record_masks(key, network, variables, X)
    again = network(variables, X, jax.random.clone(key))
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)
    paths = {name: masks[name] for name in map(NAMES[make].format, (1, 2))}
    assert all(mask.shape == (8, 1) for (mask,) in paths.values())
    if skips:
        assert [int(mask.sum()) for (mask,) in paths.values()] == [6, 4]
    replayed = replay_masks(network, masks)(variables, X, None)
    np.testing.assert_allclose(replayed, outputs, rtol=1e-5, atol=1e-6)
    # Layers that are not replayed go on drawing what they draw.
    one = {name: mask for name, mask in masks.items() if name.endswith("1")}
    mixed = replay_masks(network, one)(variables, X, jax.random.clone(key))
    np.testing.assert_allclose(mixed, outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_masks_of_paths_can_be_enumerated(variables_of):
    """The average over the four masks of two layers, each with one decision for the batch."""
    network = linen_network(skips=False, per_sample=False)
    variables = variables_of(network)
    rates = {"DropPath_1": np.array([0.25]), "DropPath_2": np.array([0.5])}

    def log_probs_fn(masks):
        replayed = {name: (mask[:, None],) for name, mask in masks.items()}
        return predict(None, replay_masks(network, replayed), variables, X)

    enumerated, _ = enumerate_masks(log_probs_fn, rates)
    mean = sum(
        probability * jnp.exp(log_probs_fn({"DropPath_1": first, "DropPath_2": second}))
        for kept, share in [(True, 0.75), (False, 0.25)]
        for first in [jnp.array([kept])]
        for second, probability in [(jnp.array([k]), share * 0.5) for k in (True, False)]
    )
    np.testing.assert_allclose(jnp.exp(enumerated), mean, rtol=1e-5)


@pytest.mark.slow
@each_framework
def test_thinning_deletes_hidden_units_and_leaves_paths_to_their_layers(make, variables_of, getkey):
    only_paths = make(skips=False)
    with pytest.raises(thinned.ThinningError, match="no dropout layer that is on"):
        thinned.thin(only_paths, X[:1])
    network = thinned.thin(make(skips=False, hidden_rate=0.5), X[:1])
    assert len(network.step_rule.units) == 3
    state = ensemble.init_ensemble(getkey(), network, optax.sgd(0.1), X[:1], ensemble_size=2)
    _, losses = ensemble.fit_ensemble(
        getkey(), state, X, jnp.arange(8) % 3, num_epochs=2, batch_size=4
    )
    assert jnp.isfinite(losses).all()


@pytest.mark.slow
def test_an_ensemble_trains_with_branches_left_out_as_its_members_do_alone(getkey):
    network, key = linen_network(skips=True), getkey()
    variables = jax.vmap(lambda key: network.init(key, X))(jax.random.split(getkey(), 3))
    keys = jax.random.split(key, 3)

    def loss(variables, key):
        return (network.apply_train(variables, X, key)[0] ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    together = jax.jit(jax.vmap(step))(variables, keys)
    alone = [
        step(jax.tree.map(lambda leaf, i=index: leaf[i], variables), jax.random.clone(key))
        for index, key in enumerate(keys)
    ]
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), together, alone)


# A stack of layers in `nn.scan`.


class Layer(nn.Module):
    """Adds 4**index to the samples that it keeps."""

    skips: bool

    @nn.compact
    def __call__(self, x, index):
        drop = jdrop.linen.DropPath(0.5, deterministic=False)
        add = lambda x: jnp.full_like(x, 2.0) ** (2 * index - 1)  # noqa: E731
        return x + (drop(x, branch=add) if self.skips else drop(add(x))), None


@with_and_without_branch
@pytest.mark.parametrize("own_keys", [True, False])
def test_each_layer_of_a_scan_has_decisions_of_its_own_if_keys_are_split(skips, own_keys, getkey):
    split = {"dropout": own_keys}
    stack = nn.scan(Layer, split_rngs=split, variable_axes={"params": 0})(skips)
    y, _ = stack.apply({}, jnp.zeros((8, 1)), jnp.arange(6), rngs={"dropout": getkey()})
    digits = np.asarray(y, int) // 4 ** np.arange(6) % 4  # [sample, layer]
    assert np.isin(digits, [0, 1]).all()
    if skips:
        assert (digits.sum(0) == 4).all()
    assert own_keys == (digits != digits[:, :1]).any()
