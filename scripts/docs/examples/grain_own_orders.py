"""Grain gives each member its own order of the data, and tells where in it the training is."""

import flax.linen as nn
import grain
import jax
import numpy as np
import optax
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
examples = list(zip(np.float32(images / 16), np.int32(labels), strict=True))


def load(member):
    # Not `.shuffle(member)`: then epoch 1 of member 0 would have the order of epoch 0 of member 1.
    return grain.MapDataset.source(examples).seed(member).shuffle().repeat(2).batch(64)


def stack(batches):
    """Makes arrays [member, batch, ...] of a batch for each member."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


data = grain.experimental.ZipMapDataset([load(member) for member in range(5)]).map(stack)
loader = grain.experimental.device_put(data.to_iter_dataset(), jax.devices()[0])

network, optimizer = jdrop.linen.as_network(MLP()), optax.adam(2e-3)
init_key, train_key = jax.random.split(jax.random.key(0))
initial = ensemble.init_ensemble(init_key, network, optimizer, images[:1], ensemble_size=5)


def train(state, steps, place=None):
    batches = iter(loader)
    if place is not None:
        batches.set_state(place)
    for step in steps:
        key = jax.random.fold_in(train_key, step)
        state, losses = ensemble.train_step(key, state, next(batches), member_batches=True)
    print(f"after {state.step[0]} steps, loss of each member", np.asarray(losses).round(3))
    return state, batches.get_state()


half, place = train(initial, range(25))
resumed, _ = train(half, range(25, 50), place)
in_one, _ = train(initial, range(50))
same = jax.tree.map(lambda one, other: (one == other).all(), resumed, in_one)
print(f"the same as without a stop: {all(jax.tree.leaves(same))}")
