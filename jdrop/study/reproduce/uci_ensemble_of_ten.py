"""The ensemble of ten dropout networks that averaged scores, and ten networks that are pooled.

Mukhoti and Gal 2018: the tables of their repository. Their "ensemble of 10 networks" is the mean of
ten RMSEs and of ten log-likelihoods, not a score of averaged predictions.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import Array

from jdrop.network import Network, Variables
from jdrop.study.data import Progress
from jdrop.study.reproduce import published, regression, uci
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol, labelled
from jdrop.study.reproduce.regression import Members, Readings

ENSEMBLE_SIZE = 10
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
LENGTH_SCALE = 1e-2
NUM_SAMPLES = 10_000
NUM_VALIDATION_SAMPLES = 1000
RATES = (0.005, 0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Setting:
    """The networks for a data set, and what is chosen for them.

    Attributes:
        table: the data set.
        precisions: of the targets in their own unit, of which validation chooses one.
        num_units: of the hidden layer.
        num_epochs: of the training.
    """

    table: uci.Table
    precisions: tuple[float, ...]
    num_units: int = 50
    num_epochs: int = 4000


SETTINGS = (
    Setting(uci.YACHT, (0.25, 0.5, 0.75)),
    Setting(uci.ENERGY, (0.25, 0.5, 0.75)),
    Setting(uci.CONCRETE, (0.025, 0.05, 0.075)),
    Setting(uci.WINE, (2.5, 3.0, 3.5)),
    Setting(uci.POWER, (0.05, 0.1, 0.15)),
    Setting(uci.NAVAL, (30_000.0, 40_000.0, 50_000.0)),
    Setting(uci.PROTEIN, (0.025, 0.05, 0.075), num_units=100, num_epochs=2000),
)


def make_protocol(settings: tuple[Setting, ...] = SETTINGS) -> Protocol:
    """The protocol, on the seven tables by default."""
    by_name = {setting.table.name: setting for setting in settings}
    num_pairs = len(RATES) * max(len(setting.precisions) for setting in settings)
    return Protocol(
        name="uci-ensemble-of-ten",
        title="Ten dropout networks, averaged as published and pooled",
        paper="Mukhoti and Gal 2018, DropoutUncertaintyExps, Experiment 2",
        url="https://github.com/omegafragger/DropoutUncertaintyExps",
        summary=(
            "Validation on a fifth of the training rows chooses the rate and the precision of each "
            "split, by the log-likelihood. Ten dropout networks then train on all training rows.",
            f"A dropout network predicts the mixture over {NUM_SAMPLES:,} masks.",
            "Averaged: the mean of the ten networks' scores, which was published as an ensemble. "
            "Pooled: the score of the average of their predictions. Plain: ten networks without "
            "dropout, with the same precision and no weight decay, pooled.",
        ),
        leaves_open=(
            "How many masks validation drew is left to the code, 10,000; here there are "
            f"{NUM_VALIDATION_SAMPLES:,}, since they only choose among "
            f"{num_pairs} pairs of a rate and a precision.",
            "The published weights start as in Keras, uniformly after Glorot, and so do these.",
            "The published standard deviations are over splits.",
        ),
        replicate="split",
        spread="standard deviation",
        measures=_measures(),
        published=published.UCI_ENSEMBLE_OF_TEN,
        parts=tuple(by_name),
        files=tuple(setting.table.file for setting in settings),
        run_part=partial(_run_part, by_name),
    )


def _measures() -> dict[str, Measure]:
    ten = {
        "one": "One dropout network.",
        "averaged": "The mean of the scores of ten dropout networks, published as an ensemble.",
        "pooled": "The score of ten dropout networks' average prediction.",
        "plain": "The score of ten plain networks' average prediction.",
    }
    measures = {
        f"{name}-{score}": Measure(f"{score.upper()} {name}", explanation)
        for score in ("rmse", "ll")
        for name, explanation in ten.items()
    }
    differences = {
        "averaged-difference": ("LL averaged − one", "The published “gain” of ten networks."),
        "pooled-difference": ("LL pooled − one", "The gain of ten networks that are pooled."),
        "plain-difference": ("LL plain − pooled", "Below 0, ten dropout networks are better."),
    }
    for name, (title, explanation) in differences.items():
        measures[name] = Measure(title, f"Paired. {explanation}", is_difference=True)
    return measures


def _run_part(
    settings: dict[str, Setting], part: str, options: Options, progress: Progress
) -> PartResult:
    setting = settings[part]
    num_splits = options.count(setting.table.num_splits)
    num_epochs = options.epochs(setting.num_epochs)
    numbers = uci.read_table(setting.table, options.data_dir)
    splits = uci.split_rows(numbers, setting.table.num_features, num_splits)
    part_key = jax.random.fold_in(jax.random.key(options.seed), list(settings).index(part))
    choice_key, dropout_key, plain_key, mask_key = jax.random.split(part_key, 4)
    network = regression.one_hidden_layer(setting.num_units)
    validation = uci.validation_splits(numbers, setting.table.num_features, num_splits)
    rates, precisions = _choose(
        choice_key, setting, network, validation, num_epochs, labelled(progress, "validation")
    )
    dropout = regression.members_with_prior(
        splits,
        ENSEMBLE_SIZE,
        np.repeat(rates, ENSEMBLE_SIZE),
        np.repeat(precisions, ENSEMBLE_SIZE),
        LENGTH_SCALE,
    )
    variables = _fit(dropout_key, network, splits, dropout, num_epochs, progress)
    sampled = regression.read_monte_carlo(
        mask_key,
        network,
        variables,
        splits,
        dropout,
        num_samples=NUM_SAMPLES,
        progress=progress,
    )
    plain = Members(
        dropout.split, 0 * dropout.rate, 0 * dropout.weight_decay, dropout.noise_variance
    )
    label = labelled(progress, "plain networks")
    plain_variables = _fit(plain_key, network, splits, plain, num_epochs, label)
    plain_readings = regression.read_deterministic(network, plain_variables, splits, plain)
    each = _score(sampled, splits, ENSEMBLE_SIZE)
    scores = {
        "one": {name: array[:, 0] for name, array in each.items()},
        "averaged": {name: array.mean(1) for name, array in each.items()},
        "pooled": _pooled_score(sampled, splits),
        "plain": _pooled_score(plain_readings, splits),
    }
    values = {
        f"{method}-{name}": array
        for method, by_name in scores.items()
        for name, array in by_name.items()
    }
    values["averaged-difference"] = values["averaged-ll"] - values["one-ll"]
    values["pooled-difference"] = values["pooled-ll"] - values["one-ll"]
    values["plain-difference"] = values["plain-ll"] - values["pooled-ll"]
    rows = {part: {name: array.tolist() for name, array in values.items()}}
    return PartResult(rows, num_epochs, setting.num_epochs, seconds=0.0)


def _choose(
    key: Array,
    setting: Setting,
    network: Network,
    validation: uci.Splits,
    num_epochs: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """The rate and the precision of each split with the largest validation log-likelihood."""
    fit_key, mask_key = jax.random.split(key)
    candidates = [(rate, precision) for rate in RATES for precision in setting.precisions]
    rates, precisions = np.array(candidates).T
    num_splits, num_candidates = validation.num_splits, len(candidates)
    members = regression.members_with_prior(
        validation,
        num_candidates,
        np.tile(rates, num_splits),
        np.tile(precisions, num_splits),
        LENGTH_SCALE,
    )
    variables = _fit(fit_key, network, validation, members, num_epochs, progress)
    readings = regression.read_monte_carlo(
        mask_key,
        network,
        variables,
        validation,
        members,
        num_samples=NUM_VALIDATION_SAMPLES,
        progress=progress,
    )
    log_likelihood = _score(readings, validation, num_candidates)["ll"]
    # A network that diverged has NaN, which argmax would take for the largest.
    best = np.where(np.isnan(log_likelihood), -np.inf, log_likelihood).argmax(1)
    return rates[best], precisions[best]


def _fit(
    key: Array,
    network: Network,
    splits: uci.Splits,
    members: Members,
    num_epochs: int,
    progress: Progress,
) -> Variables:
    return regression.fit(
        key,
        network,
        regression.adam_with_penalty(LEARNING_RATE),
        regression.squared_error,
        splits,
        members,
        num_epochs=num_epochs,
        batch_size=BATCH_SIZE,
        progress=progress,
    )


def _score(
    readings: Readings, splits: uci.Splits, networks_per_split: int
) -> dict[str, np.ndarray]:
    """The RMSE and the log-likelihood of each network or mixture, `[split, network]`."""
    split = np.repeat(np.arange(splits.num_splits), networks_per_split)
    targets, scale = splits.test_targets[split], splits.target_scale[split]
    scores = {
        "rmse": regression.rmse(readings.mean, targets, scale),
        "ll": regression.log_likelihood(readings.log_density, scale),
    }
    return {name: array.reshape(-1, networks_per_split) for name, array in scores.items()}


def _pooled_score(readings: Readings, splits: uci.Splits) -> dict[str, np.ndarray]:
    """The scores of the average prediction of each split's networks, `[split]`."""
    scores = _score(regression.pooled(readings, ENSEMBLE_SIZE), splits, 1)
    return {name: array[:, 0] for name, array in scores.items()}
