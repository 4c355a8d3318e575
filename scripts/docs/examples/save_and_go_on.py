"""Saving an ensemble in training with Orbax, restoring it, and going on."""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import jdrop.linen
from jdrop import ensemble


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.int32(labels)
network, optimizer = jdrop.linen.as_network(MLP()), optax.adam(1e-3)
init_key, fit_key = jax.random.split(jax.random.key(0))


def start():
    key = jax.random.clone(init_key)
    return ensemble.init_ensemble(key, network, optimizer, images[:1], ensemble_size=5)


def go_on(state, num_epochs):
    # The order and the masks depend on the key and on `state.step`: each part takes the same key.
    key = jax.random.clone(fit_key)
    return ensemble.fit_ensemble(
        key, state, images[:500], labels[:500], num_epochs=num_epochs, batch_size=50
    )[0]


with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpoint = Path(folder) / "checkpoint"
    checkpointer.save(checkpoint, go_on(start(), num_epochs=4))
    checkpointer.wait_until_finished()

    # In another process: the same network and optimizer, then the arrays of the checkpoint.
    restored = checkpointer.restore(checkpoint, jax.eval_shape(start))

resumed, in_one = go_on(restored, num_epochs=6), go_on(start(), num_epochs=10)
same = jax.tree.map(lambda one, other: bool((one == other).all()), resumed, in_one)
print(f"after {resumed.step[0]} steps, the same as without a stop: {jax.tree.all(same)}")
