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

from jdrop.network import Network, Variables
from jdrop.study.analyses import LearningCurve
from jdrop.study.checkpoints import Checkpoints
from jdrop.study.data import (
    Dataset,
    Progress,
    is_too_large,
    shapes_of,
    take,
)
from jdrop.study.diverged import check_some_are_left, mark_diverged
from jdrop.study.errors import RunError
from jdrop.study.metric_streams import EpochMetrics, MetricStream
from jdrop.study.models import RATE
from jdrop.study.programs import Programs, compile_programs
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.slices import MissingSlicesError, NetworkRange, Slices, divide
from jdrop.study.training_losses import mean_losses
from jdrop.train import TrainState

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
        losses: `losses(epoch, variables)`: scores of all networks, as JSON holds them.
        is_enough: `is_enough(scores)`: whether training may end, from all scores so far.
        min_epochs: training does not end before so many epochs.
    """

    rows: Callable[[int], np.ndarray]
    epochs: tuple[int, ...]
    losses: Callable[[int, Variables], Any]
    is_enough: Callable[[list[Any]], bool]
    min_epochs: int = 0


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


class Trainer:
    """Trains networks; compiles equal programs once.

    Args:
        run_folder: keeps the checkpoints, and the slices of several processes.
        settings: gives the replicates, the batch size and the seed.
        progress: is called as the work goes on.
        metric_streams: take the metrics of every epoch.

    Attributes:
        missing: by training, the networks that were not trained, since their processes have ended.
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
        self._programs: dict[Any, Programs] = {}
        self.missing: dict[str, str] = {}

    def compile_programs(self, work: Sequence[tuple[NetworkSpec, Dataset]]) -> None:
        """Compiles the programs for these networks and data, several at a time."""
        processes = self._run_folder.processes
        sizes = []
        for spec, data in work:
            count = spec.members * self._settings.replicates
            ranges = divide(count, processes.count, self._min_first(spec))
            sizes += [(spec, data, len(networks)) for networks in ranges[processes.index :][:1]]
        self._compile(sizes)

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
    ) -> TrainedNetworks | None:
        """Trains all members of all replicates, from the last checkpoint if there is one.

        Where several processes share the run, each trains and stores its slice of the networks, and
        process 0 joins them.

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

        Returns:
            None in every process but the first; and there too if another process has ended before
            it stored its slice, which `missing` then names.

        Raises:
            jdrop.study.diverged.DivergedError: recorded networks of a replicate all have losses
                that are not finite. Other networks that diverge are marked by `mark_diverged`.
            UserError: a mistake of the user, such as this one, has ended process 0.
        """
        count = spec.members * self._settings.replicates
        slices = Slices(self._run_folder, checkpoint, count, self._min_first(spec))
        if not slices.own:
            return None
        kept_at = sorted({*(stops or (spec.epochs,))})
        if validation is not None:
            # Processes score each other's networks, so they keep those of all candidates.
            kept_at = [] if slices.is_whole else list(validation.epochs)
        training = _Training(spec, data, slices, description, tuple(kept_at), validation, rate)
        try:
            return self._fit_slices(key, training)
        except RunError as error:
            if self._run_folder.is_complete(slices.part):
                return None  # Process 0 is done with it, and has removed the slices.
            if not isinstance(error, MissingSlicesError):
                raise
            self.missing[checkpoint] = str(error)
            return None

    def _fit_slices(self, key: Array, training: "_Training") -> TrainedNetworks | None:
        slices, spec, validation = training.slices, training.spec, training.validation
        inputs, labels = training.data.train_inputs, training.data.train_labels
        self._compile([(spec, training.data, len(networks)) for networks in slices.own])
        if not is_too_large(inputs):
            # What a sweep chooses of a large stream may be small: `take` reads it.
            inputs, labels = jax.tree.map(jnp.asarray, (take(inputs, slice(None)), labels))
        fits = [self._begin(jax.random.clone(key), training, networks) for networks in slices.own]
        scored: list[Any] = []
        for end in training.ends:
            for fit in fits:
                if self._run_folder.is_complete(slices.part):
                    return None  # Process 0 is done with it.
                if validation is None and slices.is_stored(fit.networks):
                    continue
                self._train_until(end, fit, training, inputs, labels)
                if not slices.is_whole:
                    _store_slice(end, fit, training)
            if validation is None:
                continue
            candidates = training.candidates(end)
            if slices.is_whole:
                scored = fits[0].log.validation[: len(candidates)]
            else:
                like = fits[0].state.variables
                scored = slices.scores(candidates, like, validation.losses)
            if validation.is_enough(scored):
                # The epochs that are left would not be better.
                self._progress(f"training {training.description}", end, end)
                break
        if not self._run_folder.processes.is_first:
            return None
        kept, log = fits[0].kept, fits[0].log
        if validation is not None:
            kept, log = {}, dataclasses.replace(log, validation=scored)
        elif not slices.is_whole:
            kept, logs = slices.join(kept)
            log = _join_logs(logs, slices.ranges)
            self._check_some_are_left(log, training)
        programs, replicates = fits[0].programs, self._settings.replicates
        in_order = bool(spec.weight_decays)
        return TrainedNetworks(
            variables={
                int(stop): mark_diverged(variables, log.diverged, replicates, in_order=in_order)
                for stop, variables in kept.items()
            },
            num_networks=slices.num_networks,
            num_parameters=programs.num_parameters,
            num_bytes=programs.num_bytes,
            epoch_flops=programs.epoch_flops,
            epoch_seconds=log.train_seconds / max(fits[0].done, end),
            log=log,
        )

    def _begin(self, key: Array, training: "_Training", networks: NetworkRange) -> "_Fit":
        """The networks of a slice as the last checkpoint holds them, or before their first step."""
        spec, count = training.spec, len(networks)
        programs = self._programs[_program_key(spec, training.data, count)]
        init_key, fit_key = jax.random.split(key)
        indices = networks.start + np.arange(programs.num_networks, dtype=np.int32)
        example = jax.tree.map(jnp.asarray, take(training.data.train_inputs, slice(1)))
        state = programs.init(init_key, indices, example)
        if training.rate is not None:
            rates = np.full(state.step.shape, training.rate, np.float32)
            state.variables[RATE] = jax.device_put(rates, state.step.sharding)
        if spec.weight_decays:
            decays = np.repeat(np.asarray(spec.weight_decays), self._settings.replicates)
            decays = decays[networks.start : networks.stop]
            decays = np.resize(decays, state.step.shape).astype(np.float32)
            decays = jax.device_put(decays, state.step.sharding)
            state.opt_state.hyperparams["weight_decay"] = decays
        # A checkpoint has the same structure at every epoch, so a place for each stop.
        kept = {str(stop): first_members(state.variables, count) for stop in training.kept_at}
        log, done = TrainingLog(), 0
        checkpoints = self._run_folder.checkpoints(training.slices.checkpoint_of(networks), count)
        restored = checkpoints.restore({**_changing_arrays(state), "kept": kept})
        if restored is not None:
            done, arrays, stored_log = restored
            log = TrainingLog(**stored_log)
            kept = arrays.pop("kept")
            state = dataclasses.replace(state, **arrays)
        return _Fit(networks, programs, fit_key, state, kept, log, done, checkpoints)

    def _train_until(
        self, end: int, fit: "_Fit", training: "_Training", inputs: Any, labels: Any
    ) -> None:
        """Trains the networks of a slice up to an epoch."""
        spec, data, validation = training.spec, training.data, training.validation
        networks, programs, log = fit.networks, fit.programs, fit.log
        count, is_whole = len(networks), training.slices.is_whole
        indices = networks.start + np.arange(programs.num_networks, dtype=np.int32)
        every_row = np.arange(len(labels), dtype=np.int32)
        rows = np.broadcast_to(every_row, (programs.num_networks, len(labels)))
        interval = max(1, spec.epochs // NUM_EVALUATIONS)
        is_recorded = spec.record and validation is None and networks.start == 0
        name = training.slices.checkpoint_of(networks)
        for stream in self._metric_streams:
            stream.begin(name, fit.done)
        with fit.checkpoints.saving() as update:
            for epoch in range(fit.done + 1, end + 1):
                if validation is not None:
                    own_rows = validation.rows(epoch)[networks.start : networks.stop]
                    rows = np.resize(own_rows, rows.shape).astype(np.int32)
                start = time.perf_counter()
                key = jax.random.clone(fit.key)
                fit.state, losses = jax.block_until_ready(
                    programs.fit_epoch(key, indices, fit.state, inputs, labels, rows)
                )
                seconds = time.perf_counter() - start
                log.train_seconds += seconds
                metrics = EpochMetrics(name, epoch, seconds, np.asarray(losses)[:count, 0])
                is_finite = np.isfinite(metrics.losses)
                log.diverged = sorted({*log.diverged, *np.flatnonzero(~is_finite).tolist()})
                if is_whole:
                    self._check_some_are_left(log, training)
                if is_recorded and _is_recorded(epoch, interval, end):
                    log.epochs.append(epoch)
                    score = partial(
                        mean_losses,
                        spec.network,
                        first_members(fit.state.variables, self._settings.replicates),
                        output_bytes=data.output_bytes,
                    )
                    log.train.append(score(inputs, labels))
                    log.test.append(score(data.test_inputs, data.test_labels))
                    metrics.scores.update(train=log.train[-1], test=log.test[-1])
                if validation is not None and is_whole and epoch in validation.epochs:
                    scores = validation.losses(epoch, first_members(fit.state.variables, count))
                    log.validation.append(scores)
                    metrics.scores.update(validation=scores)
                for stream in self._metric_streams:
                    stream.write(metrics)
                if str(epoch) in fit.kept:
                    fit.kept[str(epoch)] = first_members(fit.state.variables, count)
                fit.done = epoch
                arrays = {**_changing_arrays(fit.state), "kept": dict(fit.kept)}
                update(epoch, arrays, dataclasses.asdict(log))
                self._progress(f"training {training.description}", epoch, training.last_epoch)
                self._run_folder.locks.check_first()

    def _check_some_are_left(self, log: TrainingLog, training: "_Training") -> None:
        """Raises if recorded networks of a replicate have all diverged."""
        if training.spec.record and training.validation is None:
            count, replicates = training.slices.num_networks, self._settings.replicates
            check_some_are_left(log.diverged, count, replicates, training.description)

    def _min_first(self, spec: NetworkSpec) -> int:
        """How many networks the first slice has at least.

        Its process records the scores of the first member of each replicate.
        """
        return self._settings.replicates if spec.record else 1

    def _compile(self, work: Sequence[tuple[NetworkSpec, Dataset, int]]) -> None:
        """Compiles the programs that train so many networks together."""
        missing = {_program_key(*item): item for item in work}
        missing = {key: item for key, item in missing.items() if key not in self._programs}

        def compile_item(item: tuple[NetworkSpec, Dataset, int]) -> Programs:
            spec, data, count = item
            batch_size = self._settings.batch_size
            return compile_programs(spec.network, spec.optimizer, data, batch_size, count)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(compile_item, missing.values())
            for done, (key, programs) in enumerate(zip(missing, compiled, strict=True), 1):
                self._programs[key] = programs
                self._progress("compiling", done, len(missing))


@dataclass(frozen=True)
class _Training:
    """The networks that are trained for one part, by all processes; see `Trainer.fit_networks`."""

    spec: NetworkSpec
    data: Dataset
    slices: Slices
    description: str
    kept_at: tuple[int, ...]
    validation: Validation | None
    rate: float | None

    @property
    def ends(self) -> list[int]:
        """The epochs after which the training may end."""
        if self.validation is None:
            return [self.kept_at[-1]]
        epochs, first = self.validation.epochs, self.validation.min_epochs
        return [epoch for epoch in epochs if epoch >= first or epoch == epochs[-1]]

    @property
    def last_epoch(self) -> int:
        return self.ends[-1]

    def candidates(self, end: int) -> list[int]:
        """The epochs of the validation up to an epoch."""
        assert self.validation is not None
        return [epoch for epoch in self.validation.epochs if epoch <= end]


@dataclass
class _Fit:
    """The networks of a slice as their training goes on."""

    networks: NetworkRange
    programs: Programs
    key: Array
    state: TrainState
    kept: dict[str, Variables]
    log: TrainingLog
    done: int
    checkpoints: Checkpoints


def _store_slice(end: int, fit: _Fit, training: _Training) -> None:
    """Stores a slice for the other processes; in cross-validation at each candidate up to `end`."""
    slices, log = training.slices, dataclasses.asdict(fit.log)
    if training.validation is None:
        slices.store(fit.networks, fit.kept, log)
        return
    for epoch in training.candidates(end):
        if not slices.is_stored(fit.networks, epoch):
            slices.store(fit.networks, fit.kept[str(epoch)], log, epoch)


def _join_logs(logs: Sequence[dict[str, Any]], ranges: Sequence[NetworkRange]) -> TrainingLog:
    """The log of all networks. The first slice has recorded the scores; times are added."""
    diverged = [
        networks.start + index
        for log, networks in zip(logs, ranges, strict=True)
        for index in log["diverged"]
    ]
    seconds = sum(log["train_seconds"] for log in logs)
    return TrainingLog(**{**logs[0], "diverged": diverged, "train_seconds": seconds})


def _program_key(spec: NetworkSpec, data: Dataset, num_networks: int) -> Any:
    """Everything that a compiled program depends on."""
    shapes = shapes_of(data.train_inputs), data.train_labels
    leaves, tree = jax.tree.flatten(shapes)
    arrays = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return spec.network, spec.optimizer, num_networks, tree, arrays


def _is_recorded(epoch: int, interval: int, last_epoch: int) -> bool:
    """Whether the learning curve has a point at this epoch."""
    return epoch % interval == 0 or epoch in (1, last_epoch)


def _changing_arrays(state: TrainState) -> dict[str, Any]:
    """The fields of a state that training changes."""
    return {"variables": state.variables, "opt_state": state.opt_state, "step": state.step}


def first_members(variables: Variables, count: int) -> Variables:
    """The first members of an ensemble, sliced on the host: nothing to compile."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], variables)
