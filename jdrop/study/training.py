"""Trains many networks at once, with checkpoints.

Of R replicates, member `i` of replicate `r` is network `i R + r`, so additional members do not
change the others.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdrop import ensemble
from jdrop.convolutions import has_convolution
from jdrop.network import Network, Variables
from jdrop.study.analyses import LearningCurve
from jdrop.study.data import (
    Dataset,
    Progress,
    is_too_large,
    shapes_of,
    take,
)
from jdrop.study.data.streams import with_length, with_sharding
from jdrop.study.diverged import check_some_are_left, mark_diverged
from jdrop.study.metric_streams import EpochMetrics, MetricStream
from jdrop.study.models import RATE
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.streaming import compile_streamed_epoch
from jdrop.study.training_losses import loss_fn_of, mean_losses
from jdrop.train import TrainState, train_step

NUM_EVALUATIONS = 25  # Points of a learning curve over the epochs of the settings.


@dataclass(frozen=True)
class NetworkSpec:
    """Networks to train together.

    Attributes:
        network: the architecture.
        members: how many networks each replicate has.
        epochs: passes over the training examples.
        optimizer: any optax optimizer; one with the hyperparameter `weight_decay`, as
            `optax.inject_hyperparams` makes it, where `weight_decays` are given.
        weight_decays: one for each member.
        record: whether scores are recorded during the training, and training outputs after it.
    """

    network: Network
    members: int
    epochs: int
    optimizer: optax.GradientTransformation
    weight_decays: tuple[float, ...] = ()
    record: bool = False


@dataclass
class TrainingLog:
    """What a training records as it goes on.

    Attributes:
        train_seconds: of all networks together.
        epochs: at which scores were recorded.
        train: by recorded epoch, mean training scores of the first member of each replicate.
        test: the same for the test examples.
        validation: by checked epoch, what `Validation.losses` returned.
        diverged: the indices of networks whose losses were NaN or infinite.
    """

    train_seconds: float = 0.0
    epochs: list[int] = field(default_factory=list)
    train: list[dict[str, float]] = field(default_factory=list)
    test: list[dict[str, float]] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)

    @property
    def learning_curve(self) -> LearningCurve | None:
        """The recorded scores, by name; None if nothing was recorded."""
        if not self.epochs:
            return None

        def curves(scores: list[dict[str, float]]) -> dict[str, list[float]]:
            return {name: [values[name] for values in scores] for name in scores[0]}

        return LearningCurve(self.epochs, curves(self.train), curves(self.test))


@dataclass(frozen=True)
class Validation:
    """How networks are scored on examples that they don't train on, as their training goes on.

    Attributes:
        rows: `rows(epoch)`: the examples of each network's epoch, `[network, row]`.
        epochs: after which the networks are scored, rising; training ends with the last.
        losses: `losses(variables)`: scores of all networks, as JSON holds them.
        is_enough: `is_enough(scores)`: whether training may end, from all scores so far.
    """

    rows: Callable[[int], np.ndarray]
    epochs: tuple[int, ...]
    losses: Callable[[Variables], Any]
    is_enough: Callable[[list[Any]], bool]


@dataclass(frozen=True)
class TrainedNetworks:
    """Networks after their training.

    Attributes:
        variables: by a count of epochs, those of all members of all replicates after so many
            epochs, with a leading axis.
        num_networks: how many there are.
        num_parameters: of one network.
        num_bytes: of the variables of one network.
        epoch_flops: floating-point operations in an epoch of one network.
        epoch_seconds: of an epoch of all networks together, a mean.
        log: what the training recorded.
    """

    variables: dict[int, Variables]
    num_networks: int
    num_parameters: int
    num_bytes: int
    epoch_flops: float
    epoch_seconds: float
    log: TrainingLog


@dataclass(frozen=True)
class _Programs:
    """The compiled programs that train networks of one spec on data of one shape."""

    init: Any
    fit_epoch: Any
    num_parameters: int
    num_bytes: int
    epoch_flops: float


class Trainer:
    """Trains networks; compiles equal programs once.

    Args:
        run_folder: keeps the checkpoints.
        settings: gives the replicates, the batch size and the seed.
        progress: is called as the work goes on.
        metric_streams: take the metrics of every epoch.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        settings: Settings,
        progress: Progress,
        metric_streams: Sequence[MetricStream] = (),
    ) -> None:
        self._run_folder, self._settings, self._progress = run_folder, settings, progress
        self._metric_streams = metric_streams
        self._programs: dict[Any, _Programs] = {}

    def compile_programs(self, work: Sequence[tuple[NetworkSpec, Dataset]]) -> None:
        """Compiles the programs for these networks and data, several at a time."""
        missing = {_program_key(spec, data): (spec, data) for spec, data in work}
        missing = {key: pair for key, pair in missing.items() if key not in self._programs}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda pair: self._compile(*pair), missing.values())
            for done, (key, programs) in enumerate(zip(missing, compiled, strict=True), 1):
                self._programs[key] = programs
                self._progress("compiling", done, len(missing))

    def fit_networks(
        self,
        key: Array,
        spec: NetworkSpec,
        data: Dataset,
        *,
        checkpoint: str,
        description: str,
        stops: Sequence[int] = (),
        validation: Validation | None = None,
        rate: float | None = None,
    ) -> TrainedNetworks:
        """Trains all members of all replicates, from the last checkpoint if there is one.

        Args:
            key: consumed.
            spec: the networks.
            data: the examples.
            checkpoint: the part that the checkpoints are for, or `PART/NAME` if the part needs
                several trainings. They stay until the part is stored.
            description: of the networks, for the progress.
            stops: counts of epochs after which the networks are kept; training ends with the
                largest. By default the epochs of the spec.
            validation: scores the networks on examples that they don't train on. No networks are
                kept then.
            rate: for a network whose variables hold its rate.

        Raises:
            jdrop.study.diverged.DivergedError: recorded networks of a replicate all have losses
                that are not finite. Other networks that diverge are marked by `mark_diverged`.
        """
        self.compile_programs([(spec, data)])
        programs = self._programs[_program_key(spec, data)]
        replicates = self._settings.replicates
        init_key, fit_key = jax.random.split(key)
        inputs, labels = data.train_inputs, data.train_labels
        state = programs.init(init_key, jax.tree.map(jnp.asarray, take(inputs, slice(1))))
        if not is_too_large(inputs):
            # What a sweep chooses of a large stream may be small: `take` reads it.
            inputs, labels = jax.tree.map(jnp.asarray, (take(inputs, slice(None)), labels))
        if rate is not None:
            rates = np.full(state.step.shape, rate, np.float32)
            state.variables[RATE] = jax.device_put(rates, state.step.sharding)
        if spec.weight_decays:
            decays = np.repeat(np.asarray(spec.weight_decays), replicates)
            decays = np.resize(decays, state.step.shape).astype(np.float32)
            decays = jax.device_put(decays, state.step.sharding)
            state.opt_state.hyperparams["weight_decay"] = decays
        count = spec.members * replicates
        stops = sorted({*(stops or (spec.epochs,))}) if validation is None else []
        last_epoch = stops[-1] if validation is None else validation.epochs[-1]
        # A checkpoint has the same structure at every epoch, so a place for each stop.
        kept = {str(stop): first_members(state.variables, count) for stop in stops}
        log, done = TrainingLog(), 0
        checkpoints = self._run_folder.checkpoints(checkpoint, count)
        restored = checkpoints.restore({**_changing_arrays(state), "kept": kept})
        if restored is not None:
            done, arrays, stored_log = restored
            log = TrainingLog(**stored_log)
            kept = arrays.pop("kept")
            state = dataclasses.replace(state, **arrays)
        for stream in self._metric_streams:
            stream.begin(checkpoint, done)

        every_row = np.arange(len(labels), dtype=np.int32)
        rows = np.broadcast_to(every_row, (*state.step.shape, len(labels)))
        interval = max(1, spec.epochs // NUM_EVALUATIONS)
        with checkpoints.saving() as update:
            for epoch in range(done + 1, last_epoch + 1):
                if validation is not None:
                    if log.validation and validation.is_enough(log.validation):
                        break
                    rows = np.resize(validation.rows(epoch), rows.shape).astype(np.int32)
                start = time.perf_counter()
                state, losses = jax.block_until_ready(
                    programs.fit_epoch(jax.random.clone(fit_key), state, inputs, labels, rows)
                )
                seconds = time.perf_counter() - start
                log.train_seconds += seconds
                epoch_losses, scores = np.asarray(losses)[:count, 0], {}
                is_finite = np.isfinite(epoch_losses)
                log.diverged = sorted({*log.diverged, *np.flatnonzero(~is_finite).tolist()})
                if spec.record and validation is None:
                    check_some_are_left(log.diverged, count, replicates, description)
                if spec.record and validation is None and _is_recorded(epoch, interval, last_epoch):
                    log.epochs.append(epoch)
                    score = partial(
                        mean_losses,
                        spec.network,
                        first_members(state.variables, replicates),
                        output_bytes=data.output_bytes,
                    )
                    log.train.append(score(inputs, labels))
                    log.test.append(score(data.test_inputs, data.test_labels))
                    scores = {"train": log.train[-1], "test": log.test[-1]}
                if validation is not None and epoch in validation.epochs:
                    log.validation.append(validation.losses(first_members(state.variables, count)))
                    scores = {"validation": log.validation[-1]}
                for stream in self._metric_streams:
                    stream.write(EpochMetrics(checkpoint, epoch, seconds, epoch_losses, scores))
                if str(epoch) in kept:
                    kept[str(epoch)] = first_members(state.variables, count)
                done = epoch
                arrays = {**_changing_arrays(state), "kept": dict(kept)}
                update(epoch, arrays, dataclasses.asdict(log))
                self._progress(f"training {description}", epoch, last_epoch)
        in_order = bool(spec.weight_decays)
        return TrainedNetworks(
            variables={
                int(stop): mark_diverged(variables, log.diverged, replicates, in_order=in_order)
                for stop, variables in kept.items()
            },
            num_networks=count,
            num_parameters=programs.num_parameters,
            num_bytes=programs.num_bytes,
            epoch_flops=programs.epoch_flops,
            epoch_seconds=log.train_seconds / done,
            log=log,
        )

    def _compile(self, spec: NetworkSpec, data: Dataset) -> _Programs:
        batch_size = min(self._settings.batch_size, len(data.train_labels))
        count = spec.members * self._settings.replicates
        devices = jax.devices()[:count]
        mesh = Mesh(np.array(devices), "member")
        init = partial(
            ensemble.init_ensemble,
            network=spec.network,
            optimizer=spec.optimizer,
            # Rounded up to a multiple of the devices; surplus members are discarded.
            ensemble_size=-(-count // len(devices)) * len(devices),
            loss_fn=loss_fn_of(data),
            mesh=mesh,
        )
        on_members = NamedSharding(mesh, PartitionSpec("member"))
        replicated = NamedSharding(mesh, PartitionSpec())
        key = jax.eval_shape(lambda: jax.random.key(0))
        inputs = with_sharding(shapes_of(data.train_inputs), replicated)
        labels = with_sharding(data.train_labels, replicated)
        example = with_sharding(with_length(inputs, 1), replicated)
        lowered_init = jax.jit(
            lambda key, inputs: init(key, inputs=inputs), out_shardings=on_members
        ).lower(key, example)
        state = jax.eval_shape(lambda key, inputs: init(key, inputs=inputs), key, example)
        step_flops, num_parameters, num_bytes = _costs(state, inputs, labels, batch_size)
        state = with_sharding(state, on_members)
        rows = jax.ShapeDtypeStruct(
            (*state.step.shape, len(data.train_labels)), np.int32, sharding=on_members
        )

        batching = batching_by_rule(spec.network, state.variables, example)
        compile_epoch = (
            compile_streamed_epoch if is_too_large(data.train_inputs) else _compile_epoch
        )
        # Runs once: optimizing the program takes longer than running it.
        options: dict[str, Any] = {"xla_backend_optimization_level": 0}
        return _Programs(
            init=lowered_init.compile(compiler_options=options),
            fit_epoch=compile_epoch(key, state, inputs, labels, rows, batch_size, batching),
            num_parameters=num_parameters,
            num_bytes=num_bytes,
            epoch_flops=step_flops * (len(data.train_labels) // batch_size),
        )


def _compile_epoch(
    key: Any, state: Any, inputs: Any, labels: Any, rows: Any, batch_size: int, batching: str
) -> Callable[..., Any]:
    """An epoch of all networks on data that the device holds."""
    sharding = rows.sharding

    def fit_epoch(key: Array, state: TrainState, inputs: Any, labels: Array, rows: Array) -> Any:
        return ensemble.fit_ensemble(
            key,
            state,
            inputs,
            labels,
            num_epochs=1,
            batch_size=batch_size,
            rows=rows,
            batching=batching,
            mesh=sharding.mesh,
        )

    lowered = jax.jit(fit_epoch, out_shardings=sharding).lower(key, state, inputs, labels, rows)
    return lowered.compile()


def batching_by_rule(network: Network, variables: Variables, inputs: Any) -> str:
    """How a device trains its members: "scan" for convolutions on a CPU, "vmap" otherwise.

    Batched convolutions are several times slower on a CPU. The choice is by rule, not by time, so
    that a run can be repeated exactly.

    Args:
        network: the architecture.
        variables: shapes and dtypes of all members.
        inputs: shapes and dtypes of an example batch.
    """
    if jax.default_backend() != "cpu":
        return "vmap"
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)

    def predict(variables: Variables, inputs: Any) -> Any:
        return network(variables, inputs, None)

    return "scan" if has_convolution(predict, member, inputs) else "vmap"


def _program_key(spec: NetworkSpec, data: Dataset) -> Any:
    """Everything that a compiled program depends on."""
    shapes = shapes_of(data.train_inputs), data.train_labels
    leaves, tree = jax.tree.flatten(shapes)
    arrays = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return spec.network, spec.optimizer, spec.members, tree, arrays


def _is_recorded(epoch: int, interval: int, last_epoch: int) -> bool:
    """Whether the learning curve has a point at this epoch."""
    return epoch % interval == 0 or epoch in (1, last_epoch)


def _changing_arrays(state: TrainState) -> dict[str, Any]:
    """The fields of a state that training changes."""
    return {"variables": state.variables, "opt_state": state.opt_state, "step": state.step}


def _costs(
    state: TrainState,
    inputs: Any,
    labels: jax.ShapeDtypeStruct,
    batch_size: int,
) -> tuple[float, int, int]:
    """FLOPs of a training step, parameters, and bytes of the variables, of one network."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype),
        (inputs, labels),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(member.variables["params"]))
    leaves = jax.tree.leaves(member.variables)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return count_flops(train_step, key, member, batch), num_parameters, num_bytes


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a call, as the compiler counts them."""
    lowered = jax.jit(function).lower(*args)
    # Some backends count only what they have compiled.
    analysis: Any = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return float(analysis["flops"])


def first_members(variables: Variables, count: int) -> Variables:
    """The first members of an ensemble, sliced on the host: nothing to compile."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], variables)
