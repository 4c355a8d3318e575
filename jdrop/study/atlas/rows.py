"""What a study says, as a row of the atlas."""

import csv
import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.data import DataError
from jdrop.study.report.sentence import ENOUGH, controls_that_do_as_well, second_score
from jdrop.study.results import Comparison

MOST_EPOCHS = "†"
MOST_EPOCHS_NOTE = (
    f"{MOST_EPOCHS} the epochs chosen are the most that were tried; more may be better"
)

CONTROL = "weight-decay"
"""The control that the atlas names: the usual other way to regularise one network."""


@dataclass(frozen=True)
class Row:
    """One dropout network in a study, each method trained for its own best epochs.

    Attributes:
        title: of the study, for readers.
        data: the data set.
        source: the folder of the study.
        train_size: training examples; None if unknown.
        units: of each hidden layer; None if unknown, as are the next two.
        rate: of the dropout.
        label_noise: share of wrong training labels.
        score: the main score of the study, "nll" or "calibrated_nll".
        ensemble_size: plain networks in the largest average.
        plain: score of one plain network.
        dropout: score of one dropout network.
        average: score of the largest average of plain networks.
        minus_single: dropout minus one plain network, with its 95 % interval.
        minus_ensemble: dropout minus the largest average, with its 95 % interval.
        plain_minus_ensemble: one plain network minus the largest average, with its 95 % interval.
        worth: the plain networks that must be averaged to score as well.
        verdict: of the test of equivalence with the largest average.
        second_score: "error" or "mse".
        second_worth: as `worth`, in the second score.
        control_does_as_well: whether a plain network with weight decay does as well, or better
            where dropout is not enough; None if unknown.
        dropout_has_most_epochs: whether cross-validation chose the most epochs that it could for
            one dropout network, so that more may be better; None if unknown.
        average_has_most_epochs: the same of the largest average of plain networks.
        minutes: of the session that completed the study; None if unknown.
        command: that runs the study alone; None if unknown.
    """

    title: str
    data: str
    source: str
    train_size: int | None
    units: int | None
    rate: float | None
    label_noise: float | None
    score: str
    ensemble_size: int
    plain: float
    dropout: float
    average: float
    minus_single: Interval
    minus_ensemble: Interval
    plain_minus_ensemble: Interval
    worth: EnsembleEquivalent
    verdict: str
    second_score: str
    second_worth: EnsembleEquivalent
    control_does_as_well: bool | None
    dropout_has_most_epochs: bool | None
    average_has_most_epochs: bool | None
    minutes: float | None
    command: str | None

    @property
    def is_enough(self) -> bool:
        """Whether one dropout network is as good as the largest average, or better."""
        return self.verdict in ENOUGH

    @property
    def only_averaging_helps(self) -> bool:
        """Whether the average is shown to be better than one plain network, and dropout is not.

        Dropout must be worse than the average too.
        """
        high, low = self.minus_single.high, self.plain_minus_ensemble.low
        averaging_helps = low is not None and low > 0
        return self.verdict == "worse" and averaging_helps and (high is None or high >= 0)

    @property
    def mark(self) -> str:
        """A dagger behind a name if more epochs may be better for dropout or for the average."""
        has_most = self.dropout_has_most_epochs or self.average_has_most_epochs
        return f" {MOST_EPOCHS}" if has_most else ""


def row_of(
    comparison: Comparison, title: str, *, data: str, source: str, units: int, rate: float
) -> Row:
    """The row of a comparison.

    Args:
        comparison: of plain and dropout networks.
        title: for readers.
        data: the data set.
        source: the folder of the study.
        units: of each hidden layer.
        rate: of the dropout.
    """
    point = comparison.method("dropout").point(1)
    score, second = comparison.curve_scores[0], second_score(comparison)
    has_control = any(method.name == CONTROL for method in comparison.methods)
    as_well = [method.name for method in controls_that_do_as_well(comparison)]
    return Row(
        title=title,
        data=data,
        source=source,
        train_size=comparison.data["train_size"],
        units=units,
        rate=rate,
        label_noise=comparison.data["label_noise"],
        score=score,
        ensemble_size=comparison.ensemble.size,
        plain=comparison.single.scores[score].mean,
        dropout=point.scores[score].mean,
        average=comparison.ensemble.scores[score].mean,
        minus_single=point.minus_single[score],
        minus_ensemble=point.minus_ensemble[score],
        plain_minus_ensemble=comparison.single.minus_ensemble[score],
        worth=point.worth[score],
        verdict=point.against_ensemble[score].verdict,
        second_score=second,
        second_worth=point.worth[second],
        control_does_as_well=CONTROL in as_well if has_control else None,
        dropout_has_most_epochs=_has_most_epochs(comparison, "dropout", 1),
        average_has_most_epochs=_has_most_epochs(comparison, "plain", comparison.ensemble.size),
        minutes=comparison.seconds["this run"] / 60,
        command=comparison.command,
    )


def _has_most_epochs(comparison: Comparison, method: str, size: int) -> bool:
    """Whether the chosen epochs are the last candidate."""
    return any(
        curve.chosen == curve.epochs[-1]
        for curve in comparison.tuning
        if (curve.method, curve.size) == (method, size) and curve.chosen is not None
    )


def rows_of_studies(folder: Path) -> list[Row]:
    """The rows of studies whose reports lie in the folders of a folder, by name.

    A folder without a `scores.csv` is left out.

    Raises:
        DataError: no folder holds a table of scores, or one lacks what a row shows.
        OSError: a file cannot be read.
    """
    paths = sorted(folder.glob("*/scores.csv"))
    if not paths:
        raise DataError(
            f"--studies must be a folder of reports, but no folder in {folder} holds a scores.csv; "
            "take the folder above those of the reports."
        )
    return [_row_of_csv(path) for path in paths]


def _row_of_csv(path: Path) -> Row:
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        largest = max(int(line["size"]) for line in lines if line["method"] == "plain")
        # The first view has each method's own epochs.
        found = {
            (line["method"], int(line["size"]), line["score"]): line for line in reversed(lines)
        }
        score, second = (
            ("nll", "error") if ("plain", 1, "nll") in found else ("calibrated_nll", "mse")
        )
        dropout, plain = found["dropout", 1, score], found["plain", 1, score]
        return Row(
            title=path.parent.name,
            data=f"{path.parent.name}: {_data_of(path.parent)}",
            source=path.parent.as_posix(),
            train_size=None,
            units=None,
            rate=None,
            label_noise=None,
            score=score,
            ensemble_size=largest,
            plain=_number(plain, "mean"),
            dropout=_number(dropout, "mean"),
            average=_number(found["plain", largest, score], "mean"),
            minus_single=_interval(dropout, "minus_single"),
            minus_ensemble=_interval(dropout, "minus_ensemble"),
            plain_minus_ensemble=_interval(plain, "minus_ensemble"),
            worth=_worth(dropout, largest),
            verdict=dropout["verdict"],
            second_score=second,
            second_worth=_worth(found["dropout", 1, second], largest),
            control_does_as_well=None,
            dropout_has_most_epochs=None,
            average_has_most_epochs=None,
            minutes=None,
            command=None,
        )
    except DataError as error:
        raise DataError(f"{path} cannot be shown in the atlas: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} must be the scores.csv of a report with plain and dropout networks, but lacks "
            f"{error}; take a folder of reports for --studies."
        ) from error


def _data_of(folder: Path) -> str:
    """The name of the data, from the title of a report."""
    report = folder / "report.html"
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    match = re.search("<title>(.*?)</title>", text)
    return "" if match is None else html.unescape(match.group(1)).partition(":")[0]


def _interval(line: Mapping[str, str], column: str) -> Interval:
    mean, low, high = (_number(line, column + end) for end in ("", "_low", "_high"))
    return Interval(mean, low, high, 0)


def _worth(line: Mapping[str, str], largest: int) -> EnsembleEquivalent:
    value, low, high = (_number(line, name) for name in ("worth", "worth_low", "worth_high"))
    refusal = "The study refuses it." if line["verdict"] == "refused" else None
    return EnsembleEquivalent(value, low, high, largest, refusal)


def _number(line: Mapping[str, str], column: str) -> float:
    """The number in a column. Raises if the cell is empty, as intervals of one replicate are."""
    if not line[column]:
        raise DataError(
            f"the column {column} of {line['method']}, size {line['size']}, score {line['score']} "
            "is empty; take a study of at least two replicates, or leave its folder out."
        )
    return float(line[column])
