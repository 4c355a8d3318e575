"""Modules with the calls of public code bases become networks.

A test for each says that it initialises, trains with masks, and predicts without.
"""

from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from signatures import OWN_MASKS, SIGNATURES, AIStack, Init2winit, Linen, X

import jdrop.linen
import jdrop.nnx
from jdrop.network import consumed_keys, dropout_sites, predict

pytestmark = pytest.mark.grid


@pytest.fixture(params=SIGNATURES)
def signature(request):
    return request.param


def differs(one, two):
    return any(
        not jnp.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def test_initialises_trains_with_masks_and_predicts_without(signature, getkey):
    network, inputs = SIGNATURES[signature].network, SIGNATURES[signature].inputs
    variables = network.init(getkey(), inputs)
    trained, updated = network.apply_train(variables, inputs, getkey())
    assert differs(trained, network.apply_train(variables, inputs, getkey())[0])
    assert jax.tree.structure(updated) == jax.tree.structure(variables)
    sampled = network(variables, inputs, getkey())
    assert differs(sampled, network(variables, inputs, getkey()))

    # In a prediction every layer returns its inputs.
    log_probs = predict(None, network, variables, inputs)
    assert log_probs.shape == (4, 3)
    without = network.replace_dropout(lambda site, x: x)
    # Attention that drops nothing may be compiled to another program.
    assert jnp.allclose(log_probs, predict(None, without, variables, inputs), rtol=1e-5)

    # Only keys that a module consumes itself remain without its layers.
    assert consumed_keys(network, variables, inputs)
    places = consumed_keys(without, variables, inputs)
    assert bool(places) == (signature in OWN_MASKS)
    assert all("signatures.py:" in place for place in places)


def test_dropout_that_is_always_on_needs_a_key(getkey):
    class SBX(Linen):
        def __call__(self, obs, action):
            return self.run(obs + action, True)

    network, inputs = jdrop.linen.as_network(SBX()), (X, X)
    variables = network.init(getkey(), inputs)
    assert differs(network(variables, inputs, getkey()), network(variables, inputs, getkey()))
    with pytest.raises(flax.errors.InvalidRngError) as raised:
        network(variables, inputs, None)
    assert any("give `call=`" in note for note in raised.value.__notes__)


def test_the_sites_of_a_call_of_ones_own_are_those_of_the_module(getkey):
    network, inputs = SIGNATURES["EasyLM"].network, SIGNATURES["EasyLM"].inputs
    sites = dropout_sites(network, network.init(getkey(), inputs), inputs)
    assert [(site.name, site.rate) for site in sites] == [("drop", 0.5), ("branch_drop", 0.5)]


@pytest.mark.parametrize(
    ("as_network", "module"),
    [(jdrop.linen.as_network, Init2winit()), (jdrop.nnx.as_network, partial(AIStack))],
)
def test_a_call_that_says_what_as_network_does_draws_the_same_masks(as_network, module, getkey):
    flags = {} if as_network is jdrop.nnx.as_network else {"train": None}

    def call(module, inputs, *, train, key):
        return module(inputs, **dict.fromkeys(flags, train))

    one, two = as_network(module), as_network(module, call)
    init_key, key = getkey(), getkey()
    variables = one.init(jax.random.clone(init_key), X)
    assert not differs(variables, two.init(init_key, X))
    outputs = [network(variables, X, jax.random.clone(key)) for network in (one, two)]
    assert jnp.array_equal(*outputs)
