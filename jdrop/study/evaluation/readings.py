"""Reads from a run folder what each method predicted."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jdrop.statistics import group_losses
from jdrop.study.analyses import CoAdaptation, LearningCurve, TuningCurve
from jdrop.study.diverged import DivergedError, members_left, num_diverged, num_left
from jdrop.study.methods import METHODS
from jdrop.study.parts import (
    BaselinesPart,
    DataPart,
    ExactPart,
    MethodPredictions,
    NetworksPart,
    SubsetPredictions,
    SummaryPart,
    SweepCell,
    TuningPart,
)
from jdrop.study.results import Cost
from jdrop.study.run_folder import RunError, RunFolder
from jdrop.study.settings import Settings
from jdrop.study.tuning import (
    Choice,
    all_choices,
    own_choice,
    own_choices,
    same_epochs_choice,
    searches,
    table_sizes,
)

MASK_SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
"""How many masks are averaged, up to as many as were drawn."""

NETWORK_SIZES = (*range(1, 21), *(size for size in MASK_SIZES if size > 20))
"""How many networks are averaged: every count up to 20."""


@dataclass(frozen=True, eq=False)
class State:
    """What the members of a method predict after one training.

    Attributes:
        outputs: `[replicate, member, example, ...]`; a member is a network or a mask.
        ood_outputs: the same for out-of-distribution inputs.
        epochs: of the training; None if unknown.
        weight_decay: of the training; None for Adam, or if unknown.
        cost: of one member; None if unknown.
    """

    outputs: np.ndarray
    ood_outputs: np.ndarray | None = None
    epochs: int | None = None
    weight_decay: float | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Reading:
    """The predictions of one method, at each size of its averages.

    Attributes:
        name: of the method.
        states: by how many members are averaged, rising: what these members predict.
        unit: what a member is, "networks" or "masks".
        table: the sizes that tables show.
        search_flops: by size, floating-point operations of the cross-validation of one network;
            empty if nothing was chosen.
        retrained: whether each replicate has networks of its own, see `MethodResult.retrained`.
        label: for tables, if the method is not in `METHODS`.
        explanation: what the method is, if it is not in `METHODS`.
        is_baseline: whether the method is a simple model, see `MethodResult.is_baseline`.
        num_diverged: how many members diverged and are left out.
    """

    name: str
    states: Mapping[int, State]
    unit: str = "networks"
    table: tuple[int, ...] = ()
    search_flops: Mapping[int, float] = field(default_factory=dict)
    retrained: bool = True
    label: str = ""
    explanation: str = ""
    is_baseline: bool = False
    num_diverged: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many members are averaged."""
        return tuple(self.states)

    @property
    def outputs(self) -> np.ndarray:
        """What the members of the largest average predict."""
        return self.states[max(self.states)].outputs

    @property
    def num_independent(self) -> int:
        """How many replicates are independent of each other."""
        return len(self.outputs) if self.retrained else 1


def reading_of(
    name: str,
    outputs: np.ndarray,
    *,
    unit: str = "networks",
    table: Sequence[int] = (),
    **fields: Any,
) -> Reading:
    """A reading of the same members at every size, see `all_sizes`."""
    sizes = all_sizes(outputs.shape[1], unit, table)
    states = dict.fromkeys(sizes, State(outputs))
    return Reading(name, states, unit, tuple(table), **fields)


def all_sizes(num_members: int, unit: str, table: Sequence[int]) -> list[int]:
    """The sizes at which averages are scored: a rising grid, all members, and those of tables."""
    grid = MASK_SIZES if unit == "masks" else NETWORK_SIZES
    return sorted({*(size for size in grid if size < num_members), num_members, *table})


def is_regression(labels: np.ndarray) -> bool:
    """Whether labels are targets of a regression: floats."""
    return bool(np.issubdtype(labels.dtype, np.floating))


def in_target_unit(values: np.ndarray, data: DataPart) -> np.ndarray:
    """Undoes the standardisation of regression targets; returns log-probabilities as they are."""
    if data.task == "classification":
        return values
    return values * data.target_scale + data.target_mean


def in_groups(losses: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Losses `[..., example]` as values of groups of examples, or as they are without groups."""
    return losses if groups is None else group_losses(losses, groups)


def load_readings(
    run: RunFolder, settings: Settings, data: DataPart
) -> tuple[list[Reading], list[Reading] | None]:
    """Returns the predictions of each method in the folder, in the order of `METHODS`.

    Returns:
        The methods after the epochs of the settings; and the methods after the epochs that
        cross-validation chose for each size of each, None if the run was not tuned. The two share
        the states that are in both. Members that diverged are left out, in each replicate as
        many; a method without members is left out.

    Raises:
        RunError: a part holds the networks of a method, but not its predictions.
        DivergedError: a replicate has fewer than two plain networks or no dropout network left.
    """
    group_names = {method.group.name for method in METHODS.values()}
    parts = {name: run.load(name, NetworksPart) for name in group_names}
    tunings = {name: run.load(f"tuning-{name}", TuningPart) for name in group_names}
    same, own = [], []
    for method in METHODS.values():
        part, tuning = parts[method.group.name], tunings[method.group.name]
        if part is None:
            continue
        predictions = part.methods.get(method.name)
        if not predictions:
            raise RunError(
                f"{run.folder} holds the networks of {method.name!r} but not its predictions; "
                f"delete parts/{method.group.name}.json. The command that began the run then "
                "computes the part again."
            )
        stored = {(each.epochs, each.weight_decay): each for each in predictions}
        num_members = min(num_left(each.outputs) for each in predictions)
        diverged = max(num_diverged(each.outputs) for each in predictions)
        fewest = {"plain": 2, "dropout": 1}.get(method.name, 0)
        if num_members < fewest:
            raise DivergedError(
                f"training diverged: {diverged} {method.name} networks predict NaN, and a "
                f"replicate has fewer than {fewest} left; take a smaller learning rate."
            )
        if num_members == 0:
            continue
        states = {
            choice: _state(
                part, choice, stored[choice.epochs, choice.weight_decay], data, num_members
            )
            for choice in all_choices(method, settings, tuning)
        }
        table = tuple(sorted({*method.table_sizes(num_members, settings.budget)}))
        sizes = all_sizes(num_members, method.unit, table)
        same_state = states[same_epochs_choice(method, settings, tuning)]
        searched = {}
        if tuning is not None and method.weight_decays:
            flops = max(1, len(method.weight_decays)) * settings.epochs * tuning.epoch_flops
            searched = dict.fromkeys(sizes, flops)
        make_reading = partial(Reading, method.name, num_diverged=diverged)
        same.append(make_reading(dict.fromkeys(sizes, same_state), method.unit, table, searched))
        if settings.tune and not method.only_same_epochs:
            choices = own_choices(method, sizes, settings, tuning)
            own_states = {size: states[choice] for size, choice in choices.items()}
            own_searches = {} if tuning is None else searches(method, sizes, settings, tuning)
            own.append(make_reading(own_states, method.unit, table, own_searches))
    return same, own if settings.tune else None


def _state(
    part: NetworksPart,
    choice: Choice,
    predictions: MethodPredictions,
    data: DataPart,
    num_members: int,
) -> State:
    """What the members of a method predict, with the cost of one member, without the search."""
    outputs, ood_outputs = predictions.outputs, predictions.ood_outputs
    if ood_outputs is not None:
        ood_outputs = members_left(outputs, num_members, ood_outputs)
    cost = Cost(
        train_flops=choice.epochs * part.epoch_flops,
        search_flops=0.0,
        train_seconds=choice.epochs * part.epoch_seconds / part.num_networks,
        predict_flops=predictions.predict_flops,
        predict_seconds=predictions.predict_seconds,
        parameters=part.num_parameters,
        bytes=part.num_bytes,
    )
    return State(
        in_target_unit(members_left(outputs, num_members), data),
        ood_outputs,
        choice.epochs,
        choice.weight_decay,
        cost,
    )


def load_baselines(run: RunFolder, data: DataPart, replicates: int) -> list[Reading]:
    """Returns the predictions of simple models, which all replicates share."""
    part = run.load("baselines", BaselinesPart) or BaselinesPart([])
    return [
        reading_of(
            baseline.name,
            np.repeat(in_target_unit(baseline.outputs, data)[None, None], replicates, 0),
            table=(1,),
            retrained=False,
            label=baseline.label,
            explanation=baseline.explanation,
            is_baseline=True,
        )
        for baseline in part.baselines
    ]


def load_tuning(run: RunFolder, settings: Settings, data: DataPart) -> list[TuningCurve]:
    """Returns the curves of the cross-validation, at the sizes that tables show."""
    unit = data.target_scale**2 if data.task == "regression" else 1.0
    curves = []
    for method in METHODS.values():
        part = run.load(f"tuning-{method.group.name}", TuningPart)
        if part is None or method.name not in part.losses:
            continue
        if settings.tune and method.only_same_epochs:
            continue
        losses = np.asarray(part.losses[method.name]) * unit
        for size in table_sizes(method, losses.shape[2], settings):
            shares = None
            if settings.tune:
                resampled = part.resampled.get(method.name, [])
                shares = next((each.shares for each in resampled if each.size == size), None)
                choice = own_choice(method, size, part)
            else:
                choice = same_epochs_choice(method, settings, part)
            for setting, weight_decay in enumerate(method.weight_decays or (None,)):
                curves.append(
                    TuningCurve(
                        method=method.name,
                        size=settings.num_samples if method.draws_masks else size,
                        weight_decay=weight_decay,
                        epochs=part.epochs,
                        losses=losses[setting, :, size - 1].tolist(),
                        chosen=choice.epochs if choice.weight_decay == weight_decay else None,
                        choice_shares=None if shares is None else shares[setting],
                    )
                )
    return curves


def _after(part: NetworksPart, name: str, epochs: int) -> MethodPredictions:
    """What a method predicts after so many epochs."""
    return next(each for each in part.methods[name] if each.epochs == epochs)


def load_subsets(run: RunFolder, settings: Settings, data: DataPart) -> Iterator[SubsetPredictions]:
    """Yields predictions of single networks, plain first, by rising count of training examples.

    Subsets on which a network diverged are left out.

    The last of each method are trained on all training examples. Outputs and labels are in the
    unit of the target.
    """
    subsets = [run.require(name, SubsetPredictions) for name in _parts_named(run, "overfitting-")]
    for name in ("plain", "dropout"):
        networks = run.require(name, NetworksPart)
        assert networks.train_outputs is not None
        all_examples = SubsetPredictions(
            name,
            data.train_labels,
            networks.train_outputs[:, :1],  # Earlier versions stored all members.
            _after(networks, name, settings.epochs).outputs[:, :1],
        )
        candidates = (*(s for s in subsets if s.method == name), all_examples)
        for subset in (s for s in candidates if not _any_diverged(s)):
            yield SubsetPredictions(
                name,
                in_target_unit(subset.train_labels, data),
                in_target_unit(subset.train_outputs, data),
                in_target_unit(subset.test_outputs, data),
            )


def load_learning_curves(run: RunFolder, data: DataPart) -> dict[str, LearningCurve]:
    """Returns the learning curves of plain and dropout networks, in the unit of the target."""
    factors = {"mse": data.target_scale**2}

    def scaled(scores: dict[str, list[float]]) -> dict[str, list[float]]:
        return {
            score: [value * factors.get(score, 1) for value in values]
            for score, values in scores.items()
        }

    curves = {}
    for name in ("plain", "dropout"):
        curve = run.require(name, NetworksPart).learning_curve
        assert curve is not None
        curves[name] = LearningCurve(curve.epochs, scaled(curve.train), scaled(curve.test))
    return curves


def load_co_adaptation(run: RunFolder) -> dict[str, CoAdaptation]:
    """Returns the statistics of hidden units of plain and dropout networks, if measured."""
    parts = {name: run.require(name, NetworksPart) for name in ("plain", "dropout")}
    return {
        name: part.co_adaptation for name, part in parts.items() if part.co_adaptation is not None
    }


def load_sweep(run: RunFolder, data: DataPart) -> Iterator[SweepCell]:
    """Yields the predictions of each cell of the sweep, in the unit of the target.

    Cells are left out where a dropout network diverged, or fewer than two plain networks are left.
    """
    for name in _parts_named(run, "sweep-"):
        cell = run.require(name, SweepCell)
        num_plain = num_left(cell.plain)
        if num_plain < 2 or num_diverged(cell.dropout):
            continue
        yield dataclasses.replace(
            cell,
            plain=in_target_unit(members_left(cell.plain, num_plain), data),
            dropout=in_target_unit(cell.dropout, data),
        )


def load_exact(run: RunFolder) -> ExactPart | None:
    """Returns the enumerated networks; None if there are none, or one of them diverged."""
    part = run.load("exact", ExactPart)
    return None if part is None or np.isnan(part.weight_scaling).any() else part


def describe_diverged(run: RunFolder) -> list[str]:
    """Returns a sentence for each part with networks that diverged."""
    sentences = []
    for method in METHODS.values():
        part = run.load(method.group.name, NetworksPart)
        if part is None or method.unit == "masks" or method.tuned_as is not None:
            continue
        each = [predictions.outputs for predictions in part.methods[method.name]]
        if count := max(map(num_diverged, each)):
            left = min(map(num_left, each))
            average = f"averages are of at most {left}" if left else "the method is left out"
            sentences.append(
                f"Training diverged for {count} of {each[0].shape[0] * each[0].shape[1]} networks "
                f"of the method {method.name!r}: {average} in each replicate."
            )
    for name in _parts_named(run, "overfitting-"):
        if _any_diverged(run.require(name, SubsetPredictions)):
            sentences.append(f"Networks diverged in the part {name!r}, which is left out.")
    for name in _parts_named(run, "sweep-"):
        cell = run.require(name, SweepCell)
        if count := num_diverged(cell.plain) + num_diverged(cell.dropout):
            where = ", ".join(f"{parameter} {value:g}" for parameter, value in cell.values.items())
            sentences.append(f"Training diverged for {count} networks of the sweep at {where}.")
    if run.load("exact", ExactPart) is not None and load_exact(run) is None:
        sentences.append("The small networks to enumerate diverged, and are left out.")
    return sentences


def _any_diverged(subset: SubsetPredictions) -> bool:
    return bool(num_diverged(subset.train_outputs) + num_diverged(subset.test_outputs))


def _parts_named(run: RunFolder, prefix: str) -> list[str]:
    """The names of the run's parts that begin so, in the order in which they were made."""
    names = run.require("summary", SummaryPart).parts
    return [name for name in names if name.startswith(prefix)]
