"""The parts of a run, as its folder stores them: `jdrop.study.run_folder` writes and reads them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from jdrop.study.analyses import CoAdaptation, LearningCurve


def _check_axes(*num_axes: int) -> Callable[[Any], np.ndarray]:
    """A check that a value is an array with one of these numbers of axes."""

    def check(value: Any) -> np.ndarray:
        if not isinstance(value, np.ndarray):
            raise ValueError("must be an array")
        if value.ndim not in num_axes:
            allowed = " or ".join(map(str, num_axes))
            raise ValueError(f"must have {allowed} axes, has shape {value.shape}")
        return value

    return check


Labels = Annotated[np.ndarray, pydantic.PlainValidator(_check_axes(1))]
"""`[example]`: int32 in classification, float32 standardised targets in regression."""

Outputs = Annotated[np.ndarray, pydantic.PlainValidator(_check_axes(3, 4))]
"""`[replicate, member, example, class]` log-probabilities, float32.

In regression `[replicate, member, example]` standardised targets. A member is a network or a mask.
"""

LogProbs = Annotated[np.ndarray, pydantic.PlainValidator(_check_axes(3))]
"""`[replicate, example, class]`, float32."""


@dataclass(frozen=True)
class DataPart:
    """The examples of a run. With labels per token these are the tokens that have a label.

    Attributes:
        name: of the data set.
        task: "classification" or "regression".
        train_size: how many training examples.
        test_size: how many test examples.
        num_classes: None in regression.
        label_noise: the share of training labels that were replaced.
        target_mean: was subtracted from the targets of regression.
        target_scale: then divided them.
        ood_name: of the out-of-distribution inputs, if there are any.
        test_labels: `[test_size]`.
        train_labels: `[train_size]`.
        group_name: what one group of examples is; None where they are taken as independent.
        test_groups: int32 `[test_size]`, from 0; None without groups.
        group_labels: the groups by their number; None without groups.
        groups_in_training: whether a group of test examples has training examples too.
        train_group_name: what one group of training examples is; None where each is by itself.
        train_sequences: how many sequences hold the training examples, if these are tokens.
        test_sequences: how many sequences hold the test examples, if these are tokens.
    """

    name: str
    task: Literal["classification", "regression"]
    train_size: int
    test_size: int
    num_classes: int | None
    label_noise: float
    target_mean: float
    target_scale: float
    ood_name: str | None
    test_labels: Labels
    train_labels: Labels
    group_name: str | None = None
    test_groups: Labels | None = None
    group_labels: list[str] | None = None
    groups_in_training: bool = False
    train_group_name: str | None = None
    train_sequences: int | None = None
    test_sequences: int | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """All fields but the arrays, and the number of groups."""
        hidden = ("_labels", "_groups")
        fields = (field.name for field in dataclasses.fields(self))
        values = {name: getattr(self, name) for name in fields if not name.endswith(hidden)}
        groups = self.test_groups
        return {**values, "num_groups": None if groups is None else len(np.unique(groups))}


@dataclass(frozen=True)
class MethodPredictions:
    """What one method predicts after some training, and what a prediction costs.

    Attributes:
        epochs: how many epochs the networks trained.
        weight_decay: of AdamW; None for Adam.
        outputs: for the test inputs, `[replicate, member, example, class]`.
        ood_outputs: for the out-of-distribution inputs, if there are any.
        predict_flops: floating-point operations for one member and example.
        predict_seconds: for one member and example.
    """

    epochs: int
    weight_decay: float | None
    outputs: Outputs
    ood_outputs: Outputs | None
    predict_flops: float
    predict_seconds: float


@dataclass(frozen=True)
class NetworksPart:
    """A group of networks that were trained together, and the predictions of its methods.

    Attributes:
        num_networks: how many were trained, over all replicates.
        num_parameters: of one network.
        num_bytes: of the variables of one network.
        epoch_flops: floating-point operations in an epoch of one network.
        epoch_seconds: of an epoch of all networks together, a mean.
        methods: by name of the method, its predictions after each training that it was read with.
        train_outputs: for the training examples, `[replicate, 1, example, class]`, by the first
            member after the epochs of the settings; for recorded groups only.
        learning_curve: mean scores of the first member of each replicate; for recorded groups only.
        co_adaptation: what the hidden units do; for recorded groups in a run with theory only.
    """

    num_networks: int
    num_parameters: int
    num_bytes: int
    epoch_flops: float
    epoch_seconds: float
    methods: dict[str, list[MethodPredictions]]
    train_outputs: Outputs | None
    learning_curve: LearningCurve | None
    co_adaptation: CoAdaptation | None


@dataclass(frozen=True)
class ResampledChoice:
    """Which candidates resamples of the training examples choose for one size of an average.

    Attributes:
        size: of the average.
        shares: `shares[setting][candidate]`: in what share of the resamples this candidate has the
            smallest loss.
    """

    size: int
    shares: list[list[float]]


@dataclass(frozen=True)
class TuningPart:
    """The cross-validation of one group of networks.

    Attributes:
        epochs: after which the networks were scored, rising.
        losses: by name of the method, `losses[setting][candidate][size - 1]`: the mean loss of
            left-out examples. A setting is a weight decay that the method may have, or the only
            one. A method that draws masks has one size: all masks.
        epoch_flops: floating-point operations in an epoch of one network.
        resampled: by name of the method, what resamples choose at the sizes that tables show;
            empty in runs of earlier versions.
    """

    epochs: list[int]
    losses: dict[str, list[list[list[float]]]]
    epoch_flops: float
    resampled: dict[str, list[ResampledChoice]] = field(default_factory=dict)


@dataclass(frozen=True)
class SubsetPredictions:
    """What networks predict that were trained on some of the training examples.

    Attributes:
        method: "plain" or "dropout".
        train_labels: of those examples, `[size]`.
        train_outputs: for those examples, `[replicate, 1, size, class]`.
        test_outputs: for the test inputs, `[replicate, 1, example, class]`.
    """

    method: Literal["plain", "dropout"]
    train_labels: Labels
    train_outputs: Outputs
    test_outputs: Outputs


@dataclass(frozen=True)
class ExactPart:
    """Small dropout networks, all of whose masks were enumerated.

    Attributes:
        num_units: how many units dropout may drop.
        num_masks: 2 to the power of that.
        weight_scaling: log-probabilities `[replicate, example, class]` without dropout.
        geometric: of the normalised geometric mean over all masks.
        arithmetic: of the arithmetic mean over all masks.
    """

    num_units: int
    num_masks: int
    weight_scaling: LogProbs
    geometric: LogProbs
    arithmetic: LogProbs


@dataclass(frozen=True)
class SweepCell:
    """The predictions at one point of the sweep's grid, for the test inputs.

    Attributes:
        values: by swept parameter.
        plain: of the plain networks, `[replicate, member, example, class]`.
        dropout: of one dropout network, `[replicate, 1, example, class]`.
    """

    values: dict[str, int | float]
    plain: Outputs
    dropout: Outputs


@dataclass(frozen=True)
class SummaryPart:
    """What is known when all other parts are complete.

    Attributes:
        command: the command or call that began the run.
        left_out: a sentence for everything that the run does not compare.
        versions: of the software, and the device; see `versions`.
        seconds: how long the session took that completed the run.
        parts: the names of all other parts, in the order in which they were made.
    """

    command: str
    left_out: list[str]
    versions: dict[str, str]
    seconds: dict[str, float]
    parts: list[str]


BaselinePredictions = Annotated[np.ndarray, pydantic.PlainValidator(_check_axes(1, 2))]
"""`[example, class]` log-probabilities, in regression `[example]` standardised targets, float32."""


@dataclass(frozen=True)
class BaselineOutputs:
    """What a simple model predicts.

    Attributes:
        name: "logistic-regression", "ridge-regression" or "constant".
        label: for tables.
        explanation: a description in a sentence or two.
        outputs: for the test inputs, `[example, class]`.
        seconds: of the choice of the penalty, the fit and the predictions together.
        penalty: of the squared weights, chosen by cross-validation; None without weights.
    """

    name: str
    label: str
    explanation: str
    outputs: BaselinePredictions
    seconds: float
    penalty: float | None


@dataclass(frozen=True)
class BaselinesPart:
    """Simple models that stand beside the networks, the same in all replicates.

    Attributes:
        baselines: the linear model first, where it was fitted, then the constant.
    """

    baselines: list[BaselineOutputs]
