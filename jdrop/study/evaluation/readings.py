"""Reads from a run folder what each method predicted."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jdrop.study.analyses import CoAdaptation, LearningCurve
from jdrop.study.methods import METHODS
from jdrop.study.parts import (
    DataPart,
    MethodPredictions,
    NetworksPart,
    OverfittingPart,
    SubsetPredictions,
    SweepCell,
    SweepPart,
)
from jdrop.study.results import Cost
from jdrop.study.run_folder import RunError, RunFolder

MASK_SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
"""How many masks are averaged, up to as many as were drawn."""


@dataclass(frozen=True)
class Reading:
    """The predictions of one method.

    Attributes:
        name: of the method.
        outputs: `[replicate, member, example, ...]`; a member is a network or a mask.
        ood_outputs: the same for out-of-distribution inputs.
        unit: what a member is, "networks" or "masks".
        cost: of one member; None if unknown.
        table: the sizes that tables show.
        sizes: how many members are averaged.
        retrained: whether each replicate has networks of its own, see `MethodResult.retrained`.
    """

    name: str
    outputs: np.ndarray
    ood_outputs: np.ndarray | None
    unit: str
    cost: Cost | None
    table: tuple[int, ...]
    sizes: tuple[int, ...]
    retrained: bool = True

    @property
    def num_independent(self) -> int:
        """How many replicates are independent of each other."""
        return len(self.outputs) if self.retrained else 1


def make_reading(
    name: str,
    outputs: np.ndarray,
    ood_outputs: np.ndarray | None = None,
    *,
    unit: str = "networks",
    cost: Cost | None = None,
    table: Sequence[int] = (),
    retrained: bool = True,
) -> Reading:
    """A reading at every size: each count of networks, or the `MASK_SIZES` of masks."""
    num_members = outputs.shape[1]
    sizes: Sequence[int] = range(1, num_members + 1)
    if unit == "masks":
        sizes = sorted({*(size for size in MASK_SIZES if size <= num_members), num_members})
    return Reading(
        name,
        outputs,
        ood_outputs,
        unit,
        cost,
        table=tuple(sorted({*table})),
        sizes=tuple(sizes),
        retrained=retrained,
    )


def is_regression(labels: np.ndarray) -> bool:
    """Whether labels are targets of a regression: floats."""
    return bool(np.issubdtype(labels.dtype, np.floating))


def in_target_unit(values: np.ndarray, data: DataPart) -> np.ndarray:
    """Undoes the standardisation of regression targets; returns log-probabilities as they are."""
    if data.task == "classification":
        return values
    return values * data.target_scale + data.target_mean


def load_readings(run: RunFolder, data: DataPart) -> list[Reading]:
    """Returns the predictions of each method in the folder, in the order of `METHODS`.

    Raises:
        RunError: a part holds the networks of a method, but not its predictions.
    """
    group_names = {method.group.name for method in METHODS.values()}
    parts = {name: run.load(name, NetworksPart) for name in group_names}
    readings = []
    for method in METHODS.values():
        part = parts[method.group.name]
        if part is None:
            continue
        if method.name not in part.methods:
            raise RunError(
                f"{run.folder} holds the networks of {method.name!r} but not its predictions; "
                f"delete parts/{method.group.name}.json. The command that began the run then "
                "computes the part again."
            )
        predictions = part.methods[method.name]
        num_members = predictions.outputs.shape[1]
        reading = make_reading(
            method.name,
            in_target_unit(predictions.outputs, data),
            predictions.ood_outputs,
            unit=method.unit,
            cost=_cost(part, predictions),
            table=method.table_sizes(num_members, run.run_config["budget"]),
        )
        readings.append(reading)
    return readings


def _cost(part: NetworksPart, predictions: MethodPredictions) -> Cost:
    """The cost of one member."""
    num_trained = predictions.networks_per_member
    return Cost(
        train_flops=num_trained * part.train_flops,
        train_seconds=num_trained * part.train_seconds / part.num_networks,
        predict_flops=predictions.predict_flops,
        predict_seconds=predictions.predict_seconds,
        parameters=part.num_parameters,
        bytes=part.num_bytes,
    )


def load_subsets(run: RunFolder, data: DataPart) -> Iterator[SubsetPredictions]:
    """Yields predictions of single networks, plain first, by rising count of training examples.

    The last of each method are trained on all training examples. Outputs and labels are in the
    unit of the target.
    """
    part = run.load("overfitting", OverfittingPart) or OverfittingPart([])
    for name in ("plain", "dropout"):
        networks = run.require(name, NetworksPart)
        assert networks.train_outputs is not None
        all_examples = SubsetPredictions(
            name,
            data.train_labels,
            networks.train_outputs[:, :1],
            networks.methods[name].outputs[:, :1],
        )
        for subset in (*(s for s in part.subsets if s.method == name), all_examples):
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
    """Yields the predictions of each cell of the sweep, in the unit of the target."""
    part = run.load("sweep", SweepPart) or SweepPart([])
    for cell in part.cells:
        yield dataclasses.replace(
            cell,
            plain=in_target_unit(cell.plain, data),
            dropout=in_target_unit(cell.dropout, data),
        )
