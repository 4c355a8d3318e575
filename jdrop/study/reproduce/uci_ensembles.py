"""Five networks with heads for mean and variance against one dropout network with the same heads.

Lakshminarayanan et al. 2017, Table 1, and beside it both methods with each paper's training.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import Array

from jdrop.study.data import Progress
from jdrop.study.reproduce import published, regression, uci
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol, labelled
from jdrop.study.reproduce.regression import Members, Readings
from jdrop.study.reproduce.uci_dropout import SETTINGS as DROPOUT_SETTINGS
from jdrop.train import gaussian_nll

ENSEMBLE_SIZE = 5
NUM_SAMPLES = 1000


@dataclass(frozen=True)
class Training:
    """How the networks of a paper train.

    Attributes:
        title: for tables.
        num_epochs: passes over the training rows.
        batch_size: rows of a step.
        learning_rate: of Adam.
    """

    title: str
    num_epochs: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Setting:
    """The networks for a data set.

    Attributes:
        table: the data set.
        rate: of the dropout network, as Gal and Ghahramani chose it.
        num_units: of the hidden layer.
        long: the training of Gal and Ghahramani.
        short: the training of Lakshminarayanan et al.
    """

    table: uci.Table
    rate: float
    num_units: int
    long: Training
    short: Training = Training("40 epochs", 40, 100, 0.1)


SETTINGS = tuple(
    Setting(
        setting.table,
        setting.rate,
        setting.num_units,
        Training("400 epochs", setting.num_epochs, 32, 1e-3),
    )
    for setting in DROPOUT_SETTINGS
)


def make_protocol(settings: tuple[Setting, ...] = SETTINGS) -> Protocol:
    """The protocol, on the seven tables by default."""
    by_name = {setting.table.name: setting for setting in settings}
    return Protocol(
        name="uci-ensembles",
        title="Five networks against one dropout network on UCI tables",
        paper="Lakshminarayanan et al. 2017, Simple and Scalable Predictive Uncertainty Estimation",
        url="https://arxiv.org/abs/1612.01474",
        summary=(
            "Networks of one hidden layer predict the mean and the variance of the target, and "
            "train on the negative log-likelihood; the networks of all splits train at once.",
            "The prediction of an ensemble is a normal distribution with the mean and the variance "
            f"of the mixture of {ENSEMBLE_SIZE} networks; that of a dropout network the same of "
            f"{NUM_SAMPLES:,} masks.",
            "The paper has its own networks with 40 epochs beside the dropout networks of Gal and "
            "Ghahramani 2016, with 400 epochs and one fixed variance. Here both methods have the "
            "same heads, and both have both trainings: 40 epochs of batches of 100 with the "
            "learning rate 0.1, and 400 (Protein: 200) of batches of 32 with 0.001.",
        ),
        leaves_open=(
            "The paper does not say whether the numbers of its Table 1 include adversarial "
            "training. Here the networks train without.",
            "The paper does not say how weights start, or what happens to the last batch. Here "
            "they start uniformly after Glorot, and the last batch is smaller.",
            "The variance is softplus of the second output plus 1e-6, of standardised targets.",
            "The rates of the dropout networks are those that Gal and Ghahramani chose for "
            "networks with one fixed variance. There is no weight decay.",
        ),
        replicate="split",
        spread="standard deviation",
        measures=_measures(),
        published=published.UCI_ENSEMBLES,
        parts=tuple(by_name),
        files=tuple(setting.table.file for setting in settings),
        run_part=partial(_run_part, by_name),
    )


def _measures() -> dict[str, Measure]:
    """The measures after each training."""
    measures: dict[str, Measure] = {}
    for prefix, epochs, after in (
        ("", "40", "after 40 epochs"),
        ("long-", "400", "after 400 epochs (Protein 200)"),
    ):
        for score, unit in (("RMSE", "in the target's unit"), ("NLL", "in nats")):
            name = score.lower()
            measures |= {
                f"{prefix}ensemble-{name}": Measure(
                    f"{score} DE, {epochs}",
                    f"{ENSEMBLE_SIZE} networks together (deep ensemble), {after}; {unit}.",
                ),
                f"{prefix}dropout-{name}": Measure(
                    f"{score} dropout, {epochs}", f"One dropout network, {after}; {unit}."
                ),
                f"{prefix}single-{name}": Measure(
                    f"{score} one, {epochs}",
                    f"The mean over the {ENSEMBLE_SIZE} networks, each alone, {after}; {unit}.",
                ),
            }
        measures[f"{prefix}difference"] = Measure(
            f"NLL dropout − DE, {epochs}",
            "The paired difference; above 0, the ensemble is better.",
            is_difference=True,
        )
    return measures


def _run_part(
    settings: dict[str, Setting], part: str, options: Options, progress: Progress
) -> PartResult:
    setting = settings[part]
    num_splits = options.count(setting.table.num_splits)
    splits = uci.load_splits(setting.table, options.data_dir, num_splits)
    part_key = jax.random.fold_in(jax.random.key(options.seed), list(settings).index(part))
    values: dict[str, np.ndarray] = {}
    trainings = (("", setting.short), ("long-", setting.long))
    for (prefix, training), key in zip(trainings, jax.random.split(part_key), strict=True):
        scores = _scores(
            key, setting, training, options.epochs(training.num_epochs), splits, progress
        )
        values |= {f"{prefix}{name}": array for name, array in scores.items()}
    rows = {part: {name: array.tolist() for name, array in values.items()}}
    long = setting.long.num_epochs
    return PartResult(rows, options.epochs(long), long, seconds=0.0)


def _scores(
    key: Array,
    setting: Setting,
    training: Training,
    num_epochs: int,
    splits: uci.Splits,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Trains both methods and returns a score for each split, by name."""
    ensemble_key, dropout_key, mask_key = jax.random.split(key, 3)
    network = regression.one_hidden_layer(setting.num_units, predicts_variance=True)
    # Networks of one split lie side by side, so that fewer splits change no network.
    members = _members(np.repeat(np.arange(splits.num_splits), ENSEMBLE_SIZE), 0.0)
    dropout_members = _members(np.arange(splits.num_splits), setting.rate)
    train = partial(
        regression.fit,
        network=network,
        optimizer=regression.adam_with_penalty(training.learning_rate),
        loss_fn=gaussian_nll,
        splits=splits,
        num_epochs=num_epochs,
        batch_size=training.batch_size,
    )
    label = f"{training.title}, ensemble"
    variables = train(ensemble_key, members=members, progress=labelled(progress, label))
    label = f"{training.title}, dropout"
    dropout_variables = train(
        dropout_key, members=dropout_members, progress=labelled(progress, label)
    )
    plain = regression.read_deterministic(network, variables, splits, members)
    dropout = regression.read_monte_carlo(
        mask_key,
        network,
        dropout_variables,
        splits,
        dropout_members,
        num_samples=NUM_SAMPLES,
        progress=labelled(progress, label),
    )
    single = {
        name: array.reshape(-1, ENSEMBLE_SIZE).mean(1)
        for name, array in _score(plain, splits, members.split).items()
    }
    pooled = regression.pooled(plain, ENSEMBLE_SIZE)
    ensemble = _score(pooled, splits, dropout_members.split)
    one = _score(dropout, splits, dropout_members.split)
    scores = {
        f"{method}-{name}": array
        for method, by_name in (("ensemble", ensemble), ("dropout", one), ("single", single))
        for name, array in by_name.items()
    }
    return {**scores, "difference": scores["dropout-nll"] - scores["ensemble-nll"]}


def _members(split: np.ndarray, rate: float) -> Members:
    zeros = np.zeros(len(split))
    return Members(split, np.full(len(split), rate), zeros, noise_variance=zeros + 1)


def _score(readings: Readings, splits: uci.Splits, split: np.ndarray) -> dict[str, np.ndarray]:
    """The RMSE and the NLL of one normal distribution, `[member]`, in the target's own unit."""
    targets, scale = splits.test_targets[split], splits.target_scale[split]
    variance = readings.second_moment - readings.mean**2
    log_density = regression.normal_log_density(readings.mean, variance, targets)
    return {
        "rmse": regression.rmse(readings.mean, targets, scale),
        "nll": -regression.log_likelihood(log_density, scale),
    }
