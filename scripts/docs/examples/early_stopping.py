"""Early stopping: each member keeps the weights of its own best epoch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jdrop.linen
from jdrop import ensemble, inference, metrics
from jdrop.early_stopping import fit_with_early_stopping


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(128)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.int32(labels)
train_x, valid_x, test_x = jnp.split(images, [300, 500])
train_y, valid_y, test_y = jnp.split(labels, [300, 500])

network = jdrop.linen.as_network(MLP())
init_key, fit_key = jax.random.split(jax.random.key(0))
state = ensemble.init_ensemble(init_key, network, optax.adam(1e-2), train_x[:1], ensemble_size=5)
result = fit_with_early_stopping(
    fit_key,
    state,
    train_x,
    train_y,
    validation_data=(valid_x, valid_y),
    num_epochs=100,
    patience=5,
    batch_size=50,
)
print("best epoch of each member:", result.best_epoch)
print("validation loss:", np.nanmin(result.validation_losses, axis=1).round(3))
members = ensemble.predict(None, network, result.state.variables, test_x)
print(f"five averaged: NLL {metrics.nll(inference.pool(members), test_y):.3f}")
