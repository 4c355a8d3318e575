"""Trains all networks of one kind at once, with checkpoints, and predicts with them.

Member `i` of replicate `r` is number `i R + r` of R replicates: more members leave the others as
they are.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import ensemble, metrics
from jdrop.network import Network, Variables, network_log_probs
from jdrop.study.data import Dataset, subset
from jdrop.study.methods import WEIGHT_DECAYS, Settings, Training
from jdrop.study.run import Run
from jdrop.train import LossFn, TrainState, cross_entropy, train_step

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
    analysis = lowered.cost_analysis() or lowered.compile().cost_analysis()
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


class Trainer:
    """Trains kinds of networks; equal programs are compiled once.

    Args:
        run: where checkpoints are kept.
        settings: how much is trained.
        progress: told how the work goes on.
    """

    def __init__(self, run: Run, settings: Settings, progress: Progress) -> None:
        self._run, self._settings, self._progress = run, settings, progress
        self._compiled: dict[Any, Any] = {}

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
        replicates = self._settings.replicates
        init_key, fit_key = jax.random.split(key)
        validation = None
        if training.validate:
            held_out = subset(data, max(1, len(data.train_labels) // 10), self._settings.seed)
            validation = jnp.asarray(data.train_inputs[held_out]), data.train_labels[held_out]
            data = data.train_on(~held_out)
        inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
        batch_size = min(self._settings.batch_size, len(labels))
        loss_fn: LossFn = squared_error if data.is_regression else cross_entropy
        state = ensemble.init_ensemble(
            init_key,
            training.network,
            training.optimizer,
            inputs[:1],
            ensemble_size=training.members * replicates,
            loss_fn=loss_fn,
        )
        if rate is not None:
            state.variables["rate"] = jnp.full_like(state.variables["rate"], rate)
        if training.validate:
            decays = jnp.repeat(jnp.asarray(WEIGHT_DECAYS), replicates)
            state.opt_state.hyperparams["weight_decay"] = decays
        facts = _costs(state, inputs, labels, batch_size, training.epochs)
        done, best = 0, state.variables
        checkpoints = self._run.checkpoints(what.replace(" ", "-"))
        restored = checkpoints.restore({**_arrays(state), "best": best})
        if restored is not None:
            done, arrays, facts = restored
            best = arrays.pop("best")
            state = dataclasses.replace(state, **arrays)

        fit_epoch = self._compile(fit_key, state, inputs, labels, batch_size)
        interval = max(1, training.epochs // NUM_LOOKS)
        saved = time.perf_counter()
        for epoch in range(done + 1, training.epochs + 1):
            start = time.perf_counter()
            state, losses = jax.block_until_ready(
                fit_epoch(jax.random.clone(fit_key), state, inputs, labels)
            )
            facts["train_seconds"] += time.perf_counter() - start
            check_finite(~jnp.isfinite(losses).all(1))
            if epoch % interval == 0 or epoch in (1, training.epochs):
                if training.watch:
                    facts["epochs"].append(epoch)
                    firsts = jax.tree.map(lambda leaf: leaf[:replicates], state.variables)
                    facts["train"].append(mean_losses(training.network, firsts, inputs, labels))
                    facts["test"].append(
                        mean_losses(training.network, firsts, data.test_inputs, data.test_labels)
                    )
                if validation is not None:
                    loss = member_losses(training.network, state.variables, *validation)
                    best = _where(jnp.asarray(loss) < jnp.asarray(facts["best_loss"]), state, best)
                    facts["best_loss"] = list(map(min, loss, facts["best_loss"]))
                    facts["last_loss"] = loss
            self._progress(f"training {what}", epoch, training.epochs)
            if time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                checkpoints.save(epoch, {**_arrays(state), "best": best}, facts)
                saved = time.perf_counter()
        checkpoints.delete()
        return Trained(state.variables, best, facts)

    def _compile(
        self, key: Array, state: TrainState, inputs: Array, labels: Array, batch_size: int
    ) -> Any:
        """One epoch of training."""
        shapes = (len(state.step), inputs.shape, batch_size)
        which = (state.network, state.optimizer, shapes)
        if which not in self._compiled:
            self._compiled[which] = ensemble.fit_ensemble.lower(
                key, state, inputs, labels, num_epochs=1, batch_size=batch_size
            ).compile()
        return self._compiled[which]


def _arrays(state: TrainState) -> dict[str, Any]:
    """What of a state changes in training."""
    return {"variables": state.variables, "opt_state": state.opt_state, "step": state.step}


def _where(better: Array, state: TrainState, best: Variables) -> Variables:
    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, state.variables, best)


def _costs(
    state: TrainState, inputs: Array, labels: Array, batch_size: int, epochs: int
) -> dict[str, Any]:
    """The facts of a training before its first step: of one network, unless said otherwise."""
    member = jax.tree.map(lambda leaf: leaf[0], state)
    batch = inputs[:batch_size], labels[:batch_size]
    step_flops = count_flops(train_step, jax.random.key(0), member, batch)
    return {
        "num_networks": len(state.step),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(member.variables["params"])),
        "num_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(member.variables)),
        "train_flops": step_flops * (len(labels) // batch_size) * epochs,
        "train_seconds": 0.0,  # Of all networks.
        "epochs": [],
        "train": [],
        "test": [],
        "best_loss": [float("inf")] * len(state.step),
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
