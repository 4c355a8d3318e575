"""Evaluates predictions: scores, worth in plain networks, diversity. Nothing is trained here.

Scores are kept by replicate and, where they are means over examples, by example. Intervals are
taken over both.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jdrop.study.analyses import Influence
from jdrop.study.data import Predictions
from jdrop.study.evaluation.diversity import diversity_of_methods
from jdrop.study.evaluation.given_predictions import deal
from jdrop.study.evaluation.influence import influence
from jdrop.study.evaluation.losses import losses_of_readings
from jdrop.study.evaluation.margins import (
    CLASSIFICATION_MARGINS,
    choose_margins,
    regression_margins,
)
from jdrop.study.evaluation.masks import mask_curve, score_enumerated
from jdrop.study.evaluation.overfitting import score_overfitting
from jdrop.study.evaluation.points import Scorer, headline_of
from jdrop.study.evaluation.readings import (
    Reading,
    describe_diverged,
    in_target_unit,
    load_baselines,
    load_co_adaptation,
    load_exact,
    load_learning_curves,
    load_readings,
    load_subsets,
    load_sweep,
    load_tuning,
)
from jdrop.study.evaluation.sweep import score_sweep
from jdrop.study.parts import DataPart, SummaryPart
from jdrop.study.results import Comparison
from jdrop.study.run_folder import RunFolder, versions
from jdrop.study.scores import CURVE_SCORES
from jdrop.study.settings import Settings

__all__ = ["check_enough_are_left", "evaluate", "of_predictions"]


def check_enough_are_left(run: RunFolder) -> None:
    """Raises if so many networks have diverged that nothing can be compared; scores nothing.

    Args:
        run: a complete run.

    Raises:
        jdrop.study.diverged.DivergedError: as `evaluate` does.
    """
    load_readings(run, _settings(run), run.require("data", DataPart))


def _settings(run: RunFolder) -> Settings:
    names = (field.name for field in dataclasses.fields(Settings))
    return Settings.from_mapping({name: run.run_config[name] for name in names})


def evaluate(run: RunFolder, margins: Mapping[str, float] | None = None) -> Comparison:
    """Evaluates the predictions in a run folder.

    Args:
        run: a complete run.
        margins: by score, the largest difference that counts as none. The defaults in
            classification are 0.01 nats in NLL and 0.005 in Brier and error. In regression they
            are 0.01 nats, and a hundredth of the targets' standard deviation in CRPS. The margin
            of the MSE moves the RMSE of the largest plain ensemble by the same hundredth.

    Raises:
        UserError: if the run is incomplete, or a margin is of an unknown score.
    """
    data = run.require("data", DataPart)
    # The last part: without it others may be missing.
    summary = run.require("summary", SummaryPart)
    run.check_has(summary.parts)
    settings = _settings(run)
    labels = in_target_unit(data.test_labels, data)
    same, own = load_readings(run, settings, data)
    baselines = load_baselines(run, data, settings.replicates)
    same += baselines
    if own is not None:
        own += baselines
    readings = same if own is None else own
    defaults = CLASSIFICATION_MARGINS
    if data.task == "regression":
        plain = next(reading for reading in readings if reading.name == "plain")
        defaults = regression_margins(plain, labels, data.target_scale)
    all_margins = choose_margins(defaults, margins)
    scored = losses_of_readings([*readings, *([] if own is None else same)], labels)
    losses = _by_name(readings, scored[: len(readings)])
    groups = data.test_groups
    is_per_token = data.test_sequences is not None
    scorer = Scorer(labels, groups, all_margins, settings.budget, is_per_token=is_per_token)
    methods = scorer.results(readings, losses)
    same_epochs = None
    if own is not None:
        same_epochs = scorer.results(same, _by_name(same, scored[len(readings) :]))
    return Comparison(
        task=data.task,
        command=summary.command,
        settings=run.run_config,
        data=data.metadata,
        versions=summary.versions,
        seconds=summary.seconds,
        margins=all_margins,
        replicates=len(readings[0].outputs),
        methods=methods,
        same_epochs=same_epochs,
        # Networks that have all diverged have curves, but no scores to show beside them.
        tuning=[
            curve
            for curve in load_tuning(run, settings, data)
            if any(curve.method == reading.name for reading in readings)
        ],
        influence=_influences(readings, losses, data.task, groups, data.group_labels),
        diversity=diversity_of_methods(readings, labels),
        mask_curve=mask_curve(readings, losses, labels, groups),
        exact=score_enumerated(load_exact(run), labels, groups),
        overfitting=score_overfitting(load_subsets(run, settings, data), labels),
        learning_curves=load_learning_curves(run, data),
        co_adaptation=load_co_adaptation(run),
        sweep=score_sweep(load_sweep(run, data), labels, groups),
        left_out=[*describe_diverged(run), *summary.left_out],
    )


def _by_name(
    readings: Sequence[Reading], losses: Sequence[dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    return {reading.name: each for reading, each in zip(readings, losses, strict=True)}


def _influences(
    readings: Sequence[Reading],
    losses: Mapping[str, Mapping[str, np.ndarray]],
    task: str,
    groups: np.ndarray | None,
    group_labels: Sequence[str] | None,
) -> list[Influence]:
    """Which examples carry the differences of `Comparison.headline` to the plain networks."""
    method, score = headline_of(readings), CURVE_SCORES[task][0]
    if method.name == "plain":
        return []
    size = method.table[0]
    plain = losses["plain"][score]
    sizes = next(reading.sizes for reading in readings if reading.name == "plain")
    return [
        influence(
            losses[method.name][score][:, method.sizes.index(size)],
            plain[:, index],
            groups,
            group_labels,
            method=method.name,
            size=size,
            against=against,
            score=score,
        )
        for index, against in ((0, 1), (-1, sizes[-1]))
    ]


def of_predictions(
    predictions: Predictions,
    name: str,
    replicates: int,
    margins: Mapping[str, float] | None = None,
    command: str = "jdrop.study.evaluation.of_predictions",
) -> Comparison:
    """Evaluates given predictions.

    The networks of each method are dealt out to replicates. A replicate gets at least two plain
    networks and one network of each method with several, so there may be fewer replicates than
    asked for. If a method has one network, all replicates share it, and its intervals hold for
    this network only. `left_out` says which of these happened, and which networks are unused.

    Args:
        predictions: of all methods.
        name: of the data set.
        replicates: how many groups the networks form, at least 2.
        margins: see `evaluate`.
        command: the command that made the predictions, for the report.

    Raises:
        UserError: if the names of two methods differ only in "_" and "-", or a margin is of an
            unknown score.
    """
    labels = predictions.labels
    readings, notes = deal(predictions.log_probs, replicates)
    num_replicates, num_plain = readings[0].outputs.shape[:2]
    all_margins = choose_margins(CLASSIFICATION_MARGINS, margins)
    losses = _by_name(readings, losses_of_readings(readings, labels))
    groups = predictions.groups
    methods = Scorer(labels, groups, all_margins, num_plain).results(readings, losses)
    curve = mask_curve(readings, losses, labels, groups)
    if curve is None and {"dropout", "monte-carlo"} <= {*losses}:
        notes.append(
            "How many masks score as well as weight scaling is not computed: this compares the "
            "same networks, and one of dropout and monte_carlo is a single network."
        )
    return Comparison(
        task="classification",
        command=command,
        settings={"replicates": num_replicates},
        data={
            "name": name,
            "train_size": None,
            "test_size": len(labels),
            "num_classes": predictions.log_probs["plain"].shape[-1],
            "label_noise": 0.0,
            "ood_name": None,
            "group_name": None if groups is None else "group",
            "num_groups": None if groups is None else len(np.unique(groups)),
            "groups_in_training": False,
        },
        versions=versions(),
        seconds={},
        margins=all_margins,
        replicates=num_replicates,
        methods=methods,
        same_epochs=None,
        tuning=[],
        influence=_influences(readings, losses, "classification", groups, predictions.group_labels),
        diversity=diversity_of_methods(readings, labels),
        mask_curve=curve,
        exact=None,
        overfitting=[],
        learning_curves={},
        co_adaptation={},
        sweep=[],
        left_out=[
            "Costs, training and the claims of the theory are not in predictions.",
            *notes,
        ],
    )
