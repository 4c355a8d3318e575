"""A training loop of one's own: a loader, a learning-rate schedule, accumulated gradients.

All members learn from one pass over the data, which need not fit into memory.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import jdrop.linen
from jdrop import ensemble, inference, metrics


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
train_x, train_y, test_x, test_y = images[:500], labels[:500], images[500:], labels[500:]


def load(num_epochs, batch_size, first_step=0):
    """Any iterable of arrays will do, such as a loader of grain, tf.data or PyTorch."""
    steps_per_epoch = len(train_x) // batch_size
    for step in range(first_step, num_epochs * steps_per_epoch):
        epoch, index = divmod(step, steps_per_epoch)
        # The order depends on the epoch alone, so the loader can start at any step.
        order = np.random.default_rng([0, epoch]).permutation(len(train_x))
        rows = order[index * batch_size : (index + 1) * batch_size]
        yield train_x[rows], train_y[rows]


# Each update takes the gradients of two batches of 25. The schedule counts updates.
schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=50, decay_steps=400)
optimizer = optax.MultiSteps(optax.adamw(schedule), 2).gradient_transformation()

network = jdrop.linen.as_network(MLP())
init_key, train_key = jax.random.split(jax.random.key(0))
state = ensemble.init_ensemble(init_key, network, optimizer, train_x[:1], ensemble_size=5)
for step, batch in enumerate(load(num_epochs=40, batch_size=25)):
    # JAX computes in the background, so the loader prepares the next batch meanwhile.
    state, losses = ensemble.train_step(jax.random.fold_in(train_key, step), state, batch)
    if (step + 1) % 200 == 0:
        print(f"step {step + 1}: loss of each member", np.asarray(losses).round(3))

members = ensemble.predict(None, network, state.variables, test_x)
print(f"five averaged: error {metrics.error(inference.pool(members), test_y):.1%}")
