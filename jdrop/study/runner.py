"""Trains and reads everything that a comparison needs, and stores it in the run's folder.

Nothing is scored here: `jdrop.study.evaluation` scores what is stored.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import ensemble, inference
from jdrop.functional import apply_mask
from jdrop.network import DropoutSite, Network, Variables, predict
from jdrop.study import theory
from jdrop.study.baselines import baselines_part, linear_is_left_out
from jdrop.study.data import (
    Dataset,
    Progress,
    chunks,
    groups_of_tokens,
    labels_of_tokens,
    subset,
    take,
    with_label_noise,
)
from jdrop.study.errors import RunError
from jdrop.study.methods import (
    EXACT_KEY_INDEX,
    OVERFITTING_KEY_INDEX,
    SWEEP_KEY_INDEX,
    TUNING_KEY_INDEX,
    LeftOutError,
    Method,
    NetworkGroup,
    adam,
    methods_of,
    network_groups,
)
from jdrop.study.metric_streams import MetricStream
from jdrop.study.models import MLP, Model
from jdrop.study.parts import (
    DataPart,
    ExactPart,
    MethodPredictions,
    NetworksPart,
    SubsetPredictions,
    SummaryPart,
    SweepCell,
    TuningPart,
)
from jdrop.study.predictor import Predictor
from jdrop.study.run_folder import RunFolder, versions
from jdrop.study.settings import Settings
from jdrop.study.slices import delete_slices, require_all, wait_for
from jdrop.study.sweeps import Sweep
from jdrop.study.training import (
    NetworkSpec,
    Trainer,
    first_members,
)
from jdrop.study.training_losses import example_losses
from jdrop.study.tuning import Choice, all_choices, cross_validate, needs_search

ENUMERATED_UNITS = (6, 6)  # With one layer, weight scaling would be exactly the geometric mean.
ENUMERATED_RATE = 0.5
MAX_ENUMERATED_EXAMPLES = 2000

TRAIN_SHARES = (0.125, 0.25, 0.5)
"""Shares of the training examples on which overfitting is measured, besides all of them."""

StoreOnce = Callable[[str, Callable[[], Any]], None]
"""`store_once(name, make_part)` makes and stores a part that the folder does not hold yet.

`make_part` trains, and returns None where other processes make the part, or cannot.
"""


def run_parts(
    run_folder: RunFolder,
    settings: Settings,
    model: Model,
    data: Dataset,
    *,
    sweep: Sweep,
    progress: Progress,
    metric_streams: Sequence[MetricStream] = (),
    command: str,
) -> None:
    """Trains, reads and stores the parts that the folder does not hold yet.

    Check the model and the sweep before, with `check_model` and `check_sweep`. If several processes
    share the run, all train, and process 0 does the rest.

    Args:
        run_folder: stores the parts.
        settings: how many networks are trained, and how.
        model: the architecture.
        data: the examples.
        sweep: the values to sweep; empty for no sweep.
        progress: is called as the work goes on.
        metric_streams: take the metrics of every epoch.
        command: the command or call that began the run, for the report.

    Raises:
        jdrop.study.diverged.DivergedError: all plain or all dropout networks of a
            replicate diverge.
        jdrop.study.errors.RunError: damaged files; another process has ended early.
    """
    start = time.perf_counter()
    trainer, predictor = (
        Trainer(run_folder, settings, progress, metric_streams),
        Predictor(settings, data, progress),
    )
    work = _Work(settings, model, data, trainer, predictor)

    is_first = run_folder.processes.is_first
    stored: list[str] = []

    def store_once(name: str, make_part: Callable[[], Any]) -> None:
        if not run_folder.is_complete(name):
            part = make_part()
            if part is None:
                return
            run_folder.store(name, part)
        if is_first:
            run_folder.checkpoints(name).delete()
            delete_slices(run_folder, name)
            stored.append(name)

    if is_first:
        store_once("data", work.data_part)
        store_once("baselines", partial(baselines_part, data, settings.seed, progress))
    specs, left_out = _specs(settings, model, work.example)
    if sentence := linear_is_left_out(data):
        left_out.append(sentence)
    if data.ood_inputs is None and not data.is_regression:
        left_out.append(
            "There are no out-of-distribution inputs: by default features are shuffled, which "
            "takes one array of floats and one label per example."
        )
    missing = [spec for group, spec in specs if not run_folder.is_complete(group.name)]
    trainer.compile_programs([(spec, data) for spec in missing])
    for group, spec in specs:
        tuning = None
        if needs_search(group, settings):
            name = f"tuning-{group.name}"
            store_once(name, partial(work.tuning_part, group, spec, run_folder))
            if not is_first and name not in trainer.missing:
                wait_for(run_folder, name, process=0)
            if (tuning := run_folder.load(name, TuningPart)) is None:
                continue  # A process has ended, so nothing was chosen.
        store_once(group.name, partial(work.networks_part, group, spec, tuning))
    if settings.theory:
        work.store_subsets(store_once)
    else:
        left_out.append("The claims of the theory were not asked for.")
    if settings.theory and data.has_features and not data.is_regression and not data.is_per_token:
        store_once("exact", work.exact_part)
    elif settings.theory and not data.is_regression:
        left_out.append(
            "All masks of a small network were not enumerated: that network takes one array of "
            "floats and one label per example."
        )
    work.store_sweep(store_once, run_folder, sweep)
    if trainer.missing:
        raise RunError(
            f"processes have ended before they had trained their networks. These are missing: "
            f"{'; '.join(trainer.missing.values())}. All that was trained is kept. Give the same "
            "command again, with any number of processes: the run goes on from there."
        )
    if not is_first:
        # All processes end alike, also if process 0 fails while it predicts.
        require_all(run_folder, ["summary"])
        return
    seconds = {"this run": time.perf_counter() - start}
    machine = versions(run_folder.processes.count)
    store_once("summary", lambda: SummaryPart(command, left_out, machine, seconds, [*stored]))


def _specs(
    settings: Settings, model: Model, inputs: Any
) -> tuple[list[tuple[NetworkGroup, NetworkSpec]], list[str]]:
    """The networks to train, and a sentence for every group that is left out."""
    specs = []
    left_out: dict[str, None] = {}  # Groups may share a sentence.
    for group in network_groups():
        if group.is_control and not settings.controls:
            continue
        if settings.tune and all(method.only_same_epochs for method in methods_of(group)):
            continue
        try:
            specs.append((group, group.make_spec(settings, model, inputs)))
        except LeftOutError as error:
            left_out[str(error)] = None
    if not settings.controls:
        left_out["Methods of equal budget were not asked for."] = None
    return specs, list(left_out)


@dataclass(frozen=True)
class _Work:
    """Makes the parts of a run."""

    settings: Settings
    model: Model
    data: Dataset
    trainer: Trainer
    predictor: Predictor

    def key(self, index: int) -> Array:
        """A child of the run's key; groups and parts have indices of their own."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), index)

    @property
    def example(self) -> Any:
        """The inputs of one training example, `[1, ...]`."""
        return take(self.data.train_inputs, slice(1))

    def spec(self, network: Network, members: int = 1) -> NetworkSpec:
        """Networks that are trained in the ordinary way."""
        return NetworkSpec(
            network, members, self.settings.epochs, adam(self.settings.learning_rate)
        )

    def data_part(self) -> DataPart:
        """Describes the examples."""
        data = self.data
        train_labels, test_labels = map(labels_of_tokens, (data.train_labels, data.test_labels))
        group_name, test_groups, group_labels = groups_of_tokens(data)
        return DataPart(
            name=data.name,
            task="regression" if data.is_regression else "classification",
            train_size=len(train_labels),
            test_size=len(test_labels),
            num_classes=data.num_classes,
            label_noise=data.label_noise,
            target_mean=data.target_mean,
            target_scale=data.target_scale,
            ood_name=data.ood_name,
            test_labels=test_labels,
            train_labels=train_labels,
            group_name=group_name,
            test_groups=test_groups,
            group_labels=group_labels,
            groups_in_training=_are_in_training(data),
            train_group_name=data.train_group_name,
            train_sequences=len(data.train_labels) if data.is_per_token else None,
            test_sequences=len(data.test_labels) if data.is_per_token else None,
        )

    def tuning_part(
        self, group: NetworkGroup, spec: NetworkSpec, run_folder: RunFolder
    ) -> TuningPart | None:
        """Chooses the epochs and the weight decays of the group's methods by cross-validation."""
        key = jax.random.fold_in(self.key(TUNING_KEY_INDEX), group.key_index)
        return cross_validate(
            key, group, spec, self.settings, self.data, self.trainer, self.predictor, run_folder
        )

    def networks_part(
        self, group: NetworkGroup, spec: NetworkSpec, tuning: TuningPart | None
    ) -> NetworksPart | None:
        """Trains a group of networks and reads them with all of its methods."""
        settings = self.settings
        train_key, read_key = jax.random.split(self.key(group.key_index))
        choices = {
            method.name: all_choices(method, settings, tuning) for method in methods_of(group)
        }
        stops = {choice.epochs for chosen in choices.values() for choice in chosen}
        trained = self.trainer.fit_networks(
            train_key,
            spec,
            self.data,
            checkpoint=group.name,
            description=f"{group.name} networks",
            stops=sorted(stops),
        )
        if trained is None:
            return None
        train_outputs = co_adaptation = None
        if spec.record:
            # A single network of each replicate is scored.
            firsts = first_members(trained.variables[settings.epochs], settings.replicates)
            train_outputs = self.predictor.predict(
                None, spec.network, firsts, self.data.train_inputs, self.data.train_labels
            )
        if spec.record and settings.theory:
            co_adaptation_key, read_key = jax.random.split(read_key)
            # Hidden units are those of examples that the device holds together.
            rows = chunks(self.data.test_inputs)[0]
            co_adaptation = theory.measure(
                co_adaptation_key,
                self.model.dropout,
                firsts,
                jax.tree.map(jnp.asarray, take(self.data.test_inputs, rows)),
                jnp.asarray(self.data.test_labels[rows]),
                example_losses,
            )

        def read(method: Method, choice: Choice) -> MethodPredictions:
            # The same masks after any count of epochs.
            key = jax.random.clone(read_key) if method.draws_masks else None
            variables = trained.variables[choice.epochs]
            members = method.members_with(choice.weight_decay, variables, settings.replicates)
            return self.predictor.read(
                key,
                spec.network,
                members,
                epochs=choice.epochs,
                weight_decay=choice.weight_decay,
            )

        return NetworksPart(
            num_networks=trained.num_networks,
            num_parameters=trained.num_parameters,
            num_bytes=trained.num_bytes,
            epoch_flops=trained.epoch_flops,
            epoch_seconds=trained.epoch_seconds,
            methods={
                method.name: [read(method, choice) for choice in choices[method.name]]
                for method in methods_of(group)
            },
            train_outputs=train_outputs,
            learning_curve=trained.log.learning_curve,
            co_adaptation=co_adaptation,
        )

    def store_subsets(self, store_once: StoreOnce) -> None:
        """Trains on fewer examples, with and without dropout; a part for each training."""
        data = self.data
        num_classes = 1 if data.is_per_token else data.num_classes or 1
        min_size = max(self.settings.batch_size, 2 * num_classes)
        methods: tuple[Literal["plain", "dropout"], ...] = ("plain", "dropout")
        for share, method in product(TRAIN_SHARES, methods):
            size = round(share * len(data.train_labels))
            if size >= min_size:
                name = f"overfitting-{method}-{size}"
                store_once(name, partial(self.subset_part, name, method, size))

    def subset_part(
        self, name: str, method: Literal["plain", "dropout"], size: int
    ) -> SubsetPredictions | None:
        """Trains on some of the examples, for as many steps as on all of them.

        The examples are repeated until they are as many as all training examples. So an epoch has
        the same number of steps, and the programs are the same.
        """
        settings, data = self.settings, self.data
        spec = self.spec(self.model.plain if method == "plain" else self.model.dropout)
        chosen = np.flatnonzero(subset(data, size, settings.seed))
        repeated = data.train_on(np.resize(chosen, len(data.train_labels)))
        key_index = 2 * size + (method == "dropout")
        trained = self.trainer.fit_networks(
            jax.random.fold_in(self.key(OVERFITTING_KEY_INDEX), key_index),
            spec,
            repeated,
            checkpoint=name,
            description=f"{method} networks on {size} examples",
        )
        if trained is None:
            return None
        variables = trained.variables[settings.epochs]
        outputs_for = partial(self.predictor.predict, None, spec.network, variables)
        train_labels = labels_of_tokens(data.train_labels[chosen])
        train_outputs = outputs_for(repeated.train_inputs, repeated.train_labels)
        return SubsetPredictions(
            method=method,
            train_labels=train_labels,
            # The first examples are the chosen ones, the rest repeats them.
            train_outputs=train_outputs[:, :, : len(train_labels)],
            test_outputs=outputs_for(data.test_inputs, data.test_labels),
        )

    def exact_part(self) -> ExactPart | None:
        """Trains small dropout networks and enumerates all of their masks."""
        data = self.data
        num_classes = data.num_classes
        assert num_classes is not None
        dropout = Model(lambda: MLP(ENUMERATED_UNITS, num_classes, ENUMERATED_RATE)).dropout
        trained = self.trainer.fit_networks(
            self.key(EXACT_KEY_INDEX),
            self.spec(dropout),
            data,
            checkpoint="exact",
            description="small networks to enumerate",
        )
        if trained is None:
            return None
        variables = trained.variables[self.settings.epochs]
        inputs = jnp.asarray(take(data.test_inputs, slice(MAX_ENUMERATED_EXAMPLES)))
        rates = {
            f"Dropout_{layer}": np.full(units, ENUMERATED_RATE)
            for layer, units in enumerate(ENUMERATED_UNITS)
        }

        @jax.jit
        def enumerate_one(member: Variables) -> inference.Enumerated:
            def log_probs(masks: dict[str, Array]) -> Array:
                def apply_one_mask(site: DropoutSite, units: Array) -> Array:
                    return apply_mask(masks[site.name][None], units, site.rate)

                masked = dropout.replace_dropout(apply_one_mask)
                return predict(None, masked, member, inputs)

            return inference.enumerate_masks(log_probs, rates)

        averages = jax.lax.map(enumerate_one, variables)
        return ExactPart(
            num_units=sum(ENUMERATED_UNITS),
            num_masks=2 ** sum(ENUMERATED_UNITS),
            weight_scaling=np.asarray(ensemble.predict(None, dropout, variables, inputs)),
            geometric=np.asarray(averages.geometric),
            arithmetic=np.asarray(averages.arithmetic),
        )

    def store_sweep(self, store_once: StoreOnce, run_folder: RunFolder, sweep: Sweep) -> None:
        """Trains for every combination of values; a part for each."""
        if not sweep:
            return
        grid = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
        without_rate = [_without_rate(values) for values in grid]

        def cell(index: int) -> SweepCell | None:
            # Plain networks do not depend on the rate, so cells differing only in rate share them.
            first = without_rate.index(without_rate[index])
            if first < index:
                same = run_folder.load(f"sweep-{first}", SweepCell)
                plain = None if same is None else same.plain
            else:
                plain = self._plain_outputs(index, grid[index])
            dropout = self._dropout_outputs(index, grid[index])
            if plain is None or dropout is None:
                return None
            return SweepCell(grid[index], plain, dropout)

        for index in range(len(grid)):
            store_once(f"sweep-{index}", partial(cell, index))

    def _plain_outputs(self, cell_index: int, values: Mapping[str, float]) -> np.ndarray | None:
        """Test outputs of plain networks at one cell of the grid."""
        plain = self.model.at_width(values.get("width_factor", 1.0)).plain
        spec = self.spec(plain, self.settings.ensemble_size)
        return self._cell_outputs(2 * cell_index, "plain", spec, values, None)

    def _dropout_outputs(self, cell_index: int, values: Mapping[str, float]) -> np.ndarray | None:
        """Test outputs of one dropout network in each replicate, at one cell of the grid."""
        model = self.model.at_width(values.get("width_factor", 1.0))
        dropout, rate = model.dropout, None
        if "rate" in values:
            dropout, holds_rate = model.at_rate(values["rate"], self.example)
            rate = values["rate"] if holds_rate else None
        return self._cell_outputs(2 * cell_index + 1, "dropout", self.spec(dropout), values, rate)

    def _cell_outputs(
        self,
        index: int,
        method: str,
        spec: NetworkSpec,
        values: Mapping[str, float],
        rate: float | None,
    ) -> np.ndarray | None:
        """Trains one method at one cell; `index` counts the methods of all cells."""
        data, seed = self.data, self.settings.seed
        if "train_size" in values:
            data = data.train_on(subset(data, int(values["train_size"]), seed))
        if "label_noise" in values:
            data = with_label_noise(data, values["label_noise"], seed)
        where = ", ".join(f"{name} {value:g}" for name, value in values.items())
        trained = self.trainer.fit_networks(
            jax.random.fold_in(self.key(SWEEP_KEY_INDEX), index),
            spec,
            data,
            checkpoint=f"sweep-{index // 2}/{method}",
            description=f"{method} networks at {where}",
            rate=rate,
        )
        if trained is None:
            return None
        variables = trained.variables[self.settings.epochs]
        return self.predictor.predict(
            None, spec.network, variables, self.data.test_inputs, self.data.test_labels
        )


def _are_in_training(data: Dataset) -> bool:
    """Whether a group of test examples has training examples too."""
    if data.train_groups is None or data.test_groups is None:
        return False
    return bool(np.isin(data.test_groups, data.train_groups).any())


def _without_rate(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "rate"}
