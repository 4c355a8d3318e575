"""Trains all networks of one kind at once, with checkpoints, and predicts with them.

Member `i` of replicate `r` is number `i R + r` of R replicates: more members leave the others as
they are.
"""

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdrop import ensemble, metrics
from jdrop.network import Network, Variables, network_log_probs
from jdrop.study.data import Dataset, subset
from jdrop.study.methods import WEIGHT_DECAYS, Settings, Training
from jdrop.study.run import Run
from jdrop.train import TrainState, cross_entropy, train_step

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, called as the work goes on."""

NUM_LOOKS = 25  # At networks in training: points of learning curves, chances to stop early.

SECONDS_BETWEEN_CHECKPOINTS = 15.0  # What a kill may cost.


class DivergedError(ValueError):
    """Training gave networks whose predictions are not numbers."""


def squared_error(outputs: Array, targets: Array) -> Array:
    """The loss of regression: one squared error for each example."""
    return (outputs.reshape(targets.shape) - targets) ** 2


def example_losses(outputs: Array, labels: Array) -> dict[str, Array]:
    """Scores of each example from the outputs of a network, by name."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        losses = metrics.losses(jax.nn.log_softmax(outputs), labels)
        return {"nll": losses["nll"], "error": losses["error"]}
    return {"mse": squared_error(outputs, labels)}


@partial(jax.jit, static_argnames=("network", "regression"))
def predict(
    key: Array | None, network: Network, variables: Variables, inputs: Array, *, regression: bool
) -> Array:
    """Predictions of each member: `[member, example, class]` log-probabilities, or targets.

    With a key, member `i` draws masks from `fold_in(key, i)`.
    """

    def one(member: Array, variables: Variables) -> Array:
        sample_key = None if key is None else jax.random.fold_in(key, member)
        if regression:
            return network(variables, inputs, sample_key).reshape(len(inputs))
        return network_log_probs(sample_key, network, variables, inputs)

    num_members = len(jax.tree.leaves(variables)[0])
    # One after another: the activations of all would fill the memory.
    return jax.lax.map(lambda both: one(*both), (jnp.arange(num_members), variables))


@partial(jax.jit, static_argnames="network")
def _losses(
    network: Network, variables: Variables, inputs: Array, labels: Array
) -> dict[str, Array]:
    """Scores `[member, example]` of networks read without dropout."""
    return jax.lax.map(
        lambda member: example_losses(network(member, inputs, None), labels), variables
    )


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a call, as the compiler counts them."""
    lowered = jax.jit(function).lower(*args)
    # Some backends cannot tell before they have compiled.
    analysis: Any = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return float(analysis["flops"])


def check_finite(diverged: Any) -> None:
    """Raises where a network has diverged: one Boolean for each."""
    if diverged.any():
        raise DivergedError(
            f"training diverged: {int(diverged.sum())} of {diverged.size} networks predict no "
            "numbers; take a smaller learning rate."
        )


@dataclass(frozen=True)
class Trained:
    """Networks of one kind after training.

    Attributes:
        variables: of all members of all replicates.
        best_variables: of each as it was when its loss on held-out examples was smallest, where
            some are held out.
        facts: costs and learning curves, as plain values.
    """

    variables: Variables
    best_variables: Variables
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Programs:
    """What trains one kind of network on data of one shape, compiled."""

    init: Any
    fit_epoch: Any
    facts: dict[str, Any]


class Trainer:
    """Trains kinds of networks; equal programs are compiled once.

    Args:
        run: where checkpoints are kept.
        settings: how much is trained.
        progress: told how the work goes on.
    """

    def __init__(self, run: Run, settings: Settings, progress: Progress) -> None:
        self._run, self._settings, self._progress = run, settings, progress
        self._programs: dict[Any, _Programs] = {}

    def compile(self, work: Sequence[tuple[Training, Dataset]]) -> None:
        """Compiles what trains these kinds on this data, several programs at a time."""
        missing = {self._which(*one): one for one in work}
        missing = {which: one for which, one in missing.items() if which not in self._programs}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda one: self._compile(*one), missing.values())
            for done, (which, programs) in enumerate(zip(missing, compiled, strict=True), 1):
                self._programs[which] = programs
                self._progress("compiling", done, len(missing))

    def __call__(
        self,
        key: Array,
        training: Training,
        what: str,
        data: Dataset,
        *,
        rate: float | None = None,
    ) -> Trained:
        """Trains all members of all replicates, from the last checkpoint if there is one.

        Args:
            key: consumed.
            training: of which kind.
            what: for the progress, and the name of the checkpoints.
            data: the examples.
            rate: for networks that hold theirs in their variables.

        Raises:
            DivergedError: losses that are not numbers.
        """
        self.compile([(training, data)])
        programs = self._programs[self._which(training, data)]
        replicates = self._settings.replicates
        init_key, fit_key = jax.random.split(key)
        data, validation = self._held_out(training, data)
        inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
        state = programs.init(init_key, inputs[:1])
        if rate is not None:
            rates = np.full(state.step.shape, rate, np.float32)
            state.variables["rate"] = jax.device_put(rates, state.step.sharding)
        if training.validate:
            decays = np.resize(np.repeat(np.asarray(WEIGHT_DECAYS), replicates), state.step.shape)
            decays = jax.device_put(decays.astype(np.float32), state.step.sharding)
            state.opt_state.hyperparams["weight_decay"] = decays
        facts = copy.deepcopy(programs.facts)
        facts["train_flops"] = facts.pop("epoch_flops") * training.epochs
        count = training.members * replicates
        facts["num_networks"] = count
        facts["best_loss"] = [float("inf")] * count
        done, best = 0, first_members(state.variables, count)
        checkpoints = self._run.checkpoints(what.replace(" ", "-"))
        restored = checkpoints.restore({**_arrays(state), "best": best})
        if restored is not None:
            done, arrays, facts = restored
            best = arrays.pop("best")
            arrays = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding), arrays, _arrays(state)
            )
            state = dataclasses.replace(state, **arrays)

        interval = max(1, training.epochs // NUM_LOOKS)
        saved = time.perf_counter()
        for epoch in range(done + 1, training.epochs + 1):
            start = time.perf_counter()
            state, losses = jax.block_until_ready(
                programs.fit_epoch(jax.random.clone(fit_key), state, inputs, labels)
            )
            facts["train_seconds"] += time.perf_counter() - start
            check_finite(~np.isfinite(np.asarray(losses)[:count]).all(1))
            if epoch % interval == 0 or epoch in (1, training.epochs):
                if training.watch:
                    facts["epochs"].append(epoch)
                    network, firsts = training.network, first_members(state.variables, replicates)
                    facts["train"].append(mean_losses(network, firsts, inputs, labels))
                    facts["test"].append(
                        mean_losses(network, firsts, data.test_inputs, data.test_labels)
                    )
                if validation is not None:
                    members = first_members(state.variables, count)
                    loss = member_losses(training.network, members, *validation)
                    best = _better(loss, facts["best_loss"], members, best)
                    facts["best_loss"] = list(map(min, loss, facts["best_loss"]))
                    facts["last_loss"] = loss
            self._progress(f"training {what}", epoch, training.epochs)
            if time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                checkpoints.save(epoch, {**_arrays(state), "best": best}, facts)
                saved = time.perf_counter()
        checkpoints.delete()
        return Trained(first_members(state.variables, count), best, facts)

    def _held_out(
        self, training: Training, data: Dataset
    ) -> tuple[Dataset, tuple[np.ndarray, np.ndarray] | None]:
        """The data to train on, and a tenth of it where the kind wants that for validation."""
        if not training.validate:
            return data, None
        held_out = subset(data, max(1, len(data.train_labels) // 10), self._settings.seed)
        validation = data.train_inputs[held_out], data.train_labels[held_out]
        return data.train_on(~held_out), validation

    def _which(self, training: Training, data: Dataset) -> Any:
        """What a program depends on."""
        shape = data.train_inputs.shape
        return training.network, training.optimizer, training.members, shape

    def _compile(self, training: Training, data: Dataset) -> _Programs:
        data, _ = self._held_out(training, data)
        batch_size = min(self._settings.batch_size, len(data.train_labels))
        count = training.members * self._settings.replicates
        devices = jax.devices()[:count]
        init = partial(
            ensemble.init_ensemble,
            network=training.network,
            optimizer=training.optimizer,
            # Devices get equally many members; those too many are left out of all that follows.
            ensemble_size=-(-count // len(devices)) * len(devices),
            loss_fn=squared_error if data.is_regression else cross_entropy,
        )
        on_members = NamedSharding(Mesh(np.array(devices), "member"), PartitionSpec("member"))
        everywhere = NamedSharding(on_members.mesh, PartitionSpec())
        key = jax.eval_shape(lambda: jax.random.key(0))
        inputs = _abstract(data.train_inputs, everywhere)
        labels = _abstract(data.train_labels, everywhere)
        example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype, sharding=everywhere)
        lowered = jax.jit(
            lambda key, inputs: init(key, inputs=inputs), out_shardings=on_members
        ).lower(key, example)
        state = jax.eval_shape(lambda key, inputs: init(key, inputs=inputs), key, example)
        facts = _costs(state, inputs, labels, batch_size)
        state = jax.tree.map(lambda leaf: _abstract(leaf, on_members), state)
        fit_epoch = jax.jit(
            partial(ensemble.fit_ensemble, num_epochs=1, batch_size=batch_size),
            out_shardings=(on_members, on_members),
        ).lower(key, state, inputs, labels)
        # It runs once: to optimize it would take longer than to run it.
        options: dict[str, Any] = {"xla_backend_optimization_level": 0}
        return _Programs(
            init=lowered.compile(compiler_options=options),
            fit_epoch=fit_epoch.compile(),
            facts=facts,
        )


def _abstract(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def first_members(variables: Variables, count: int) -> Variables:
    """The first members of an ensemble, sliced on the host: nothing to compile."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], variables)


def _arrays(state: TrainState) -> dict[str, Any]:
    """What of a state changes in training."""
    return {"variables": state.variables, "opt_state": state.opt_state, "step": state.step}


def _better(
    loss: Sequence[float], best_loss: Sequence[float], variables: Variables, best: Variables
) -> Variables:
    """Of each member the variables with the smaller loss."""
    better = np.asarray(loss) < np.asarray(best_loss)

    def choose(new: Any, old: Any) -> np.ndarray:
        return np.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, variables, best)


def _costs(
    state: TrainState,
    inputs: jax.ShapeDtypeStruct,
    labels: jax.ShapeDtypeStruct,
    batch_size: int,
) -> dict[str, Any]:
    """The facts of a training before its first step: of one network, unless said otherwise."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    batch = tuple(
        jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        for array in (inputs, labels)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step_flops = count_flops(train_step, key, member, batch)
    leaves = jax.tree.leaves(member.variables)
    return {
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(member.variables["params"])),
        "num_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "epoch_flops": step_flops * (inputs.shape[0] // batch_size),
        "train_seconds": 0.0,  # Of all networks.
        "epochs": [],
        "train": [],
        "test": [],
    }


def member_losses(network: Network, variables: Variables, inputs: Any, labels: Any) -> list[float]:
    """The mean loss of each member: NLL, or squared error."""
    losses = _losses(network, variables, jnp.asarray(inputs), jnp.asarray(labels))
    of_training = losses["nll"] if "nll" in losses else losses["mse"]
    return np.asarray(of_training.mean(1), float).tolist()


def mean_losses(
    network: Network, variables: Variables, inputs: Any, labels: Any
) -> dict[str, float]:
    """Mean scores over members and examples."""
    losses = _losses(network, variables, jnp.asarray(inputs), jnp.asarray(labels))
    return {name: float(values.mean()) for name, values in losses.items()}
