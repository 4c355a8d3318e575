"""The thinned network against the network of full size in which the same units are masked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jdrop.thinned import thin
from jdrop.train import cross_entropy

ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
"""For sums of up to a thousand float32 terms of order 1, in another order; errors show at 1."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options for functions that run once."""


def drawn_variables(network, inputs, seed=0):
    """Any numbers: with those of `init`, biases would be 0 and statistics those of no training."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(network.init, jax.random.key(0), inputs)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(values) if path[-1].key == "var" else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, like)


def drawn_inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def drawn_units(thinning):
    """As `thinning.draw` does, without the compilation of it."""
    rng = np.random.default_rng(2)
    return {
        units.name: np.sort(rng.permutation(units.num_blocks)[: units.kept_blocks])
        for units in thinning.units
    }


def masks_of(thinning, kept):
    """For each layer, what its units are multiplied by."""
    masks = {}
    for units in thinning.units:
        value = units.num_blocks / len(kept[units.name]) if thinning.scales else 1.0
        blocks = jnp.zeros(units.num_blocks).at[kept[units.name]].set(value)
        masks[units.name] = jnp.repeat(blocks, units.block_size)
    return masks


def masked(as_network, thinning, kept, site=None):
    """The network with the units multiplied by their masks, all of `site` where it is given."""
    masks = masks_of(thinning, kept)

    def at_dropout(name, x, rate):
        if site is not None:
            (mask,) = masks.values() if name == site else (None,)
        else:
            mask = masks.get(name)
        return x if mask is None else x * jnp.expand_dims(mask, range(x.ndim - 1)).astype(x.dtype)

    return as_network(at_dropout=at_dropout)


def gradient(network, variables, inputs, key):
    def loss(params):
        outputs, after = network.apply_train({**variables, "params": params}, inputs, key)
        state = {name: tree for name, tree in after.items() if name != "params"}
        return jnp.sum(jnp.sin(outputs.astype(jnp.float32))), (outputs, state)

    return jax.grad(loss, has_aux=True)(variables["params"])


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_close(one, other, **rounding):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(rounding or ROUNDING)), one, other
    )


def assert_exact(as_network, inputs, rates=None, *, reference=None, site=None, **options):
    """Outputs, state and every entry of the gradient are those of the masked network.

    Args:
        as_network: makes the network, and with `at_dropout` the one in which it is called.
        inputs: a batch.
        rates: see `thin`.
        reference: the masked network is made by it where the thinned one has no dropout layer.
        site: the dropout layer of the reference.
        options: see `thin`.
    """
    network = thin(as_network(), inputs[:1], rates, **options)
    thinning = network.thinning
    variables = drawn_variables(network, inputs)

    @partial(jax.jit, compiler_options=QUICK)
    def compare(key, variables, kept):
        taken = thinning.take(thinning.places, variables, kept)
        part, (outputs, state) = gradient(thinning.network(kept), taken, inputs, key)
        places = thinning.places["params"]
        grads = thinning.put(places, zeros_like(variables["params"]), part, kept)
        full = masked(reference or as_network, thinning, kept, site)
        key = jax.random.clone(key)
        expected, (full_outputs, full_state) = gradient(full, variables, inputs, key)
        of_state = {name: thinning.places[name] for name in full_state}
        full_state = thinning.take(of_state, full_state, kept)
        entries = jax.tree.map(jnp.broadcast_to, thinning.entries(kept), shapes(grads))
        return (grads, outputs, state), (expected, full_outputs, full_state), entries

    kept = drawn_units(thinning)
    got, expected, entries = jax.device_get(compare(jax.random.key(3), variables, kept))
    assert_close(got, expected)
    # Deleted entries are those of gradient 0. Not because all are: but a bias before a batch
    # normalisation, say, has none.
    deleted = jax.tree.map(lambda grad, kept: grad[~kept], expected[0], entries)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(deleted))
    assert sum(leaf.size for leaf in jax.tree.leaves(deleted)) > 0
    changed = [(np.abs(leaf) > 1e-3).any() for leaf in jax.tree.leaves(expected[0])]
    assert 2 * sum(changed) > len(changed)
    return thinning


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def gradient_of_loss(network, params, inputs, labels):
    """Of the mean cross-entropy, and its value."""

    def loss(params):
        outputs, _ = network.apply_train({"params": params}, inputs, jax.random.key(0))
        return jnp.mean(cross_entropy(outputs, labels))

    value, grads = jax.value_and_grad(loss)(params)
    return grads, value
