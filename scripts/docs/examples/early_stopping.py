"""Validation and early stopping: each member keeps the weights of its own best epoch."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jdrop.linen
from jdrop import ensemble, inference, metrics


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(128)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


def choose(is_new, new, old):
    """The new array for the members for which `is_new` is True, the old one for the others."""
    return jnp.where(jnp.expand_dims(is_new, range(1, new.ndim)), new, old)


images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.int32(labels)
train_x, valid_x, test_x = jnp.split(images, [300, 500])
train_y, valid_y, test_y = jnp.split(labels, [300, 500])

network, ensemble_size, patience = jdrop.linen.as_network(MLP()), 5, 5
init_key, fit_key = jax.random.split(jax.random.key(0))
state = ensemble.init_ensemble(
    init_key, network, optax.adam(1e-2), train_x[:1], ensemble_size=ensemble_size
)
best = state.variables
best_loss = jnp.full(ensemble_size, jnp.inf)
best_epoch = jnp.zeros(ensemble_size, int)

for epoch in range(1, 101):
    # Parts with clones of one key equal a single fit of all epochs.
    key = jax.random.clone(fit_key)
    state, _ = ensemble.fit_ensemble(key, state, train_x, train_y, num_epochs=1, batch_size=50)
    members = ensemble.predict(None, network, state.variables, valid_x)
    loss = jax.vmap(metrics.nll, in_axes=(0, None))(members, valid_y)

    waits = epoch - best_epoch <= patience
    if not waits.any():
        break
    improves = waits & (loss < best_loss)
    best_loss = jnp.where(improves, loss, best_loss)
    best_epoch = jnp.where(improves, epoch, best_epoch)
    best = jax.tree.map(partial(choose, improves), state.variables, best)

print("best epoch of each member:", best_epoch, "validation loss:", best_loss.round(3))
members = ensemble.predict(None, network, best, test_x)
print(f"five averaged: NLL {metrics.nll(inference.pool(members), test_y):.3f}")
