"""Times an ensemble's training beside single networks, Flax and PyTorch; orders; checkpoints."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import click
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState as FlaxState
from jax import Array
from timing import print_times, time_in_turn, torch_if_installed

import jdrop.linen
from jdrop import ensemble, train
from jdrop.orders import shuffle
from jdrop.study import checkpoints
from jdrop.study.run_folder import RunFolder

SIZES, BATCH_SIZE, RATE = (64, 256, 256, 10), 50, 0.5

STEPS = 10
"""The steps of a fit, and the batches of the data."""


class MLP(nn.Module):
    """64-256-256-10, or other sizes, with ReLU and a dropout layer of jdrop or Flax."""

    dropout: Any = jdrop.linen.Dropout
    sizes: tuple[int, ...] = SIZES

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns ten logits."""
        for units in self.sizes[1:-1]:
            x = nn.relu(nn.Dense(units)(x))
            x = self.dropout(RATE, deterministic=not train)(x)
        return nn.Dense(self.sizes[-1])(x)


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of `STEPS` batches."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(STEPS * BATCH_SIZE, SIZES[0])).astype(np.float32)
    return inputs, np.arange(len(inputs)) % SIZES[-1]


def jdrop_fits(num_members: int) -> dict[str, Callable[[], Any]]:
    """An epoch of all members by each batching, and an epoch of one network."""
    network = jdrop.linen.as_network(MLP())
    inputs, labels = jax.device_put(make_data())
    state = ensemble.init_ensemble(
        jax.random.key(0), network, optax.adam(1e-3), inputs[:1], ensemble_size=num_members
    )
    single = jax.tree.map(lambda leaf: leaf[0], state)
    arguments = {"num_epochs": 1, "batch_size": BATCH_SIZE}
    key = jax.random.key(1)
    fits: dict[str, Callable[[], Any]] = {
        "single": partial(train.fit, key, single, inputs, labels, **arguments)
    }
    for batching in ("vmap", "scan"):
        fits[batching] = partial(
            ensemble.fit_ensemble, key, state, inputs, labels, batching=batching, **arguments
        )
    return fits


def flax_loop(num_members: int) -> Callable[[], Any]:
    """An epoch of each member in turn: Flax's dropout, a compiled step, a loop in Python."""
    module = MLP(nn.Dropout)
    inputs, labels = make_data()

    @jax.jit
    def step(state: FlaxState, key: Array, x: Array, y: Array) -> FlaxState:
        def loss(params: Any) -> Array:
            key_now = jax.random.fold_in(key, state.step)
            logits = state.apply_fn(params, x, True, rngs={"dropout": key_now})
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def init(index: int) -> FlaxState:
        params = module.init(jax.random.key(index), inputs[:1], False)
        return FlaxState.create(apply_fn=module.apply, params=params, tx=optax.adam(1e-3))

    states = [init(index) for index in range(num_members)]
    keys = list(jax.random.split(jax.random.key(2), num_members))
    rng = np.random.default_rng(1)

    def epoch() -> Any:
        for index, key in enumerate(keys):
            for rows in rng.permutation(len(inputs)).reshape(STEPS, BATCH_SIZE):
                states[index] = step(states[index], key, inputs[rows], labels[rows])
        return [state.params for state in states]

    return epoch


def torch_model(torch: Any) -> Any:
    """The network in PyTorch."""
    layers: list[Any] = []
    for n_in, n_out in pairwise(SIZES[:-1]):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU(), torch.nn.Dropout(RATE)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(*SIZES[-2:]))


def torch_loop(torch: Any, num_members: int) -> Callable[[], None]:
    """An epoch of each member in turn, in a loop in Python."""
    inputs, labels = map(torch.from_numpy, make_data())
    models = [torch_model(torch) for _ in range(num_members)]
    optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in models]

    def epoch() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            for rows in torch.randperm(len(inputs)).reshape(STEPS, BATCH_SIZE):
                loss = torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return epoch


def torch_vmap(torch: Any, num_members: int) -> Callable[[], None]:
    """An epoch of all members at once: `stack_module_state` and `vmap`, each with its own order."""
    inputs, labels = map(torch.from_numpy, make_data())
    models = [torch_model(torch) for _ in range(num_members)]
    params, buffers = torch.func.stack_module_state(models)
    optimizer = torch.optim.Adam(params.values(), fused=True)

    def outputs(params: Any, buffers: Any, x: Any) -> Any:
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    predict = torch.func.vmap(outputs, randomness="different")

    def epoch() -> None:
        orders = torch.stack([torch.randperm(len(inputs)) for _ in models])
        for rows in orders.reshape(num_members, STEPS, BATCH_SIZE).unbind(1):
            logits = predict(params, buffers, inputs[rows])
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[rows].flatten(), reduction="sum"
            )
            optimizer.zero_grad()
            (losses / BATCH_SIZE).backward()
            optimizer.step()

    return epoch


def bench_ensemble() -> dict[str, Any]:
    """Steps of 5, 20 and 100 members, as ratios to as many steps of a single network.

    The network is 64-256-256-10 with dropout, the batch 50, the optimizer Adam. 20 members are also
    trained by a loop over Flax's steps, and by PyTorch in a loop and with `vmap`; there 1 is
    jdrop's default.
    """
    results = {}
    for num_members, rounds in ((5, 15), (20, 9), (100, 5)):
        seconds = time_in_turn(jdrop_fits(num_members), rounds)
        seconds["single"] = [num_members * value for value in seconds["single"]]
        name = f"{num_members} members"
        results[name] = print_times(f"ensemble, a step of {name}", seconds, STEPS)
    fits = jdrop_fits(20)
    functions = {"jdrop": fits["vmap"], "jdrop scan": fits["scan"], "flax loop": flax_loop(20)}
    torch = torch_if_installed()
    if torch is not None:
        functions |= {"torch loop": torch_loop(torch, 20), "torch vmap": torch_vmap(torch, 20)}
    rows = print_times("ensemble, a step of 20 members", time_in_turn(functions, 7), STEPS)
    results["20 members, other libraries"] = rows
    return results


def bench_orders() -> dict[str, Any]:
    """Random orders of rows for 100 vmapped members, and an epoch, which needs them.

    The network is 16-50-10 with dropout, the batch 128, the optimizer Adam.
    """
    results = {}
    num_members = 100
    keys = jax.random.split(jax.random.key(0), num_members)
    network = jdrop.linen.as_network(MLP(sizes=(16, 50, 10)))
    for num_rows in (500, 10_000, 40_000):
        rows = jnp.arange(num_rows)
        inputs, labels = jax.random.normal(jax.random.key(1), (num_rows, 16)), rows % 10
        state = ensemble.init_ensemble(
            jax.random.key(2), network, optax.adam(1e-3), inputs[:1], ensemble_size=num_members
        )
        functions = {
            "jdrop": partial(jax.jit(jax.vmap(shuffle, (0, None))), keys, rows),
            "jax": partial(jax.jit(jax.vmap(jax.random.permutation, (0, None))), keys, rows),
            "an epoch": partial(
                ensemble.fit_ensemble, keys[0], state, inputs, labels, num_epochs=1, batch_size=128
            ),
        }
        name = f"{num_rows} rows"
        rows_of_table = time_in_turn(functions, 7)
        results[name] = print_times(f"orders of {name}, a member", rows_of_table, num_members)
    return results


EPOCHS = 20
"""Of a training in which one checkpoint is written; they outlast the writing."""


def train_epochs(
    fit: Callable[[], Any], update: Callable[[int, Any, dict[str, Any]], None] | None = None
) -> None:
    """Trains for `EPOCHS`; after the first, `update` may write a checkpoint."""
    for epoch in range(1, EPOCHS + 1):
        state, _ = jax.block_until_ready(fit())
        if epoch == 1 and update is not None:
            update(epoch, state, {})


def train_with_checkpoint(fit: Callable[[], Any], kept: checkpoints.Checkpoints) -> None:
    """Trains for `EPOCHS`, and writes a checkpoint after the first one as the training goes on."""
    at_once = mock.patch.object(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with at_once, kept.saving() as update:
        train_epochs(fit, update)


def bench_checkpoints() -> dict[str, Any]:
    """The time that a checkpoint adds to a training that goes on while it is written.

    A training writes one every `SECONDS_BETWEEN_CHECKPOINTS`, or less often if it is large.
    """
    results = {}
    for num_members, rounds in ((20, 9), (100, 5)):
        fit = jdrop_fits(num_members)["vmap"]
        with tempfile.TemporaryDirectory() as folder:
            kept = RunFolder(Path(folder), {}).checkpoints("networks", num_members)
            functions = {
                "without": partial(train_epochs, fit),
                "with one": partial(train_with_checkpoint, fit, kept),
            }
            seconds = time_in_turn(functions, rounds)
        name = f"{num_members} members"
        rows = print_times(f"checkpoints, {EPOCHS} epochs of {name}", seconds, EPOCHS)
        added = statistics.median(seconds["with one"]) - statistics.median(seconds["without"])
        share = added / checkpoints.SECONDS_BETWEEN_CHECKPOINTS
        click.echo(
            f"  one adds {1e3 * added:.0f} ms, {share:.1%} of the "
            f"{checkpoints.SECONDS_BETWEEN_CHECKPOINTS:g} s between two"
        )
        results[name] = {**rows, "share of a run": share}
    return results
