"""A usual training loop of Flax with jdrop's dropout, and then an ensemble of the same network.

The data is scikit-learn's digits, so that nothing is downloaded; MNIST takes the same code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jdrop.linen  # Instead of flax.linen's Dropout; all else of the loop stays as it was.
from jdrop import ensemble, inference, metrics


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)  # Was nn.Dropout.
        return nn.Dense(10)(x)


images, labels = load_digits(return_X_y=True)
images, labels = jnp.float32(images / 16), jnp.int32(labels)
train_x, train_y, test_x, test_y = images[:500], labels[:500], images[500:], labels[500:]

model, optimizer = MLP(), optax.adam(2e-3)
params = model.init(jax.random.key(0), train_x[:1], train=False)
opt_state = optimizer.init(params)


@jax.jit
def train_step(key, params, opt_state, x, y):
    def loss_fn(params):
        logits = model.apply(params, x, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


for step in range(500):
    batch_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
    batch = jax.random.choice(batch_key, len(train_x), (50,), replace=False)
    params, opt_state, loss = train_step(
        dropout_key, params, opt_state, train_x[batch], train_y[batch]
    )
log_probs = jax.nn.log_softmax(model.apply(params, test_x, train=False))
print(f"one network:   error {metrics.error(log_probs, test_y):.1%}")

# The same network five times, trained at once, and averaged.
network = jdrop.linen.as_network(model)
init_key, fit_key = jax.random.split(jax.random.key(2))
state = ensemble.init_ensemble(init_key, network, optimizer, train_x[:1], ensemble_size=5)
state, _ = ensemble.fit_ensemble(fit_key, state, train_x, train_y, num_epochs=50, batch_size=50)
members = ensemble.predict(None, network, state.variables, test_x)  # [member, batch, class]
print(f"five averaged: error {metrics.error(inference.pool(members), test_y):.1%}")
