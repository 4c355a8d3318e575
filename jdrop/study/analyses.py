"""What a comparison finds beside its methods' scores: why averages help, and what carries them.

Every class is plain data, a field of `jdrop.study.results.Comparison`.
"""

from dataclasses import dataclass

from jdrop.statistics import EnsembleEquivalent, Interval


@dataclass(frozen=True)
class Influence:
    """Which test examples carry the difference of two methods' mean losses.

    The loss of an example is its mean over replicates. A negative difference favours the method.

    Attributes:
        method: name of the method.
        size: of its average.
        against: how many averaged plain networks it is compared with.
        score: name of the loss.
        difference: mean difference of the losses.
        share_better: share of the examples whose loss is smaller by the method.
        share_worse: share of the examples whose loss is larger by the method.
        half: the fewest examples that carry half of the difference: the sum of their differences is
            at least half of the sum over all examples. None if the difference is 0.
        without: by a count of examples ("5"), the mean difference of the others if the examples
            that carry most of it are left out.
        largest_group: name of the group of examples that carries most of the difference; None
            without groups.
        largest_group_share: its share of the difference.
        without_largest_group: the mean difference of the examples of the other groups.
        differences: sorted differences of the examples; of more than 1,001 examples, quantiles at
            equal distances.
        cumulative: sums of the sorted differences over the number of examples, at the same places:
            the last one is `difference`.
    """

    method: str
    size: int
    against: int
    score: str
    difference: float
    share_better: float
    share_worse: float
    half: int | None
    without: dict[str, float]
    largest_group: str | None
    largest_group_share: float | None
    without_largest_group: float | None
    differences: list[float]
    cumulative: list[float]


@dataclass(frozen=True)
class TuningCurve:
    """The loss of a method on training examples that were left out, by the epochs of its training.

    Attributes:
        method: name of the method.
        size: of its average.
        weight_decay: of AdamW; None for Adam.
        epochs: the candidates.
        losses: at each candidate, the mean loss (NLL or squared error) of left-out examples.
        chosen: the epochs that the method trains at this size; None if another weight decay was
            chosen.
        choice_shares: at each candidate, in what share of resamples of the training examples it is
            chosen, among all weight decays. The networks that are scored stay the same. None where
            this is unknown, or where the method's epochs are given.
    """

    method: str
    size: int
    weight_decay: float | None
    epochs: list[int]
    losses: list[float]
    chosen: int | None
    choice_shares: list[float] | None = None


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
        minus_weight_scaling: by score, the loss of all masks minus that of weight scaling.
        masks_needed: by score, how many masks score as well as weight scaling.
    """

    num_masks: list[int]
    scores: dict[str, list[float]]
    weight_scaling: dict[str, float]
    minus_weight_scaling: dict[str, Interval]
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
