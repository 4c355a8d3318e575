"""What a comparison found: its numbers, the sentence that sums them up, and their JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jdrop.statistics import Interval

SCORES = ("error", "nll", "brier", "ece")
"""The scores of `jdrop.metrics`; lower is better for each."""

HEADLINE_SIZE = 5
"""The ensemble size that tables show beside one network."""


@dataclass(frozen=True)
class Row:
    """The scores of one way to make predictions.

    Attributes:
        networks: what was trained, "plain" or "dropout".
        reading: how a network was read, "weight scaling" or "Monte-Carlo".
        ensemble_size: how many networks were averaged.
        passes: forward passes for one prediction.
        parameters: of all averaged networks together.
        train_seconds: to train them, as their share of the time that all networks of the kind took.
        test: by score, its mean over groups of networks and the interval that disjoint groups
            give it.
        train: the same on the training examples; None where that was not computed.
        gap: the same for the score on test less that on training examples.
    """

    networks: str
    reading: str
    ensemble_size: int
    passes: int
    parameters: int
    train_seconds: float
    test: dict[str, Interval]
    train: dict[str, Interval] | None
    gap: dict[str, Interval] | None

    @property
    def label(self) -> str:
        """The row's name in tables and figures."""
        count = "one" if self.ensemble_size == 1 else f"average of {self.ensemble_size}"
        return f"{count} plain" if self.networks == "plain" else f"{count} dropout, {self.reading}"


@dataclass(frozen=True)
class Curve:
    """Errors while networks of one kind trained: the mean over them.

    Attributes:
        epochs: after how many epochs each value was taken.
        train_error: on the training examples.
        test_error: on the test examples.
    """

    epochs: list[int]
    train_error: list[float]
    test_error: list[float]


@dataclass(frozen=True)
class Comparison:
    """Everything that a run of the comparison found.

    Attributes:
        settings: the settings that made it, as plain values.
        data: name and sizes of the data set.
        versions: of the software, and the device.
        seconds: where the time of the run went.
        rows: all scores.
        curves: by "plain" and "dropout", the errors during training.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    rows: list[Row]
    curves: dict[str, Curve]

    def row(self, networks: str, ensemble_size: int, reading: str = "weight scaling") -> Row:
        """The row of this kind.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.networks, row.ensemble_size, row.reading) == (networks, ensemble_size, reading):
                return row
        raise KeyError(f"no row for {ensemble_size} {networks} networks read by {reading}")

    @property
    def headline_size(self) -> int:
        """The ensemble size of the table: 5, or all networks if they are fewer."""
        return min(HEADLINE_SIZE, self.settings["members"])

    @property
    def headline(self) -> list[Row]:
        """The rows of the table."""
        size = self.headline_size
        return [
            self.row("plain", 1),
            self.row("plain", size),
            self.row("dropout", 1),
            self.row("dropout", 1, "Monte-Carlo"),
            self.row("dropout", size),
        ]

    def matching_size(self, score: str, value: float) -> int | None:
        """The smallest plain ensemble whose mean score is at least as good as `value`.

        None where no size up to all networks is.
        """
        for size in range(1, self.settings["members"] + 1):
            # Equal shares of wrong examples may differ in their last digit.
            if self.row("plain", size).test[score].mean <= value + 1e-7:
                return size
        return None

    def worth(self, score: str) -> str:
        """How many averaged plain networks match one dropout network, read by weight scaling.

        In brackets the same for the worse and the better end of the dropout network's interval;
        "≤1" where one plain network does as well, ">20" where an average of 20 does not.
        """

        def matched(value: float) -> str:
            size = self.matching_size(score, value)
            return (
                f">{self.settings['members']}" if size is None else "≤1" if size == 1 else f"{size}"
            )

        interval = self.row("dropout", 1).test[score]
        text = matched(interval.mean)
        if interval.low is not None and interval.high is not None:
            text += f" [{matched(interval.high)}, {matched(interval.low)}]"
        return text

    def sentence(self) -> str:
        """The answer: how many plain networks one dropout network is worth."""
        dropout, plain = self.row("dropout", 1), self.row("plain", 1)
        ensemble = self.row("plain", self.headline_size)
        noise = self.data["label_noise"]
        wrong = f", {noise:.0%} of them with wrong labels," if noise else ","
        return (
            f"On {self.data['name']} with {self.data['train_size']:,} training examples{wrong} one "
            f"dropout network (weight scaling) is worth {self.worth('nll')} averaged plain "
            f"networks in NLL and {self.worth('error')} in error, at "
            f"about {dropout.train_seconds / plain.train_seconds:.1f} times the training time of "
            f"one: "
            f"NLL {_number('nll', dropout)} and error {_number('error', dropout)}, beside "
            f"{_number('nll', plain)} and {_number('error', plain)} of one plain network, "
            f"{_number('nll', ensemble)} and {_number('error', ensemble)} of the average of "
            f"{ensemble.ensemble_size}."
        )

    def to_json(self) -> str:
        """The comparison as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """What `to_json` wrote."""
        fields = json.loads(text)

        def intervals(scores: dict[str, Any] | None) -> dict[str, Interval] | None:
            return scores and {name: Interval(**interval) for name, interval in scores.items()}

        fields["rows"] = [
            Row(**{**row, **{part: intervals(row[part]) for part in ("test", "train", "gap")}})
            for row in fields["rows"]
        ]
        fields["curves"] = {name: Curve(**curve) for name, curve in fields["curves"].items()}
        return cls(**fields)


def format_score(score: str, interval: Interval) -> str:
    """A score for people: its mean and, where there is one, half the width of its interval.

    Error and ECE are shown in percent, without a sign for it.
    """
    scale, digits = (100, 2) if score in ("error", "ece") else (1, 3)
    text = f"{interval.mean * scale:.{digits}f}"
    if interval.high is not None:
        text += f" ± {(interval.high - interval.mean) * scale:.{digits}f}"
    return text


def _number(score: str, row: Row) -> str:
    mean = row.test[score].mean
    return f"{mean:.2%}" if score == "error" else f"{mean:.3f}"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a run cut short leaves no half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
