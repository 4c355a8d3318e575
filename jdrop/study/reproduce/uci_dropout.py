"""One dropout network on UCI tables, read by weight scaling and by Monte-Carlo dropout.

Gal and Ghahramani 2016, Table 1, and the files of their repository.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jdrop.study.data import Progress
from jdrop.study.reproduce import published, regression, uci
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol, labelled
from jdrop.study.reproduce.regression import Members, Readings

BATCH_SIZE = 32
LATER_BATCH_SIZE = 128
LEARNING_RATE = 1e-3
NUM_SAMPLES = 10_000
NETWORKS_PER_SPLIT = 5


@dataclass(frozen=True)
class Setting:
    """What the paper chose for a data set.

    Attributes:
        table: the data set.
        rate: of dropout, on the inputs and on the hidden layer.
        precision: of the targets in their own unit, tau.
        length_scale: of the prior of the weights.
        num_units: of the hidden layer.
        num_epochs: of the training.
    """

    table: uci.Table
    rate: float
    precision: float
    length_scale: float = 1e-2
    num_units: int = 50
    num_epochs: int = 400


SETTINGS = (
    Setting(uci.YACHT, 0.01, 0.541869562034, length_scale=0.1),
    Setting(uci.ENERGY, 0.05, 0.427114830213),
    Setting(uci.CONCRETE, 0.01, 0.0557319157756),
    Setting(uci.WINE, 0.05, 2.95833720839),
    Setting(uci.POWER, 0.005, 0.0871109017617),
    Setting(uci.NAVAL, 0.05, 42173.5152106, length_scale=1.0),
    Setting(uci.PROTEIN, 0.005, 0.0644419184588, num_units=100, num_epochs=200),
)


def make_protocol(settings: tuple[Setting, ...] = SETTINGS) -> Protocol:
    """The protocol, on the seven tables by default."""
    by_name = {setting.table.name: setting for setting in settings}
    return Protocol(
        name="uci-dropout",
        title="One dropout network on UCI tables",
        paper="Gal and Ghahramani 2016, Dropout as a Bayesian Approximation",
        url="https://arxiv.org/abs/1506.02142",
        summary=(
            "A network of one hidden layer with dropout on its inputs and its hidden units trains "
            f"on each of the standard splits. {NETWORKS_PER_SPLIT} networks of each split train, "
            "and all splits at once.",
            "A value of a split is the mean over the scores of its networks.",
            "Each network is read twice: by weight scaling, and by Monte-Carlo dropout with "
            f"{NUM_SAMPLES:,} masks.",
            "The published numbers are means over the splits, from the files of the authors' "
            "repository; the table of the paper rounds them.",
        ),
        leaves_open=(
            "The paper does not give the size of a batch. The authors' code at commit a6259f1 "
            "has 128. The code that was committed with the published numbers, a day before, has "
            "32, and only 32 gives the numbers of Yacht and Energy. A row shows networks with 128.",
            "The paper does not say how weights start, or what happens to the last batch. Here "
            "they start as in Keras, uniformly after Glorot, and the last batch is smaller.",
            "The paper's test rows took part in the choice of the rates and precisions, as the "
            "authors say in their repository. The published choices are used here.",
            "Initial weights, orders and masks differ from the paper's; the splits are the same. "
            "The paper has one network for each split, and other seeds change its means: that of "
            f"Yacht by a standard deviation of 0.05. Here the mean over {NETWORKS_PER_SPLIT} "
            "networks leaves less to chance. That was decided after a first run: with one network "
            "for each split, seed 0 gave 1.29 and 1.21 on Yacht, which do not agree.",
        ),
        replicate="split",
        spread="standard error",
        measures={
            "weight-scaling": Measure(
                "RMSE WS", "Weight scaling, the network without dropout; in the target's unit."
            ),
            "monte-carlo": Measure(
                "RMSE MC",
                f"Monte-Carlo dropout, the mean of {NUM_SAMPLES:,} masks, in the target's unit.",
            ),
            "difference": Measure(
                "RMSE WS − MC",
                "The paired difference of both RMSEs; above 0, Monte-Carlo is better.",
                is_difference=True,
            ),
            "log-likelihood": Measure(
                "LL MC",
                "The mean log-density of the targets under the mixture over masks, in nats.",
            ),
            "later-batch-size": Measure(
                f"RMSE WS, batch {LATER_BATCH_SIZE}",
                f"Weight scaling of other networks, trained with batches of {LATER_BATCH_SIZE} "
                f"rows in place of {BATCH_SIZE}.",
            ),
        },
        published=published.UCI_DROPOUT,
        parts=tuple(by_name),
        files=tuple(setting.table.file for setting in settings),
        run_part=partial(_run_part, by_name),
    )


def _run_part(
    settings: dict[str, Setting], part: str, options: Options, progress: Progress
) -> PartResult:
    setting = settings[part]
    num_splits = options.count(setting.table.num_splits)
    splits = uci.load_splits(setting.table, options.data_dir, num_splits)
    members, later_members = (
        regression.members_with_prior(
            splits, count, setting.rate, setting.precision, setting.length_scale
        )
        for count in (NETWORKS_PER_SPLIT, 1)
    )
    part_key = jax.random.fold_in(jax.random.key(options.seed), list(settings).index(part))
    fit_key, mask_key, later_key = jax.random.split(part_key, 3)
    network = regression.one_hidden_layer(setting.num_units)
    num_epochs = options.epochs(setting.num_epochs)
    train = partial(
        regression.fit,
        network=network,
        optimizer=regression.adam_with_penalty(LEARNING_RATE),
        loss_fn=regression.squared_error,
        splits=splits,
        num_epochs=num_epochs,
    )
    variables = train(fit_key, members=members, batch_size=BATCH_SIZE, progress=progress)
    later_variables = train(
        later_key,
        members=later_members,
        batch_size=LATER_BATCH_SIZE,
        progress=labelled(progress, f"batches of {LATER_BATCH_SIZE}"),
    )
    later = regression.read_deterministic(network, later_variables, splits, later_members)
    deterministic = regression.read_deterministic(network, variables, splits, members)
    sampled = regression.read_monte_carlo(
        mask_key,
        network,
        variables,
        splits,
        members,
        num_samples=NUM_SAMPLES,
        progress=progress,
    )
    values = {
        "weight-scaling": _rmse(deterministic, splits, members),
        "monte-carlo": _rmse(sampled, splits, members),
        "log-likelihood": _of_splits(
            regression.log_likelihood(sampled.log_density, splits.target_scale[members.split]),
            splits,
        ),
        "later-batch-size": _rmse(later, splits, later_members),
    }
    values["difference"] = values["weight-scaling"] - values["monte-carlo"]
    rows = {part: {name: array.tolist() for name, array in values.items()}}
    return PartResult(rows, num_epochs, setting.num_epochs, seconds=0.0)


def _rmse(readings: Readings, splits: uci.Splits, members: Members) -> np.ndarray:
    """The mean RMSE of the networks of each split, `[split]`."""
    targets, scale = splits.test_targets[members.split], splits.target_scale[members.split]
    return _of_splits(regression.rmse(readings.mean, targets, scale), splits)


def _of_splits(scores: np.ndarray, splits: uci.Splits) -> np.ndarray:
    """The mean score of the networks of each split."""
    return scores.reshape(splits.num_splits, -1).mean(1)
