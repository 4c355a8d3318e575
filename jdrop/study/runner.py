"""Goes through a comparison part by part, and keeps what is predicted in the folder of the run.

Nothing is scored here: `jdrop.study.evaluation` does that with what is kept.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jdrop import inference
from jdrop.functional import apply_mask
from jdrop.network import Network, Variables, network_log_probs
from jdrop.study import theory
from jdrop.study.data import Dataset, subset, with_label_noise
from jdrop.study.methods import MLP, TRAININGS, Model, ModelError, Settings, Training, trainings
from jdrop.study.run import Part, Run, versions
from jdrop.study.training import (
    Progress,
    Trained,
    Trainer,
    check_finite,
    count_flops,
    example_losses,
    first_members,
    predict,
)

ENUMERATED_UNITS = (6, 6)  # Two layers: of one, weight scaling is exactly the geometric mean.
ENUMERATED_RATE = 0.5
MAX_ENUMERATED_EXAMPLES = 2000

TRAIN_SHARES = (0.125, 0.25, 0.5)
"""Of the training examples, at which overfitting is looked at, beside all of them."""


class Runner:
    """Runs what a folder does not hold yet.

    Args:
        run: where everything is kept.
        settings: how much is trained.
        model: the architecture.
        data: the examples.
        progress: told how the work goes on.
        sweep: by parameter ("rate", "train_size", "width_factor", "label_noise"), its values.
        command: what began it, for the report.

    Raises:
        ModelError: a model that does not fit the data or the sweep, or draws no mask.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        model: Model,
        data: Dataset,
        progress: Progress,
        sweep: Mapping[str, Sequence[float]],
        command: str,
    ) -> None:
        check_model(model, data, sweep)
        self._run, self._settings, self._model, self._data = run, settings, model, data
        self._progress, self._sweep, self._command = progress, sweep, command
        self._train = Trainer(run, settings, progress)
        self._adam = optax.adam(settings.learning_rate)
        # Test inputs and those of another kind are read in one pass.
        both = [data.test_inputs] + ([] if data.ood_inputs is None else [data.ood_inputs])
        self._read_inputs = jnp.asarray(np.concatenate(both))

    def __call__(self) -> None:
        """Trains and reads what is missing."""
        start = time.perf_counter()
        self._part("data", self._about_data)
        settings = self._settings
        kinds, left_out = trainings(settings, self._model, self._data.train_inputs[:1])
        missing = [training for training in kinds if self._run.part(training.name) is None]
        self._train.compile([(training, self._data) for training in missing])
        for training in kinds:
            self._part(training.name, partial(self._kind, training))
        if settings.theory:
            self._part("overfitting", self._overfitting)
        else:
            left_out.append("The claims of the theory were not asked for.")
        if settings.theory and not self._data.is_regression:
            self._part("exact", self._exact)
        if self._sweep:
            self._part("sweep", self._sweeping)
        facts = {
            "command": self._command,
            "left_out": left_out,
            "versions": versions(),
            "seconds": {"this run": time.perf_counter() - start},
        }
        self._part("run", lambda: Part({}, facts))

    def _part(self, name: str, compute: Callable[[], Part]) -> None:
        if self._run.part(name) is None:
            self._run.keep(name, compute())

    def _child(self, name: str) -> Array:
        return jax.random.fold_in(jax.random.key(self._settings.seed), TRAININGS.index(name))

    def _about_data(self) -> Part:
        data = self._data
        facts = {
            "name": data.name,
            "task": "regression" if data.is_regression else "classification",
            "train_size": len(data.train_labels),
            "test_size": len(data.test_labels),
            "num_classes": data.num_classes,
            "label_noise": data.label_noise,
            "target_mean": data.target_mean,
            "target_scale": data.target_scale,
            "ood_name": data.ood_name,
        }
        return Part({"test_labels": data.test_labels, "train_labels": data.train_labels}, facts)

    def _kind(self, training: Training) -> Part:
        """Trains one kind of network and reads it."""
        train_key, read_key = jax.random.split(self._child(training.name))
        trained = self._train(train_key, training, f"{training.name} networks", self._data)
        network, variables = training.network, trained.variables
        replicates = self._settings.replicates
        if training.name == "masksembles":
            network = self._model.masked(None)
            variables = _one_mask_each(variables, self._settings.budget)
        arrays: dict[str, np.ndarray] = {}
        facts = trained.facts
        arrays |= self._read("", network, variables)
        facts |= self._reading_costs(network, variables)
        firsts = first_members(variables, replicates)
        if training.validate:
            # Members of one weight decay stand together; those without any are the first.
            best = first_members(trained.best_variables, replicates)
            arrays |= self._read("early_", network, best)
        if training.watch:
            arrays["train_outputs"] = self._outputs(network, variables, self._data.train_inputs)
            if self._settings.theory:
                co_key, read_key = jax.random.split(read_key)
                facts["co_adaptation"] = self._co_adaptation(co_key, firsts)
        if training.name == "dropout":
            sampled, costs = self._monte_carlo(read_key, network, firsts)
            arrays |= sampled
            facts |= costs
        return Part(arrays, facts)

    def _outputs(self, network: Network, variables: Variables, inputs: Any) -> np.ndarray:
        """What the networks predict, `[replicate, member, example, ...]`."""
        outputs = predict(
            None, network, variables, jnp.asarray(inputs), regression=self._data.is_regression
        )
        array = np.asarray(outputs)
        check_finite(np.isnan(array).any(tuple(range(1, array.ndim))))
        array = array.reshape(-1, self._settings.replicates, *array.shape[1:])
        return np.ascontiguousarray(array.swapaxes(0, 1))

    def _read(self, prefix: str, network: Network, variables: Variables) -> dict[str, np.ndarray]:
        """The same for test inputs and those of another kind, by name."""
        return self._apart(prefix, self._outputs(network, variables, self._read_inputs))

    def _apart(self, prefix: str, outputs: np.ndarray) -> dict[str, np.ndarray]:
        num_test = len(self._data.test_labels)
        arrays = {f"{prefix}outputs": outputs[:, :, :num_test]}
        if self._data.ood_inputs is not None:
            arrays[f"{prefix}ood_outputs"] = outputs[:, :, num_test:]
        return arrays

    def _reading_costs(self, network: Network, variables: Variables) -> dict[str, float]:
        """Of one example and one network."""
        start = time.perf_counter()
        outputs = jax.block_until_ready(
            predict(
                None, network, variables, self._read_inputs, regression=self._data.is_regression
            )
        )
        seconds = time.perf_counter() - start
        return {
            "predict_seconds": seconds / (outputs.shape[0] * outputs.shape[1]),
            "predict_flops": self._pass_flops(network, variables, None),
        }

    def _pass_flops(self, network: Network, variables: Variables, key: Array | None) -> float:
        """Of one example, as the compiler counts those of a hundred."""
        member = jax.tree.map(lambda leaf: np.asarray(leaf)[0], variables)
        inputs = np.zeros((100, *self._read_inputs.shape[1:]), self._read_inputs.dtype)
        return count_flops(lambda v, x: network(v, x, key), member, inputs) / 100

    def _monte_carlo(
        self, key: Array, network: Network, firsts: Variables
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Reads the first dropout network of each replicate with many masks."""
        num_samples = self._settings.num_samples
        outputs = []
        for sample in range(num_samples):
            if sample == 1:  # The first is compiled.
                start = time.perf_counter()
            sampled = predict(
                jax.random.fold_in(key, sample),
                network,
                firsts,
                self._read_inputs,
                regression=self._data.is_regression,
            )
            outputs.append(np.asarray(sampled))
            self._progress("sampling masks", sample + 1, num_samples)
        seconds = time.perf_counter() - start
        passes = (num_samples - 1) * outputs[0].shape[0] * outputs[0].shape[1]
        costs = {
            "sample_seconds": seconds / passes,
            "sample_flops": self._pass_flops(network, firsts, jax.random.key(0)),
        }
        return self._apart("sampled_", np.stack(outputs, 1)), costs

    def _co_adaptation(self, key: Array, firsts: Variables) -> dict[str, Any]:
        """What the hidden units of the first network of each replicate do."""
        found = theory.measure(
            key,
            self._model.network,
            firsts,
            jnp.asarray(self._data.test_inputs),
            jnp.asarray(self._data.test_labels),
            example_losses,
        )
        return dataclasses.asdict(found)

    def _overfitting(self) -> Part:
        """Trains on fewer examples, with dropout and without, for equally many steps.

        The examples are repeated up to the number of all: so the steps are as many, and the
        programs the same.
        """
        settings, data = self._settings, self._data
        arrays: dict[str, np.ndarray] = {}
        least = max(settings.batch_size, 2 * (data.num_classes or 1))
        sizes = [round(share * len(data.train_labels)) for share in TRAIN_SHARES]
        sizes = [size for size in sizes if size >= least]
        networks = {"plain": self._model.plain, "dropout": self._model.dropout}
        trainings_of = {
            kind: Training(kind, network, 1, settings.epochs, self._adam)
            for kind, network in networks.items()
        }
        self._train.compile([(training, data) for training in trainings_of.values()])
        for size, (kind, training) in product(sizes, trainings_of.items()):
            network = training.network
            chosen = np.flatnonzero(subset(data, size, settings.seed))
            fewer = data.train_on(np.resize(chosen, len(data.train_labels)))
            index = 2 * size + (kind == "dropout")
            key = jax.random.fold_in(self._child("overfitting"), index)
            what = f"{kind} networks on {size} examples"
            variables = self._train(key, training, what, fewer).variables
            prefix = f"{kind}_{size}"
            arrays[f"{prefix}_test"] = self._outputs(network, variables, data.test_inputs)
            train_outputs = self._outputs(network, variables, fewer.train_inputs)
            arrays[f"{prefix}_train"] = train_outputs[:, :, :size]
            arrays[f"labels_{size}"] = data.train_labels[chosen]
        return Part(arrays, {"sizes": sizes})

    def _exact(self) -> Part:
        """Trains small dropout networks and enumerates all of their masks."""
        data = self._data
        num_classes = data.num_classes
        assert num_classes is not None
        model = Model(lambda: MLP(ENUMERATED_UNITS, num_classes, ENUMERATED_RATE))
        training = Training("exact", model.dropout, 1, self._settings.epochs, self._adam)
        what = "small networks to enumerate"
        variables = self._train(self._child("exact"), training, what, data).variables
        inputs = jnp.asarray(data.test_inputs[:MAX_ENUMERATED_EXAMPLES])
        rates = {
            f"Dropout_{layer}": np.full(units, ENUMERATED_RATE)
            for layer, units in enumerate(ENUMERATED_UNITS)
        }

        @jax.jit
        def enumerated(variables: Variables) -> inference.Enumerated:
            def log_probs(masks: dict[str, Array]) -> Array:
                thinned = model.network(
                    lambda name, x, rate: apply_mask(masks[name][None], x, rate)
                )
                return network_log_probs(None, thinned, variables, inputs)

            return inference.enumerate_masks(log_probs, rates)

        averages = jax.lax.map(enumerated, variables)
        arrays = {
            "weight_scaling": predict(None, model.dropout, variables, inputs, regression=False),
            "geometric": averages.geometric,
            "arithmetic": averages.arithmetic,
        }
        num_units = sum(ENUMERATED_UNITS)
        facts = {"num_units": num_units, "num_masks": 2**num_units}
        return Part({name: np.asarray(array) for name, array in arrays.items()}, facts)

    def _sweeping(self) -> Part:
        """Plain ensembles and dropout networks at every place of the grid."""
        names, values = list(self._sweep), list(self._sweep.values())
        cells = [dict(zip(names, at, strict=True)) for at in product(*values)]
        arrays: dict[str, np.ndarray] = {}
        for index, cell in enumerate(cells):
            # Plain networks know no rate: those of the first cell that differs only in it serve.
            alike = [_without_rate(other) == _without_rate(cell) for other in cells]
            first = alike.index(True)
            if first == index:
                trained, network = self._train_at(index, cell, "plain")
                plain = self._outputs(network, trained.variables, self._data.test_inputs)
                arrays[f"plain_{index}"] = plain
            else:
                arrays[f"plain_{index}"] = arrays[f"plain_{first}"]
            trained, network = self._train_at(index, cell, "dropout")
            dropout = self._outputs(network, trained.variables, self._data.test_inputs)
            arrays[f"dropout_{index}"] = dropout
        return Part(arrays, {"cells": cells})

    def _train_at(
        self, index: int, cell: Mapping[str, float], kind: str
    ) -> tuple[Trained, Network]:
        """One kind of network at one place of the grid."""
        settings, data = self._settings, self._data
        if "train_size" in cell:
            data = data.train_on(subset(data, int(cell["train_size"]), settings.seed))
        if "label_noise" in cell:
            data = with_label_noise(data, cell["label_noise"], settings.seed)
        model = self._model.at_width(cell.get("width_factor", 1.0))
        network, rate = (model.plain if kind == "plain" else model.dropout), None
        if kind == "dropout" and "rate" in cell:
            network, holds_rate = model.at_rate(cell["rate"], data.train_inputs[:1])
            rate = cell["rate"] if holds_rate else None
        members = settings.ensemble_size if kind == "plain" else 1
        training = Training(kind, network, members, settings.epochs, self._adam)
        key = jax.random.fold_in(self._child("sweep"), 2 * index + (kind == "dropout"))
        place = ", ".join(f"{name} {value:g}" for name, value in cell.items())
        what = f"{kind} networks at {place}"
        return self._train(key, training, what, data, rate=rate), network


def _without_rate(cell: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in cell.items() if name != "rate"}


def _one_mask_each(variables: Variables, num_masks: int) -> Variables:
    """From those of R Masksembles: R networks with their first mask, R with their second, ..."""
    masks = jax.tree.map(
        lambda mask: np.swapaxes(mask, 0, 1).reshape(-1, *mask.shape[2:]),
        variables["fixed masks"],
    )
    repeated = jax.tree.map(
        lambda leaf: np.tile(leaf, (num_masks, *(1,) * (leaf.ndim - 1))),
        {name: value for name, value in variables.items() if name != "fixed masks"},
    )
    return {**repeated, "fixed masks": masks}


def check_model(model: Model, data: Dataset, sweep: Mapping[str, Sequence[float]]) -> None:
    """Raises the error that a model deserves which cannot be compared on this data."""
    for name in sweep:
        if name in ("rate", "width_factor") and name not in model.changes:
            raise ModelError(
                f"{name} cannot be swept: what makes the model takes no argument {name}."
            )
        least, below, range_ = {
            "rate": (0, 1, "[0, 1)"),
            "label_noise": (0, 1, "[0, 1)"),
            "width_factor": (1e-9, math.inf, "(0, inf)"),
            "train_size": (2, len(data.train_labels) + 1, f"[2, {len(data.train_labels)}]"),
        }[name]
        wrong = [value for value in sweep[name] if not least <= value < below]
        if wrong:
            raise ModelError(f"values of {name} to sweep must lie in {range_}, got {wrong[0]}.")
    inputs = jnp.asarray(data.train_inputs[:16])
    network = model.dropout

    @jax.jit
    def outputs_of(key: Array, inputs: Array) -> list[Array]:
        """Without dropout, and with two masks."""
        init_key, *keys = jax.random.split(key, 3)
        variables = network.init(init_key, inputs)
        return [network(variables, inputs, mask_key) for mask_key in (None, *keys)]

    try:
        outputs, *drawn = outputs_of(jax.random.key(0), inputs)
    except Exception as error:  # Whatever a user's model may raise.
        raise ModelError(
            f"the model cannot take inputs of shape {inputs.shape[1:]}: {error}"
        ) from error
    wanted: tuple[tuple[int | None, ...], ...] = ((len(inputs), data.num_classes),)
    if data.is_regression:
        wanted = ((len(inputs),), (len(inputs), 1))
    if outputs.shape not in wanted:
        raise ModelError(
            f"the model must give outputs of shape {' or '.join(map(str, wanted))} for "
            f"{len(inputs)} examples, got {outputs.shape}."
        )
    if np.array_equal(*drawn):
        raise ModelError(
            "the model draws no mask: two passes with different keys gave the same outputs. Put "
            "jdrop.linen.Dropout or jdrop.nnx.Dropout with a rate above 0 into it, and let its "
            "call take `deterministic` or `train`."
        )
