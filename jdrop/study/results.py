"""The results of a comparison as plain data, and their JSON.

A `Comparison` holds every number that a table, a figure or the report shows.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pydantic

from jdrop.statistics import EnsembleEquivalent, EquivalenceTest, Interval
from jdrop.study.errors import UserError
from jdrop.study.scores import CURVE_SCORES, SCORES

SCHEMA_VERSION = 1
"""Version of the JSON; it rises when an older reader would misread the results."""


@dataclass(frozen=True)
class Cost:
    """What training the networks, and one prediction by them, cost.

    Attributes:
        train_flops: floating-point operations of the training, counted by the compiler, including
            the search for hyperparameters where there was one.
        train_seconds: share of the time in which all networks trained together, without
            compilation.
        predict_flops: floating-point operations to predict one example.
        predict_seconds: seconds to predict one example, as its share of a pass over all examples.
        parameters: count of the stored parameters.
        bytes: size of all stored variables, with masks and batch statistics.
    """

    train_flops: float
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
        cost: of training them, and of one prediction by them; None if unknown.
        scores: by name, the mean over replicates and test examples, with the 95 % interval for new
            trainings and new test examples.
        over_seeds: by name, the same means with the 95 % interval for new trainings on these test
            examples. All methods share the luck of the test examples.
        worth: by name, how many plain networks must be averaged to score as well.
        against_ensemble: by name, the test of equivalence with the largest average of plain
            networks.
        reliability: only for sizes that tables show.
        risk_coverage: only for sizes that tables show.
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
    """

    name: str
    label: str
    explanation: str
    unit: str
    points: list[Point]
    table: list[int]
    retrained: bool = True

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


@dataclass(frozen=True)
class Ambiguity:
    """Why an average scores better than its members: `pool = members - diversity`.

    Attributes:
        members: mean loss of the members.
        diversity: how much lower the loss of the average is.
        pool: loss of the average.
    """

    members: Interval
    diversity: Interval
    pool: Interval


@dataclass(frozen=True)
class Diversity:
    """How much the members of an average differ, for masks and seeds on one scale.

    Attributes:
        method: name of the method.
        size: count of compared networks or masks, equal for all methods.
        disagreement: share of examples on which two members differ in their top class.
        pairwise_kl: mean Kullback-Leibler divergence over ordered pairs, in nats.
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
    """The scores of Monte-Carlo averages by their count of masks, and those of weight scaling.

    Attributes:
        num_masks: counts of averaged masks.
        scores: by score, the mean over replicates at each count.
        weight_scaling: by score, for the same networks.
        masks_needed: by score, how many masks score as well as weight scaling.
    """

    num_masks: list[int]
    scores: dict[str, list[float]]
    weight_scaling: dict[str, float]
    masks_needed: dict[str, EnsembleEquivalent]


@dataclass(frozen=True)
class Exact:
    """Scores of a small dropout network whose masks were all enumerated.

    Attributes:
        num_units: hidden units that may be dropped, in two layers.
        num_masks: 2 to the power of `num_units`.
        weight_scaling: by score.
        geometric: of the normalised geometric mean over all masks, by score.
        arithmetic: of the mean over all masks, by score.
        nonlinearity_gap: weight scaling minus geometric, by score: the cost of the non-linearity.
        pool_gap: geometric minus arithmetic, by score: the cost of the pool.
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
    """Training and test scores of single networks, for one method and one training size.

    Attributes:
        networks: "plain" or "dropout".
        train_size: count of training examples.
        train: by score.
        test: by score.
        gap: test minus training, by score.
    """

    networks: str
    train_size: int
    train: dict[str, Interval]
    test: dict[str, Interval]
    gap: dict[str, Interval]


@dataclass(frozen=True)
class LearningCurve:
    """Scores during training, mean over the first network of each replicate.

    Attributes:
        epochs: epochs after which the scores were taken.
        train: by score, on the training examples.
        test: by score, on the test examples.
    """

    epochs: list[int]
    train: dict[str, list[float]]
    test: dict[str, list[float]]


@dataclass(frozen=True)
class CoAdaptation:
    """Statistics of the hidden units of plain or dropout networks.

    Attributes:
        correlation: by layer, the mean absolute correlation of two units.
        zero_share: by layer, the share of activations that are zero.
        sparseness: by layer, after Treves and Rolls, in [0, 1]: 1 for one active unit in many.
        activation_counts: by layer, a histogram of activations, as shares, from `activation_min` to
            `activation_max`.
        activation_min: by layer, the smallest activation, or 0 where none is negative.
        activation_max: by layer, the largest activation, or `activation_min + 1` where all are
            equal.
        deleted: shares of hidden units that were deleted.
        deletion: by score, its mean at each share.
        features: first-layer weights as square tiles, `[tile][pixel]`, of one network: weights into
            a unit, or a channel of a convolution's filter. None where they are no images.
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
    """One combination of the swept settings.

    Attributes:
        at: the value of each swept setting.
        scores: by "plain", "ensemble" and "dropout", then by score.
        worth: by score, the worth of one dropout network, predicting by weight scaling.
    """

    at: dict[str, int | float]
    scores: dict[str, dict[str, Interval]]
    worth: dict[str, EnsembleEquivalent]


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
        methods: all methods, the plain networks first.
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
    diversity: list[Diversity]
    mask_curve: MaskCurve | None
    exact: Exact | None
    overfitting: list[Overfitting]
    learning_curves: dict[str, LearningCurve]
    co_adaptation: dict[str, CoAdaptation]
    sweep: list[Cell]
    left_out: list[str]

    def __repr__(self) -> str:
        """The data set and each method's worth: all numbers would fill hundreds of screens."""
        main_score = self.curve_scores[0]
        worths = [
            f"{method.title(point.size)}: {point.worth[main_score]}"
            for method, point in self.table
            if method.name != "plain"
        ]
        lines = [
            f"Comparison on {self.data['name']!r}, {self.task}, {self.replicates} replicates; "
            f"worth in plain networks by {SCORES[main_score].title}, of {self.ensemble.size}:",
            *worths,
        ]
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
    def has_costs(self) -> bool:
        """Whether the cost of each point is known."""
        return all(point.cost is not None for method in self.methods for point in method.points)

    @property
    def ensemble(self) -> Point:
        """The largest average of plain networks."""
        return self.method("plain").points[-1]

    @property
    def table(self) -> list[tuple[MethodResult, Point]]:
        """The points that tables show."""
        return [(method, method.point(size)) for method in self.methods for size in method.table]

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
