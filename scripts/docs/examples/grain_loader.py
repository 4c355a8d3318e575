"""Grain loads batches ahead; a checkpoint holds the state and the place in the data."""

import tempfile

import flax.linen as nn
import grain
import jax
import numpy as np
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
# Any sequence of examples will do, such as an `ArrayRecordDataSource`, which reads from disk.
examples = list(zip(np.float32(images / 16), np.int32(labels), strict=True))
data = grain.MapDataset.source(examples).seed(0).shuffle().repeat(2).batch(64)
# Threads read batches ahead, and put them on the device.
loader = grain.experimental.device_put(data.to_iter_dataset(), jax.devices()[0])

network, optimizer = jdrop.linen.as_network(MLP()), optax.adam(1e-3)
init_key, train_key = jax.random.split(jax.random.key(0))
initial = ensemble.init_ensemble(init_key, network, optimizer, images[:1], ensemble_size=5)


def train(state, batches, first_step, last_step):
    for step in range(first_step, last_step):
        key = jax.random.fold_in(train_key, step)
        state, _ = ensemble.train_step(key, state, next(batches))
    return state


def train_with_a_stop(stop, last_step):
    state = train(initial, batches := iter(loader), 0, stop)
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as checkpoints:
        state, place = ocp.args.StandardSave(state), ocp.args.JsonSave(batches.get_state())
        checkpoints.save(stop, args=ocp.args.Composite(state=state, place=place))
        # In another process: the same network, optimizer and loader, then what was saved.
        state, place = ocp.args.StandardRestore(initial), ocp.args.JsonRestore()
        restored = checkpoints.restore(stop, args=ocp.args.Composite(state=state, place=place))
    batches = iter(loader)
    batches.set_state(restored.place)
    return train(restored.state, batches, stop, last_step)


resumed, in_one = train_with_a_stop(20, 50), train(initial, iter(loader), 0, 50)
same = jax.tree.map(lambda one, other: (one == other).all(), resumed, in_one)
print(f"after {resumed.step[0]} steps, the same as without a stop: {all(jax.tree.leaves(same))}")
