"""The results of a comparison as plain data, and their JSON.

A `Comparison` holds every number that a table, a figure or the report shows.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pydantic

from jdrop.statistics import EnsembleEquivalent, EquivalenceTest, Interval
from jdrop.study.analyses import (
    Cell,
    CoAdaptation,
    Diversity,
    Exact,
    Influence,
    LearningCurve,
    MaskCurve,
    Overfitting,
    TuningCurve,
)
from jdrop.study.errors import UserError
from jdrop.study.scores import CURVE_SCORES, SCORES

SCHEMA_VERSION = 2
"""Version of the JSON; it rises when an older reader would misread the results."""


@dataclass(frozen=True)
class Cost:
    """What training the networks, and one prediction by them, cost.

    Attributes:
        train_flops: floating-point operations of the training, counted by the compiler.
        search_flops: floating-point operations of the cross-validation that chose the epochs and
            the weight decay; each network stands for one fold of one replicate.
        train_seconds: share of the time in which all networks trained together, without
            compilation.
        predict_flops: floating-point operations to predict one example.
        predict_seconds: seconds to predict one example, as its share of a pass over all examples.
        parameters: count of the stored parameters.
        bytes: size of all stored variables, with masks and batch statistics.
    """

    train_flops: float
    search_flops: float
    train_seconds: float
    predict_flops: float
    predict_seconds: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Reliability:
    """How often the top class is right, by its probability. Each list has one value per bin.

    Attributes:
        confidence: mean probability of the top class; NaN in an empty bin.
        accuracy: share of examples whose top class is right; NaN in an empty bin.
        share: share of all examples that are in the bin.
    """

    confidence: list[float]
    accuracy: list[float]
    share: list[float]


@dataclass(frozen=True)
class RiskCoverage:
    """The error on the most confident examples, against their share.

    Attributes:
        coverage: share of the examples, rising.
        risk: error on these examples, mean over replicates.
    """

    coverage: list[float]
    risk: list[float]


@dataclass(frozen=True)
class Point:
    """One method at one size.

    Attributes:
        size: count of averaged networks or masks.
        epochs: how many epochs the networks trained; None if unknown.
        weight_decay: of AdamW; None for Adam, or if unknown.
        cost: of training them, and of one prediction by them; None if unknown.
        scores: by name, the mean over replicates and test examples, with the 95 % interval for new
            trainings and new test examples.
        over_seeds: by name, the same means with the 95 % interval for new trainings on these test
            examples. All methods share the luck of the test examples.
        minus_single: by name, this mean minus that of one plain network, with its 95 % interval.
        minus_ensemble: by name, this mean minus that of the largest average of plain networks, with
            its 95 % interval.
        minus_headline: by name, this mean minus that of the headline's method, with its 95 %
            interval; see `Comparison.headline`.
        worth: by name, how many plain networks must be averaged to score as well.
        against_ensemble: by name, the test of equivalence with the largest average of plain
            networks.
        unreliable: names of scores that say nothing about this method, such as calibrated scores
            of a test set that is solved. Tables mark them.
        reliability: only for sizes that tables show.
        risk_coverage: only for sizes that tables show.
    """

    size: int
    epochs: int | None
    weight_decay: float | None
    cost: Cost | None
    scores: dict[str, Interval]
    over_seeds: dict[str, Interval]
    minus_single: dict[str, Interval]
    minus_ensemble: dict[str, Interval]
    minus_headline: dict[str, Interval]
    worth: dict[str, EnsembleEquivalent]
    against_ensemble: dict[str, EquivalenceTest]
    unreliable: list[str] = field(default_factory=list)
    reliability: Reliability | None = None
    risk_coverage: RiskCoverage | None = None


@dataclass(frozen=True)
class MethodResult:
    """The results of one method at each of its sizes.

    Attributes:
        name: such as "plain" or "monte-carlo".
        label: for tables and figures; "{n}" stands for the size.
        explanation: a description of the method in a sentence.
        unit: what the size counts, "networks" or "masks".
        points: by rising size.
        table: the sizes that tables show.
        retrained: whether each replicate has networks of its own. If not, one network was given:
            the intervals hold for this network, not for training it anew.
        is_control: whether the method is a control of equal budget, such as weight decay.
        is_baseline: whether it is a simple model, such as logistic regression, that is no network.
    """

    name: str
    label: str
    explanation: str
    unit: str
    points: list[Point]
    table: list[int]
    retrained: bool = True
    is_control: bool = False
    is_baseline: bool = False

    def point(self, size: int) -> Point:
        """Returns the point of this size.

        Raises:
            KeyError: if the method was not evaluated at this size.
        """
        for point in self.points:
            if point.size == size:
                return point
        raise KeyError(f"{self.name} has no point of size {size}")

    def title(self, size: int | str) -> str:
        """Returns the label for one size, or for a text in the place of the size."""
        # Not `str.format`: the label of given predictions may hold other braces.
        return self.label.replace("{n}", "one" if size == 1 else str(size))


@dataclass(frozen=True, repr=False)
class Comparison:
    """All results of a comparison.

    In JSON, infinite numbers are the string "Infinity" and NaN is "NaN". A `worth` of
    "Infinity" lies beyond the largest ensemble.

    Attributes:
        schema_version: version of the JSON.
        task: "classification" or "regression".
        command: the command or function call that made the results.
        settings: all settings of the run, as plain values.
        data: name and sizes of the data set.
        versions: of the software, and the device.
        seconds: the time of the session that completed the run.
        margins: by score, the largest difference that counts as none.
        replicates: count of replicates, over which the intervals are taken.
        methods: all methods, the plain networks first. If the run was tuned, each is trained for
            the epochs, and with the weight decay, that cross-validation chose for it.
        same_epochs: all methods, each trained for the epochs of the settings; None if the run was
            not tuned, since `methods` then holds this.
        tuning: the curves of the cross-validation; empty without it.
        influence: which examples carry the difference of the headline's method to one plain
            network, and to the largest average of plain networks, in this order.
        diversity: of methods with several members.
        mask_curve: None where no masks were drawn, or not for the networks of weight scaling.
        exact: None where nothing was enumerated.
        overfitting: by method and training size.
        learning_curves: by method.
        co_adaptation: by method.
        sweep: empty where nothing was swept.
        left_out: a sentence for each thing that was not computed.
    """

    __pydantic_config__ = pydantic.ConfigDict(ser_json_inf_nan="strings")

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    task: str
    command: str
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    margins: dict[str, float]
    replicates: int
    methods: list[MethodResult]
    same_epochs: list[MethodResult] | None
    tuning: list[TuningCurve]
    influence: list[Influence]
    diversity: list[Diversity]
    mask_curve: MaskCurve | None
    exact: Exact | None
    overfitting: list[Overfitting]
    learning_curves: dict[str, LearningCurve]
    co_adaptation: dict[str, CoAdaptation]
    sweep: list[Cell]
    left_out: list[str]

    def __repr__(self) -> str:
        """The difference to all plain networks and the worth of each method, a line for each."""
        score = self.curve_scores[0]
        title, unit = SCORES[score].title, SCORES[score].unit
        lines = [
            f"Comparison on {self.data['name']!r}, {self.task}, {self.replicates} replicates; "
            f"{title} minus that of {self.ensemble.size} plain networks in {unit}, and worth in "
            "plain networks:",
        ]
        for method, point in self.table:
            if method.name == "plain":
                continue
            minus = point.minus_ensemble[score]
            ends = (
                ""
                if minus.low is None or minus.high is None
                else f" [{minus.low:+.3f}, {minus.high:+.3f}]"
            )
            lines.append(
                f"{method.title(point.size)}: {minus.mean:+.3f}{ends}, worth {point.worth[score]}"
            )
        return "\n  ".join(lines)

    def method(self, name: str) -> MethodResult:
        """Returns the method of this name.

        Raises:
            KeyError: if the comparison has no such method.
        """
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method {name!r}; there are {', '.join(m.name for m in self.methods)}")

    @property
    def curve_scores(self) -> tuple[str, ...]:
        """The scores in which methods have a `worth`, the main score first."""
        return CURVE_SCORES[self.task]

    @property
    def is_per_token(self) -> bool:
        """Whether the examples are tokens with a label of their own."""
        return self.data.get("test_sequences") is not None

    @property
    def has_costs(self) -> bool:
        """Whether the cost of each network is known; simple models have none."""
        networks = [method for method in self.methods if not method.is_baseline]
        return all(point.cost is not None for method in networks for point in method.points)

    @property
    def ensemble(self) -> Point:
        """The largest average of plain networks."""
        return self.method("plain").points[-1]

    @property
    def headline(self) -> tuple[MethodResult, Point] | None:
        """The method that the first sentence is about: one dropout network.

        Without dropout networks it is the first method after the plain networks, at the first size
        of the table; None if there is none.
        """
        methods = [
            method for method in self.methods if method.name != "plain" and not method.is_baseline
        ]
        methods.sort(key=lambda method: method.name != "dropout")
        return (methods[0], methods[0].point(methods[0].table[0])) if methods else None

    @property
    def single(self) -> Point:
        """One plain network."""
        return self.method("plain").points[0]

    @property
    def table(self) -> list[tuple[MethodResult, Point]]:
        """The points that tables show; simple models are the last."""
        methods = sorted(self.methods, key=lambda method: method.is_baseline)
        return [(method, method.point(size)) for method in methods for size in method.table]

    def to_json(self) -> str:
        """Returns the comparison as JSON, which `from_json` reads."""
        return _adapter().dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """Reads the JSON that `to_json` wrote.

        Raises:
            UserError: if the text is not JSON, or has another `schema_version`.
            ValueError: if the text is other JSON.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"results must be complete JSON, as to_json writes it: {error}."
            ) from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"results must have the schema_version {SCHEMA_VERSION}, got {version}. Read them "
                "with the version of jdrop that wrote them, or draw the report of the run folder "
                "again."
            )
        return _adapter().validate_json(text)

    @classmethod
    def json_schema(cls) -> str:
        """Returns the JSON Schema of `to_json`, with a description of each field."""
        return json.dumps(_adapter().json_schema(mode="serialization"), indent=1) + "\n"


def _adapter() -> Any:
    return pydantic.TypeAdapter(Comparison)
