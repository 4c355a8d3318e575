"""Compares a thinned network with the network at full size that masks the same units."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jdrop.linen
from jdrop.thinned import thin
from jdrop.train import cross_entropy

ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
"""For sums of up to a thousand float32 terms of order 1, in another order; errors show at 1."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options for functions that run once."""


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


def drawn_blocks(rule):
    """As `rule.draw` does, without the compilation of it."""
    rng = np.random.default_rng(2)
    return {
        group.name: np.sort(rng.permutation(group.num_blocks)[: group.kept_blocks])
        for group in rule.units
    }


def scaled_masks(rule, kept):
    """For each layer, the factors of its units."""
    masks = {}
    for group in rule.units:
        value = group.num_blocks / len(kept[group.name]) if rule.scales else 1.0
        blocks = jnp.zeros(group.num_blocks).at[kept[group.name]].set(value)
        masks[group.name] = jnp.repeat(blocks, group.block_size)
    return masks


def masked(network, rule, kept, site_name=None):
    """The network that multiplies the units by their masks; only at `site_name` if it is given."""
    masks = scaled_masks(rule, kept)
    if site_name is not None:
        (mask,) = masks.values()
        masks = {site_name: mask}

    def apply_mask(site, x):
        mask = masks.get(site.name)
        return x if mask is None else x * jnp.expand_dims(mask, range(x.ndim - 1)).astype(x.dtype)

    return network.replace_dropout(apply_mask)


def kept_entries(rule, axes, tree, kept):
    """True where an entry of the arrays of a tree belongs to kept units."""
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), tree)
    everything = jax.tree.map(jnp.ones_like, rule.take(axes, nothing, kept))
    return rule.put(axes, nothing, everything, kept)


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


def assert_exact(network, inputs, rates=None, *, reference=None, site_name=None, **options):
    """Asserts that outputs, state and every entry of the gradient are those of the masked network.

    Args:
        network: the network to thin.
        inputs: a batch.
        rates: see `thin`.
        reference: the network to mask, if the thinned one has no dropout layer.
        site_name: the dropout layer of the reference.
        options: see `thin`.
    """
    network = thin(network, inputs[:1], rates, **options)
    rule = network.step_rule
    reference = network if reference is None else reference
    variables = drawn_variables(network, inputs)

    @partial(jax.jit, compiler_options=QUICK)
    def compare(key, variables, kept):
        taken = rule.take(rule.axes, variables, kept)
        thinned = rule.thinned_network(kept)
        thinned_grads, (outputs, state) = gradient(thinned, taken, inputs, key)
        params, axes = variables["params"], rule.axes["params"]
        grads = rule.put(axes, zeros_like(params), thinned_grads, kept)
        full = masked(reference, rule, kept, site_name)
        key = jax.random.clone(key)
        expected, (full_outputs, full_state) = gradient(full, variables, inputs, key)
        state_axes = {name: rule.axes[name] for name in full_state}
        full_state = rule.take(state_axes, full_state, kept)
        is_kept = kept_entries(rule, axes, params, kept)
        return (grads, outputs, state), (expected, full_outputs, full_state), is_kept

    kept = drawn_blocks(rule)
    got, expected, is_kept = jax.device_get(compare(jax.random.key(3), variables, kept))
    assert_close(got, expected)
    # Deleted entries are those of gradient 0. Not because all are: but a bias before a batch
    # normalisation, say, has none.
    deleted = jax.tree.map(lambda grad, is_kept: grad[~is_kept], expected[0], is_kept)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(deleted))
    assert sum(leaf.size for leaf in jax.tree.leaves(deleted)) > 0
    changed = [(np.abs(leaf) > 1e-3).any() for leaf in jax.tree.leaves(expected[0])]
    assert 2 * sum(changed) > len(changed)
    return rule


def gradient_of_loss(network, params, inputs, labels):
    """Of the mean cross-entropy, and its value."""

    def loss(params):
        outputs, _ = network.apply_train({"params": params}, inputs, jax.random.key(0))
        return jnp.mean(cross_entropy(outputs, labels))

    value, grads = jax.value_and_grad(loss)(params)
    return grads, value
