"""Each member learns from its own order of the data, which grain loads."""

import flax.linen as nn
import grain
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
examples = list(zip(images[:500], labels[:500], strict=True))
ensemble_size = 5


def load(member):
    # Not `.shuffle(seed)`: its second epoch has the order of the first epoch of `seed + 1`.
    data = grain.MapDataset.source(examples).seed(member).shuffle()
    return data.repeat(10).batch(25)


def stack(batches):
    """Makes arrays [member, batch, ...] of a batch for each member."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


members = [load(member) for member in range(ensemble_size)]
data = grain.experimental.ZipMapDataset(members).map(stack)
loader = grain.experimental.device_put(data.to_iter_dataset(), jax.devices()[0])

network, optimizer = jdrop.linen.as_network(MLP()), optax.adam(5e-3)
init_key, train_key = jax.random.split(jax.random.key(0))
state = ensemble.init_ensemble(
    init_key, network, optimizer, images[:1], ensemble_size=ensemble_size
)
for step, batch in enumerate(loader):
    key = jax.random.fold_in(train_key, step)
    state, losses = ensemble.train_step(key, state, batch, member_batches=True)

members = ensemble.predict(None, network, state.variables, images[500:])
error = metrics.error(inference.pool(members), labels[500:])
print(f"after {state.step[0]} steps, five averaged: error {error:.1%}")
