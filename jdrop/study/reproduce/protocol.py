"""What a protocol of a paper is, and which of our numbers agree with the paper's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scipy import stats

from jdrop.statistics import EnsembleEquivalent, Interval, mean_interval
from jdrop.study.data import Progress


@dataclass(frozen=True)
class Options:
    """What a user chooses of a run.

    Attributes:
        data_dir: the folder of all data.
        splits: at most so many splits, or seeds, of each part; None for all of the protocol.
        fraction: the share of the protocol's epochs, or of its updates, in (0, 1].
        seed: of initial weights, orders of examples and masks.
    """

    data_dir: Path
    splits: int | None = None
    fraction: float = 1.0
    seed: int = 0

    def epochs(self, of_paper: int) -> int:
        """The epochs to train, at least one."""
        return max(1, round(self.fraction * of_paper))

    def count(self, of_paper: int) -> int:
        """How many splits to run."""
        return of_paper if self.splits is None else min(self.splits, of_paper)


@dataclass(frozen=True)
class Published:
    """A number of a paper.

    Attributes:
        text: as it is printed, such as "5.23".
        spread: the standard error or the standard deviation that stands beside it, as printed;
            None where the paper gives none. `Protocol.spread` says which of the two it is.
        replicates: over how many splits the number is a mean.
    """

    text: str
    spread: str | None
    replicates: int

    @property
    def value(self) -> float:
        """The number."""
        return float(self.text)

    @property
    def decimals(self) -> int:
        """How many decimals are printed."""
        return len(self.text.partition(".")[2])


@dataclass(frozen=True)
class Statement:
    """What a paper says of a paired difference in words, without a number.

    Attributes:
        text: for the table, such as "no clear difference".
        sign: "+" or "-" for a difference of that sign, "0" for none that is clear; "0+" or "0-" if
            both fit the statement.
    """

    text: str
    sign: Literal["+", "-", "0", "0+", "0-"]


@dataclass(frozen=True)
class Measure:
    """What is measured, such as the RMSE of one reading.

    Attributes:
        title: for tables.
        explanation: a sentence.
        is_difference: whether it is a paired difference, of which the sign counts.
    """

    title: str
    explanation: str
    is_difference: bool = False


@dataclass(frozen=True)
class PartResult:
    """What a part of a protocol measured, as the run folder stores it.

    Attributes:
        values: by row of the table and by measure, a value for each replicate.
        epochs: how many epochs the networks trained.
        paper_epochs: how many the paper's networks trained.
        seconds: how long the part took.
        worth: by row and by measure, how many networks a method is worth.
    """

    values: dict[str, dict[str, list[float]]]
    epochs: int
    paper_epochs: int
    seconds: float
    worth: dict[str, dict[str, EnsembleEquivalent]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """An experiment of a paper.

    Attributes:
        name: for the command.
        title: what is reproduced.
        paper: authors, year and title.
        url: of the paper.
        summary: sentences that say what is trained and how it is read.
        leaves_open: sentences that say what the paper leaves open, and what is taken here.
        replicate: what a mean is over: splits of the examples, or seeds of the networks.
        spread: what the paper prints beside its means.
        measures: by name, in the order of the table.
        published: the paper's numbers and statements, by row and measure.
        parts: the names of the parts, such as data sets; the cheap ones first.
        files: the files that the protocol reads, as paths in the folder of all data.
        run_part: computes the values of a part; the runner measures its seconds.
        describe_fraction: a sentence on what a fraction below 1 changes; None if it changes the
            epochs alone.
    """

    name: str
    title: str
    paper: str
    url: str
    summary: tuple[str, ...]
    leaves_open: tuple[str, ...]
    replicate: Literal["split", "seed"]
    spread: Literal["standard error", "standard deviation"]
    measures: Mapping[str, Measure]
    published: Mapping[tuple[str, str], Published | Statement]
    parts: tuple[str, ...]
    files: tuple[str, ...]
    run_part: Callable[[str, Options, Progress], PartResult]
    describe_fraction: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Cell:
    """A number of the paper beside ours.

    Attributes:
        row: of the table, such as the data set.
        measure: the name of a measure of the protocol.
        paper: the published number or statement; None where the paper has none.
        ours: our mean and its 95 % interval, or how many networks a method is worth.
        agrees: whether ours agrees with the paper's by the rule of `agreement`, or has the sign of
            the paper's statement; None without either.
        overlaps: whether both 95 % intervals overlap; None where one of them is unknown.
        minutes: how long the part took.
    """

    row: str
    measure: str
    paper: Published | Statement | None
    ours: Interval | EnsembleEquivalent
    agrees: bool | None
    overlaps: bool | None
    minutes: float


def labelled(progress: Progress, label: str) -> Progress:
    """Reports progress under a label, such as the name of a part."""

    def report(what: str, done: int, total: int) -> None:
        progress(f"{label}: {what}", done, total)

    return report


def cells(protocol: Protocol, results: Mapping[str, PartResult]) -> list[Cell]:
    """The cells of all parts that are complete, in the order of the protocol.

    Args:
        protocol: with the published numbers.
        results: by name of the part.
    """
    shown = []
    for part in protocol.parts:
        if (result := results.get(part)) is None:
            continue
        minutes = result.seconds / 60
        for row, values in result.values.items():
            worth = result.worth.get(row, {})
            for name in protocol.measures:
                if name in values:
                    shown.append(_cell(protocol, row, name, values[name], minutes))
                elif name in worth:
                    shown.append(Cell(row, name, None, worth[name], None, None, minutes))
    return shown


def _cell(protocol: Protocol, row: str, name: str, values: list[float], minutes: float) -> Cell:
    ours = mean_interval(values)
    published = protocol.published.get((row, name))
    if published is None:
        return Cell(row, name, None, ours, None, None, minutes)
    if isinstance(published, Statement):
        our_sign = sign(ours)
        agrees = None if our_sign is None else our_sign in published.sign
        return Cell(row, name, published, ours, agrees, None, minutes)
    theirs = paper_interval(published, protocol.spread)
    agrees = agreement(published, ours, theirs, protocol.measures[name].is_difference)
    return Cell(row, name, published, ours, agrees, overlap(theirs, ours), minutes)


def paper_interval(published: Published, spread: str) -> Interval:
    r"""Student's 95 % interval of a published mean.

    $\bar v \pm t_{n-1} s$ with the published standard error $s$, or the standard deviation over
    $\sqrt n$.

    Args:
        published: the number; without a spread, or of a single replicate, it has no interval.
        spread: "standard error" or "standard deviation".

    Example:
        >>> interval = paper_interval(Published("1.0", "0.1", 5), "standard error")
        >>> f"{interval.low:.2f} {interval.high:.2f}"
        '0.72 1.28'
    """
    count = published.replicates
    if published.spread is None or count < 2:
        return Interval(published.value, None, None, count)
    error = float(published.spread)
    if spread == "standard deviation":
        error /= count**0.5
    half_width = float(stats.t.ppf(0.975, count - 1)) * error
    return Interval(
        published.value, published.value - half_width, published.value + half_width, count
    )


def agreement(
    published: Published, ours: Interval, theirs: Interval, is_difference: bool
) -> bool | None:
    """Whether our number agrees with the paper's.

    A mean agrees if it lies within the published standard error, or standard deviation, of the
    published mean; ours is rounded to the paper's decimals first. A mean that is published without
    a spread agrees if our 95 % interval holds a number that rounds to it. A paired difference whose
    published interval excludes 0 agrees if ours lies on the same side of 0; any other if both
    intervals overlap.

    Args:
        published: the paper's number.
        ours: our mean and its interval.
        theirs: the interval of the paper's number, from `paper_interval`.
        is_difference: whether the numbers are paired differences.

    Example:
        >>> ours = Interval(5.31, 5.1, 5.5, 20)
        >>> published = Published("5.23", "0.12", 20)
        >>> agreement(published, ours, paper_interval(published, "standard error"), False)
        True
    """
    if is_difference:
        if sign(theirs) in ("+", "-"):
            return None if sign(ours) is None else sign(ours) == sign(theirs)
        return overlap(theirs, ours)
    if published.spread is not None:
        # The last digit of a printed number is rounded, and so may be a spread of 0.00.
        difference = abs(round(ours.mean, published.decimals) - published.value)
        return difference <= float(published.spread) + 1e-9 * abs(published.value)
    if ours.low is None or ours.high is None:
        return None
    rounding = 0.5 * 10.0**-published.decimals
    return ours.low - rounding <= published.value <= ours.high + rounding


def overlap(one: Interval, other: Interval) -> bool | None:
    """Whether two intervals overlap; None if one of them has no ends."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low <= other.high and other.low <= one.high


def sign(interval: Interval) -> Literal["+", "-", "0"] | None:
    """The sign of a difference; "0" if its interval holds 0, None if it has no interval."""
    if interval.low is None or interval.high is None:
        return None
    if interval.low > 0:
        return "+"
    return "-" if interval.high < 0 else "0"
