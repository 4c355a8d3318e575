"""What a comparison found, as plain data, and the JSON that holds it.

Every number that a table, a figure or the report shows is in a `Comparison`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from jdrop.statistics import EnsembleEquivalent, EquivalenceTest, Interval


@dataclass(frozen=True)
class Score:
    """How a score is shown.

    Attributes:
        title: its name for people.
        unit: "%", "nats" or nothing.
        about: its definition, a phrase.
        lower_is_better: whether small values are good.
    """

    title: str
    unit: str
    about: str
    lower_is_better: bool = True

    @property
    def scale(self) -> int:
        """What a value is multiplied by to be shown."""
        return 100 if self.unit == "%" else 1

    @property
    def digits(self) -> int:
        """Digits after the point."""
        return 2 if self.unit == "%" else 3


SCORES = {
    "nll": Score("NLL", "nats", "mean negative log-likelihood of the test labels"),
    "calibrated_nll": Score(
        "calibrated NLL",
        "nats",
        "NLL at the temperature (in regression: with the noise) fitted on the other half of the "
        "test examples, mean of several halvings",
    ),
    "brier": Score(
        "Brier", "", "squared distance of the probabilities from the truth, summed over classes"
    ),
    "error": Score("error", "%", "share of examples whose most probable class is wrong"),
    "crps": Score("CRPS", "", "continuous ranked probability score, in the unit of the target"),
    "mse": Score("MSE", "", "mean squared error of the average, in the squared unit of the target"),
    "rmse": Score(
        "RMSE", "", "root of the MSE and of the ends of its interval, in the unit of the target"
    ),
    "coverage": Score(
        "coverage of 95 %",
        "%",
        "share of targets in the central 95 % interval, with the noise fitted on the other half of "
        "the test examples, mean of several halvings; 95 is right",
    ),
    "ece": Score("ECE", "%", "calibration error of the top class, 15 bins of equal width"),
    "ece_equal_mass": Score(
        "ECE, equal mass", "%", "calibration error of the top class, 15 bins of equal mass"
    ),
    "debiased_ece": Score(
        "ECE, debiased", "%", "root mean squared calibration error, less its bias (Kumar 2019)"
    ),
    "aurc": Score("AURC", "%", "mean error of the k most confident, over all k"),
    "entropy": Score("entropy", "nats", "mean entropy of the predictions"),
    "mutual_information": Score(
        "mutual information",
        "nats",
        "entropy of the average less the mean entropy of what is averaged",
    ),
    "auroc_entropy": Score(
        "OOD AUROC, entropy",
        "%",
        "probability that an input of the other set has the larger entropy",
        lower_is_better=False,
    ),
    "auroc_mutual_information": Score(
        "OOD AUROC, MI",
        "%",
        "probability that an input of the other set has the larger mutual information",
        lower_is_better=False,
    ),
}
"""By the name that they have in the results."""

CURVE_SCORES = {
    "classification": ("nll", "calibrated_nll", "brier", "error"),
    "regression": ("calibrated_nll", "crps", "mse"),
}
"""The scores that are means over examples: those in which a method is said to be worth so many
networks. The first is the headline's."""


@dataclass(frozen=True)
class Cost:
    """What a prediction cost, in everything that it can cost.

    Attributes:
        train_flops: floating-point operations to train it, as the compiler counts them, with the
            search for its settings where there was one.
        train_seconds: to train it, as its share of the networks trained at once, without
            compilation.
        predict_flops: to predict one example.
        predict_seconds: to predict one example, as its share of a pass over all of them.
        parameters: numbers to keep.
        bytes: of these.
    """

    train_flops: float
    train_seconds: float
    predict_flops: float
    predict_seconds: float
    parameters: int
    bytes: int


COSTS = {
    "train_flops": "training FLOPs",
    "train_seconds": "training seconds",
    "predict_flops": "inference FLOPs an example",
    "predict_seconds": "inference seconds an example",
    "parameters": "parameters",
    "bytes": "bytes",
}
"""The attributes of `Cost`, for people."""


@dataclass(frozen=True)
class Reliability:
    """How often the top class was right, by its probability: one value for each bin.

    Attributes:
        confidence: mean probability of the top class; NaN in an empty bin.
        accuracy: share of examples of which the top class was right; NaN in an empty bin.
        share: of all examples.
    """

    confidence: list[float]
    accuracy: list[float]
    share: list[float]


@dataclass(frozen=True)
class RiskCoverage:
    """The error of the most confident examples, against their share.

    Attributes:
        coverage: share of the examples, rising.
        risk: their error, mean over replicates.
    """

    coverage: list[float]
    risk: list[float]


@dataclass(frozen=True)
class Point:
    """One method at one size.

    Attributes:
        size: how many networks or masks were averaged.
        cost: of one prediction by them; None where it is not known.
        scores: by name, the mean over replicates and test examples, with the 95 % interval for new
            trainings and new test examples.
        over_seeds: by name, the same means with the interval for new trainings on these test
            examples, whose luck is common to all methods.
        worth: by name, the number of averaged plain networks that score as well.
        against_ensemble: by name, the test of equivalence with the largest average of plain
            networks.
        reliability: for the points of the table.
        risk_coverage: likewise.
    """

    size: int
    cost: Cost | None
    scores: dict[str, Interval]
    over_seeds: dict[str, Interval]
    worth: dict[str, EnsembleEquivalent]
    against_ensemble: dict[str, EquivalenceTest]
    reliability: Reliability | None = None
    risk_coverage: RiskCoverage | None = None


@dataclass(frozen=True)
class Method:
    """One way to make predictions, at every size that it was read at.

    Attributes:
        name: such as "plain" or "monte-carlo".
        label: for tables and figures; "{n}" stands for the size.
        about: one sentence on what it is.
        unit: what its size counts, "networks" or "masks".
        points: by rising size.
        table: the sizes that tables show.
        retrained: whether replicates have networks of their own. If not, one network was given,
            and intervals hold for it, not for training it anew.
    """

    name: str
    label: str
    about: str
    unit: str
    points: list[Point]
    table: list[int]
    retrained: bool = True

    def point(self, size: int) -> Point:
        """The point of this size.

        Raises:
            KeyError: there is none.
        """
        for point in self.points:
            if point.size == size:
                return point
        raise KeyError(f"{self.name} has no point of size {size}")

    def title(self, size: int) -> str:
        """The label of one size."""
        return self.label.format(n="one" if size == 1 else size)


@dataclass(frozen=True)
class Ambiguity:
    """Why an average scores better than what it is the average of.

    Attributes:
        members: mean loss of the members.
        diversity: by how much the average is better.
        pool: loss of the average; it is `members - diversity`.
    """

    members: Interval
    diversity: Interval
    pool: Interval


@dataclass(frozen=True)
class Diversity:
    """How the members of an average differ; masks and seeds on one scale.

    Attributes:
        method: its name.
        size: how many networks or masks were compared, the same for every method where possible.
        disagreement: share of examples on which two members differ in their top class.
        pairwise_kl: mean Kullback-Leibler divergence of ordered pairs, in nats.
        q_statistic: Yule's Q of being right, mean over pairs.
        mutual_information: mean over examples, in nats.
        ambiguity: by loss and pool ("arithmetic NLL", ...).
    """

    method: str
    size: int
    disagreement: Interval | None
    pairwise_kl: Interval | None
    q_statistic: Interval | None
    mutual_information: Interval | None
    ambiguity: dict[str, Ambiguity]


@dataclass(frozen=True)
class MaskCurve:
    """The score of a Monte-Carlo average against its number of masks, beside weight scaling.

    Attributes:
        num_masks: of each value.
        scores: by score, one mean over replicates for each number.
        weight_scaling: by score.
        masks_needed: by score, how many masks reach weight scaling.
    """

    num_masks: list[int]
    scores: dict[str, list[float]]
    weight_scaling: dict[str, float]
    masks_needed: dict[str, EnsembleEquivalent]


@dataclass(frozen=True)
class Exact:
    """A small dropout network of which every mask was enumerated.

    Attributes:
        num_units: hidden units that may be dropped, in two layers.
        num_masks: 2 to the power of `num_units`.
        weight_scaling: by score.
        geometric: the normalised geometric mean over all masks, by score.
        arithmetic: the mean over all masks, by score.
        nonlinearity_gap: weight scaling less geometric, by score: what the non-linearity costs.
        pool_gap: geometric less arithmetic, by score: what the kind of average costs.
    """

    num_units: int
    num_masks: int
    weight_scaling: dict[str, Interval]
    geometric: dict[str, Interval]
    arithmetic: dict[str, Interval]
    nonlinearity_gap: dict[str, Interval]
    pool_gap: dict[str, Interval]


@dataclass(frozen=True)
class Overfitting:
    """Training and test scores of one network, for one kind and one number of examples.

    Attributes:
        networks: "plain" or "dropout".
        train_size: training examples.
        train: by score.
        test: by score.
        gap: test less training, by score.
    """

    networks: str
    train_size: int
    train: dict[str, Interval]
    test: dict[str, Interval]
    gap: dict[str, Interval]


@dataclass(frozen=True)
class LearningCurve:
    """Scores while networks of one kind trained: the mean over them.

    Attributes:
        epochs: after how many epochs each value was taken.
        train: by score, on the training examples.
        test: by score, on the test examples.
    """

    epochs: list[int]
    train: dict[str, list[float]]
    test: dict[str, list[float]]


@dataclass(frozen=True)
class CoAdaptation:
    """What the hidden units of one kind of network do.

    Attributes:
        correlation: by layer, the mean absolute correlation of two units.
        zero_share: by layer, the share of activations that are zero.
        sparseness: by layer, of Treves and Rolls, in [0, 1]: 1 for one active unit in many.
        activation_counts: by layer, a histogram of activations, as shares, from `activation_min` to
            `activation_max`.
        activation_min: by layer, the smallest activation, or 0 where none is negative.
        activation_max: by layer.
        deleted: shares of hidden units deleted.
        deletion: by score, its mean at each share.
        features: weights into the first units, `[unit][feature]`, of one network; None where there
            is no such layer.
    """

    correlation: dict[str, Interval]
    zero_share: dict[str, Interval]
    sparseness: dict[str, Interval]
    activation_counts: dict[str, list[float]]
    activation_min: dict[str, float]
    activation_max: dict[str, float]
    deleted: list[float]
    deletion: dict[str, list[float]]
    features: list[list[float]] | None


@dataclass(frozen=True)
class Cell:
    """One place of a sweep.

    Attributes:
        at: the value of every parameter of the sweep.
        scores: by "plain", "ensemble" and "dropout", then by score.
        worth: of one dropout network read by weight scaling, by score.
    """

    at: dict[str, float]
    scores: dict[str, dict[str, Interval]]
    worth: dict[str, EnsembleEquivalent]


@dataclass(frozen=True)
class Comparison:
    """Everything that a run of the comparison found.

    In JSON, infinite numbers are the string "Infinity" and NaN is "NaN". A `worth` of
    "Infinity" lies beyond the largest ensemble.

    Attributes:
        task: "classification" or "regression".
        command: what made it.
        settings: the settings that made it, as plain values.
        data: name and sizes of the data set.
        versions: of the software, and the device.
        seconds: where the time of the run went.
        margins: by score, the difference that is held to be none.
        replicates: how many whole repetitions stand behind every interval.
        methods: all ways to predict, the plain networks first.
        diversity: of those with several members.
        mask_curve: None where no masks were drawn.
        exact: None where nothing was enumerated.
        overfitting: by kind of network and number of training examples.
        learning_curves: by kind of network.
        co_adaptation: by kind of network.
        sweep: empty where there was none.
        left_out: what was not computed, a sentence each.
    """

    __pydantic_config__ = pydantic.ConfigDict(ser_json_inf_nan="strings")

    task: str
    command: str
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    margins: dict[str, float]
    replicates: int
    methods: list[Method]
    diversity: list[Diversity]
    mask_curve: MaskCurve | None
    exact: Exact | None
    overfitting: list[Overfitting]
    learning_curves: dict[str, LearningCurve]
    co_adaptation: dict[str, CoAdaptation]
    sweep: list[Cell]
    left_out: list[str]

    def method(self, name: str) -> Method:
        """The method of this name.

        Raises:
            KeyError: there is none.
        """
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method {name!r}; there are {', '.join(m.name for m in self.methods)}")

    @property
    def curve_scores(self) -> tuple[str, ...]:
        """The scores that have a `worth`; the first is the headline's."""
        return CURVE_SCORES[self.task]

    @property
    def ensemble(self) -> Point:
        """The largest average of plain networks."""
        return self.method("plain").points[-1]

    @property
    def table(self) -> list[tuple[Method, Point]]:
        """The points that tables show."""
        return [(method, method.point(size)) for method in self.methods for size in method.table]

    def to_json(self) -> str:
        """The comparison as JSON; `from_json` reads it back."""
        return _adapter().dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """What `to_json` wrote.

        Raises:
            ValueError: something else, or a part of it.
        """
        return _adapter().validate_json(text)

    @classmethod
    def json_schema(cls) -> str:
        """The JSON Schema of `to_json`, with what each part means."""
        return json.dumps(_adapter().json_schema(mode="serialization"), indent=1) + "\n"


def _adapter() -> Any:
    return pydantic.TypeAdapter(Comparison)


def format_interval(score: str, interval: Interval, *, unit: bool = False) -> str:
    """A score for people: its mean and, where there is one, half the width of its interval.

    Example:
        >>> format_interval("error", Interval(0.031, 0.03, 0.032, 5))
        '3.10±0.10'
    """
    how = SCORES[score]
    text = f"{interval.mean * how.scale:.{how.digits}f}"
    if interval.low is not None and interval.high is not None:
        text += f"±{(interval.high - interval.low) / 2 * how.scale:.{how.digits}f}"
    return f"{text} {how.unit}".rstrip() if unit else text


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a run cut short leaves no half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
