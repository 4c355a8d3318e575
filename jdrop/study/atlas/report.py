"""The report of the atlas: the sentences, the table, the figure, and the files of its folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from rich import box
from rich.table import Table
from rich.text import Text

from jdrop.statistics import Interval
from jdrop.study.atlas.cells import (
    MAX_CONTROLS_SIZE,
    MIN_EPOCHS,
    SHARED,
    SHARED_FLAGS,
    STEPS,
    TABLE_LEARNING_RATE,
    TABLE_STEPS,
    Cell,
    Group,
)
from jdrop.study.atlas.figure import draw
from jdrop.study.atlas.rows import MOST_EPOCHS_NOTE, Row
from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.report.figures.svg import inline_svg
from jdrop.study.report.numbers import difference_text, mean_text, share_text
from jdrop.study.report.page import fill

HEADER = (
    "data",
    "training examples",
    "units",
    "rate",
    "wrong labels",
    "NLL: one plain",
    "one dropout",
    "average",
    "dropout − average",
    "worth",
    "enough?",
    "worth in error or MSE",
    "weight decay as well?",
    "minutes",
)

NOTES = (
    "Each row is a study of `jdrop`. All methods train on the same examples, each for the epochs "
    "that cross-validation on the training examples chose for it. With wrong labels, "
    "cross-validation reads wrong labels too, while the test labels are right. So methods may "
    "train for other epochs than would be best on the test.",
    "NLL: of one plain network, of one dropout network (weight scaling), and of the average of all "
    "plain networks, in nats. In regression it is the NLL with the noise fitted on the other half "
    "of the test examples. Dropout − average: with its 95 % interval for new trainings and new "
    "test examples; below 0, dropout is better.",
    "Worth: how many plain networks must be averaged to score as well, with its 95 % interval. ≤1: "
    "one does. >: all are too few. Not resolved: the interval holds every count, or the data are "
    "too few.",
    "Enough?: the verdict of the study, whether one dropout network is as good as the average "
    "within a margin of 0.01 nats. Better: by more than the margin. Equivalent or not worse: "
    "enough. Worse: by more than the margin. Undecided: none of these. Refused: the data are too "
    "few. Two one-sided tests at 5 %, with the 90 % interval, decide the verdict. So it may differ "
    "from what the 95 % interval beside it suggests. Each verdict errs in at most about 5 % of "
    "studies, so a few of many are wrong by chance.",
    "Weight decay as well?: what one plain network with weight decay is. Where dropout is enough: "
    "enough too, or no. Elsewhere: better than dropout, or no.",
    "Minutes: of the session that completed the study, with all methods, without its scores.",
)
"""What all columns and verdicts mean."""


@dataclass(frozen=True)
class Atlas:
    """All that is known so far.

    Attributes:
        groups: of all cells.
        rows: by cell, of the studies that are complete.
        studies: rows of studies that were stored before.
        left_out: a sentence for each data set that is not there.
        failed: by title of a cell, a sentence that says why it failed.
        missing: cells that have not run yet.
        command: what the user typed.
    """

    groups: Sequence[Group]
    rows: dict[Cell, Row]
    studies: Sequence[Row]
    left_out: Sequence[str]
    failed: dict[str, str]
    missing: list[Cell]
    command: str

    @property
    def own_rows(self) -> list[Row]:
        """Each complete cell once, in the order of the figure."""
        cells = dict.fromkeys(cell for group in self.groups for cell in group.cells)
        return [self.rows[cell] for cell in cells if cell in self.rows]

    @property
    def all_rows(self) -> list[Row]:
        """The complete cells, then the stored studies."""
        return [*self.own_rows, *self.studies]

    @property
    def grouped_rows(self) -> list[tuple[str, list[tuple[str, Row]]]]:
        """By group its title, and a label and the row of each study that is complete."""
        grouped = [
            (
                group.title,
                [
                    (group.label(cell) + self.rows[cell].mark, self.rows[cell])
                    for cell in group.cells
                    if cell in self.rows
                ],
            )
            for group in self.groups
        ]
        stored = [(row.title + row.mark, row) for row in self.studies]
        sizes = sorted({row.ensemble_size for row in self.studies})
        counts = " or ".join(map(str, sizes))
        return [*grouped, (f"Stored studies, with {counts} plain networks", stored)]


def answer(atlas: Atlas) -> list[str]:
    """Sentences that count the studies by verdict, and name them; stored ones count apart."""
    if not atlas.all_rows:
        return ["No study is complete yet."]

    def counts(
        text: str, condition: Callable[[Row], bool], among: Callable[[Row], bool] = lambda _: True
    ) -> list[str]:
        """A sentence; none if there is no study to count among."""
        parts = []
        for name, rows in (("", atlas.own_rows), ("stored ", atlas.studies)):
            counted = [row for row in rows if among(row)]
            if not counted:
                continue
            titles = [row.title for row in counted if condition(row)]
            noun = name + ("study" if len(counted) == 1 else "studies")
            names = f" ({'; '.join(titles)})" if titles else ""
            parts.append(f"{len(titles)} of {len(counted)} {noun}{names}")
        return [f"{text} {' and in '.join(parts)}."] if parts else []

    texts = [
        *counts(
            "One dropout network is better than the average of all plain networks, by more than "
            "the margin, in",
            lambda row: row.verdict == "better",
        ),
        *counts(
            "Dropout is enough, but not better than the average, in",
            lambda row: row.is_enough and row.verdict != "better",
        ),
        *counts("Dropout is worse than the average in", lambda row: row.verdict == "worse"),
        *counts(
            "Where dropout is worse, only averaging is shown to improve on one plain network in",
            lambda row: row.only_averaging_helps,
            lambda row: row.verdict == "worse",
        ),
        *counts(
            "The verdict is undecided or refused in",
            lambda row: row.verdict in ("undecided", "refused"),
        ),
        *counts(
            "Where dropout is enough, one plain network with weight decay is enough too in",
            lambda row: bool(row.control_does_as_well),
            lambda row: row.is_enough and row.control_does_as_well is not None,
        ),
        *counts(
            "Dropout trained for the most epochs that cross-validation tried, so more may be "
            "better, in",
            lambda row: bool(row.dropout_has_most_epochs),
            lambda row: row.dropout_has_most_epochs is not None,
        ),
        *counts(
            "The average trained for the most epochs that cross-validation tried, so more may be "
            "better, in",
            lambda row: bool(row.average_has_most_epochs),
            lambda row: row.average_has_most_epochs is not None,
        ),
    ]
    if atlas.missing:
        texts.append(f"Not run yet: {'; '.join(cell.title for cell in atlas.missing)}.")
    return texts


def notes(atlas: Atlas) -> list[str]:
    """What the cells, the columns, the verdicts and the dagger mean."""
    mark = [f"{MOST_EPOCHS_NOTE}."] if any(row.mark for row in atlas.all_rows) else []
    return [*mark, *NOTES, shared_settings()]


def table_rows(atlas: Atlas) -> list[list[str]]:
    """The rows of the table; see `HEADER`."""
    return [_table_row(row) for row in atlas.all_rows]


def _table_row(row: Row) -> list[str]:
    means = (row.plain, row.dropout, row.average)
    as_well = "enough too" if row.is_enough else "better than dropout"
    control = {None: "", True: as_well, False: "no"}[row.control_does_as_well]
    return [
        row.data + row.mark,
        "" if row.train_size is None else f"{row.train_size:,}",
        "" if row.units is None else f"{row.units}",
        "" if row.rate is None else f"{row.rate:g}",
        "" if row.label_noise is None else share_text(row.label_noise),
        *(mean_text(row.score, Interval(mean, None, None, 1)) for mean in means),
        difference_text(row.score, row.minus_ensemble),
        str(row.worth),
        row.verdict,
        str(row.second_worth),
        control,
        "" if row.minutes is None else f"{row.minutes:.1f}",
    ]


def shared_settings() -> str:
    """A sentence on the settings of all cells."""
    return (
        f"All cells share these settings: {SHARED['replicates']} replicates of "
        f"{SHARED['ensemble-size']} plain and {SHARED['budget']} dropout networks; MLPs with two "
        f"hidden layers; batches of {SHARED['batch-size']}; {SHARED['num-samples']} masks; "
        f"{' '.join(SHARED_FLAGS)}. The epochs of the settings make about {STEPS:,} steps "
        f"({TABLE_STEPS:,} in regression, where the learning rate is {TABLE_LEARNING_RATE:g}), but "
        f"at least {MIN_EPOCHS} epochs. A method may train for twice as many. All other "
        "settings are the defaults of `jdrop`. "
        f"Above {MAX_CONTROLS_SIZE:,} training examples no control methods train, such as weight "
        "decay, to save time."
    )


def terminal(atlas: Atlas) -> Table:
    """The table for a terminal of 80 columns: what was found, without settings and scores."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "dropout − average", "worth", "enough?"):
        table.add_column(name, overflow="fold")
    for row in atlas.all_rows:
        difference = difference_text(row.score, row.minus_ensemble)
        cells = (row.title, difference, str(row.worth), row.verdict)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def to_json(atlas: Atlas) -> str:
    """Everything as JSON; infinite numbers are the string "Infinity"."""
    values = {
        "answer": answer(atlas),
        "studies": atlas.all_rows,
        "left_out": atlas.left_out,
        "failed": atlas.failed,
        "not_run": [cell.title for cell in atlas.missing],
        "shared": SHARED,
        "notes": notes(atlas),
        "command": atlas.command,
        "table": {"header": HEADER, "rows": table_rows(atlas)},
    }
    adapter: Any = pydantic.TypeAdapter(
        dict[str, Any], config=pydantic.ConfigDict(ser_json_inf_nan="strings")
    )
    text = adapter.dump_json(values, indent=1).decode()
    assert json.loads(text)
    return text + "\n"


def write(atlas: Atlas, folder: Path) -> None:
    """Writes `atlas.json`, `atlas.png`, `atlas.md` and `atlas.html` into a folder.

    Args:
        atlas: what is known so far.
        folder: files of the same names are replaced.

    Raises:
        OSError: a file cannot be written.
    """
    write_text(folder / "atlas.json", to_json(atlas))
    figure = draw(atlas.grouped_rows)
    svg = None
    if figure is not None:
        with replacing(folder / "atlas.png") as partial:
            figure.savefig(partial, dpi=160, format="png")
        svg = inline_svg(figure, "atlas")
    values = {
        "answer": answer(atlas),
        "header": HEADER,
        "rows": table_rows(atlas),
        "notes": notes(atlas),
        "svg": svg,
        "left_out": atlas.left_out,
        "failed": atlas.failed,
        "command": atlas.command,
        "commands": {row.title: row.command for row in atlas.all_rows if row.command},
        "sources": [f"{row.title}: {row.source}" for row in atlas.studies],
    }
    for name in ("atlas.md", "atlas.html"):
        write_text(folder / name, fill("jdrop.study.atlas", f"{name}.jinja", **values))
