"""The cells of the atlas: each is a study that the command `jdrop` runs too."""

import itertools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jdrop.study.report.numbers import share_text
from jdrop.study.reproduce import uci

SHARED = {"replicates": 5, "ensemble-size": 10, "budget": 3, "num-samples": 10, "batch-size": 50}
"""The settings of all cells that differ from the defaults, or that the epochs depend on."""

SHARED_FLAGS = ("--no-theory",)

MAX_CONTROLS_SIZE = 2000
"""Training examples up to which the control methods train too, which cost as much as all others."""

NUM_LAYERS = 2
"""Hidden layers of each network, equally wide."""

UNITS = 64
"""Of a hidden layer, where they do not vary."""

RATE, TABLE_RATE = 0.5, 0.1
"""Dropout rates where they do not vary. Papers on the tables of regression drop less."""

STEPS, TABLE_STEPS = 1000, 1500
"""Training steps that the epochs of the settings make; a method may train for twice as many."""

TABLE_LEARNING_RATE = 0.01
"""Of Adam. With the default, most tables would need more steps than these."""

MIN_EPOCHS = 15

DIGITS = "digits"

FEATURES = {DIGITS: 64, "mnist": 784, "fashion-mnist": 784}
"""By data set of images, the pixels of one."""

NUM_CLASSES = 10

TABLES = {
    Path(table.file).stem: table
    for table in (
        uci.YACHT,
        uci.ENERGY,
        uci.CONCRETE,
        uci.WINE,
        uci.POWER,
        uci.NAVAL,
        uci.PROTEIN,
    )
}
"""The tables of regression, by the name of their file."""

MAX_TABLE_ROWS, MAX_TEST_ROWS = 2000, 5000
"""Training and test rows of a table; a fifth of a smaller table is held out for testing."""

OVERHEAD = 4e10
"""The cost of compiling and scoring a cell, in the unit of `Cell.cost`."""


@dataclass(frozen=True)
class Cell:
    """A study of the atlas.

    Attributes:
        data: the data set: one of `FEATURES` or `TABLES`.
        train_size: training examples.
        units: of each hidden layer.
        rate: of the dropout of hidden units.
        label_noise: share of training labels that are made wrong.
    """

    data: str
    train_size: int
    units: int = UNITS
    rate: float = RATE
    label_noise: float = 0.0

    @property
    def name(self) -> str:
        """The name of its folder.

        Example:
            >>> Cell("digits", 500, label_noise=0.2).name
            'digits-500-units-64-rate-0.5-noise-0.2'
        """
        return (
            f"{self.data}-{self.train_size}-units-{self.units}-rate-{self.rate:g}"
            f"-noise-{self.label_noise:g}"
        )

    @property
    def title(self) -> str:
        """A name for readers: what differs from the usual cell stands behind the examples.

        Example:
            >>> Cell("digits", 500, units=16).title, Cell("yacht", 246, rate=TABLE_RATE).title
            ('digits 500, 16 units', 'yacht 246')
        """
        usual_rate = TABLE_RATE if self.is_table else RATE
        words = [f"{self.data} {self.train_size:,}"]
        words += [f"{self.units} units"] * (self.units != UNITS)
        words += [f"rate {self.rate:g}"] * (self.rate != usual_rate)
        words += [f"{share_text(self.label_noise)} wrong labels"] * (self.label_noise > 0)
        return ", ".join(words)

    @property
    def is_table(self) -> bool:
        """Whether it is a regression on a table."""
        return self.data in TABLES

    @property
    def epochs(self) -> int:
        """The epochs of the settings, so that small and large data have as many steps."""
        steps = TABLE_STEPS if self.is_table else STEPS
        return max(MIN_EPOCHS, round(steps * SHARED["batch-size"] / self.train_size))

    @property
    def cost(self) -> float:
        """An estimate: the overhead, and examples x parameters x epochs x networks."""
        if self.is_table:
            features, outputs = TABLES[self.data].num_features, 1
        else:
            features, outputs = FEATURES[self.data], NUM_CLASSES
        widths = [features, *(self.units,) * NUM_LAYERS, outputs]
        parameters = sum((num_in + 1) * num_out for num_in, num_out in itertools.pairwise(widths))
        num_networks = SHARED["replicates"] * SHARED["ensemble-size"]
        return OVERHEAD + self.train_size * parameters * self.epochs * num_networks

    def missing(self, data_dir: Path | None) -> str | None:
        """A sentence if the data are not there; None if they are."""
        if self.data == DIGITS:
            return None
        if data_dir is None:
            return f"{self.data} was left out: its files need --data-dir."
        path = data_dir / (TABLES[self.data].file if self.is_table else self.data)
        return None if path.exists() else f"{self.data} was left out: there is no {path}."

    def table_path(self, folder: Path) -> Path:
        """Where the atlas in a folder keeps the features and the target of a table."""
        return folder / "tables" / f"{self.data}.txt"

    def write_table(self, data_dir: Path, folder: Path) -> None:
        """Writes the features and the target of a table, without columns that no paper uses.

        Of a large table, as many random rows are taken as train and test.

        Raises:
            DataError: the file holds something else than the table.
            OSError: a file cannot be read or written.
        """
        table = TABLES[self.data]
        path = self.table_path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = uci.read_table(table, data_dir)[:, : table.num_features + 1]
        count = min(len(numbers), MAX_TABLE_ROWS + MAX_TEST_ROWS)
        rows = np.sort(np.random.default_rng(0).permutation(len(numbers))[:count])
        np.savetxt(path, numbers[rows], fmt="%.17g")  # As many digits as float64 has.

    def arguments(self, data_dir: Path | None, folder: Path) -> list[str]:
        """The options of the command `jdrop` that runs this cell alone, without `--out`.

        Args:
            data_dir: of the images.
            folder: of the atlas, which holds the tables.
        """
        if self.is_table:
            target = TABLES[self.data].num_features
            words = ["--dataset", str(self.table_path(folder))]
            words += ["--target", str(target), "--task", "regression"]
            words += ["--learning-rate", str(TABLE_LEARNING_RATE)]
        else:
            words = ["--dataset", self.data]
            if self.data != DIGITS:
                words += ["--data-dir", str(data_dir)]
        words += ["--train-size", str(self.train_size)]
        if self.label_noise:
            words += ["--label-noise", f"{self.label_noise:g}"]
        words += ["--hidden", ",".join([str(self.units)] * NUM_LAYERS)]
        words += ["--rate", f"{self.rate:g}", "--epochs", str(self.epochs)]
        for name, value in SHARED.items():
            words += [f"--{name}", str(value)]
        if self.train_size > MAX_CONTROLS_SIZE:
            words.append("--no-controls")
        return [*words, *SHARED_FLAGS]


def command_line(arguments: list[str]) -> str:
    """The command with these options, as a shell takes it."""
    return shlex.join(["jdrop", *arguments])


@dataclass(frozen=True)
class Group:
    """Cells along an axis, in the order of the figure.

    Attributes:
        title: of the axis.
        label: of a cell within the group.
        cells: a cell may stand in several groups.
    """

    title: str
    label: Callable[[Cell], str]
    cells: tuple[Cell, ...]


def _examples(data: str, name: str, sizes: tuple[int, ...]) -> Group:
    cells = tuple(Cell(data, size) for size in sizes)
    return Group(f"{name}: training examples", lambda cell: f"{cell.train_size:,}", cells)


def make_groups() -> list[Group]:
    """The groups of all cells."""
    digits = partial(Cell, DIGITS, 500)
    image_sizes = (300, 1000, 3000, 10_000)
    return [
        _examples(DIGITS, "Digits", (100, 300, 500, 1000)),
        _examples("mnist", "MNIST", image_sizes),
        _examples("fashion-mnist", "Fashion-MNIST", image_sizes),
        Group(
            "Digits: hidden units of a layer",
            lambda cell: str(cell.units),
            tuple(digits(units=units) for units in (16, UNITS, 256)),
        ),
        Group(
            "Digits: dropout rate",
            lambda cell: f"{cell.rate:g}",
            tuple(digits(rate=rate) for rate in (0.1, 0.2, RATE)),
        ),
        Group(
            "Digits: wrong training labels",
            lambda cell: share_text(cell.label_noise),
            tuple(digits(label_noise=share) for share in (0.0, 0.2, 0.4)),
        ),
        Group(
            f"Tables of regression, rate {TABLE_RATE:g}",
            lambda cell: f"{TABLES[cell.data].name}, {cell.train_size:,}",
            tuple(
                Cell(data, min(MAX_TABLE_ROWS, round(0.8 * table.num_rows)), rate=TABLE_RATE)
                for data, table in TABLES.items()
            ),
        ),
    ]


def by_cost(groups: list[Group]) -> list[Cell]:
    """All cells, each once, the cheapest first."""
    cells = dict.fromkeys(cell for group in groups for cell in group.cells)
    return sorted(cells, key=lambda cell: cell.cost)
