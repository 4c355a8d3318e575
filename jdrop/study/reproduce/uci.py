"""The UCI tables of regression, and the standard splits into training and test rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jdrop.study.data import DataError


@dataclass(frozen=True)
class Table:
    """A table of numbers: features first, then the target.

    Attributes:
        name: as papers call the data set.
        file: its path in the folder of all data.
        num_rows: of the file.
        num_features: columns of features; the next column is the target.
        num_splits: how many splits papers use.
    """

    name: str
    file: str
    num_rows: int
    num_features: int
    num_splits: int = 20


YACHT = Table("Yacht", "uci/yacht.txt", 308, 6)
ENERGY = Table("Energy", "uci/energy.txt", 768, 8)
CONCRETE = Table("Concrete", "uci/concrete.txt", 1030, 8)
WINE = Table("Wine", "uci/wine-quality-red.txt", 1599, 11)
POWER = Table("Power", "uci/power-plant.txt", 9568, 4)
NAVAL = Table("Naval", "uci/naval-propulsion-plant.txt", 11934, 16)
PROTEIN = Table("Protein", "uci/protein-tertiary-structure.txt", 45730, 9, 5)


@dataclass(frozen=True)
class Splits:
    """The standardised examples of all splits.

    Attributes:
        train_inputs: `[split, row, feature]`, float32.
        train_targets: `[split, row]`, float32.
        test_inputs: `[split, row, feature]`, float32.
        test_targets: `[split, row]`, float32.
        target_scale: `[split]`, by which the targets were divided, float64.
    """

    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray
    target_scale: np.ndarray

    @property
    def num_splits(self) -> int:
        """How many splits there are."""
        return len(self.target_scale)


def load_splits(table: Table, data_dir: Path, num_splits: int) -> Splits:
    """Reads a table and splits it as all papers on it do.

    One generator with the seed 1 makes a permutation of the rows for each split. The first 90 % of
    a permutation are the training rows. Inputs and targets are standardised with the mean and the
    standard deviation of the training rows.

    Args:
        table: which file to read.
        data_dir: the folder of all data.
        num_splits: how many of the splits, from the first on.

    Raises:
        DataError: the file is not the table.
        OSError: the file cannot be read.

    Reference:
        Hernández-Lobato and Adams 2015, arXiv:1502.05336; their code makes the splits.
    """
    return split_rows(read_table(table, data_dir), table.num_features, num_splits)


def read_table(table: Table, data_dir: Path) -> np.ndarray:
    """The numbers of a table, `[row, column]`, float64.

    Raises:
        DataError: the file holds something else than this table.
        OSError: the file cannot be read.
    """
    path = data_dir / table.file
    try:
        numbers = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise DataError(
            f"{path} must hold a table of numbers without a header, with blanks between the "
            f"columns ({error})."
        ) from error
    num_rows, num_columns = numbers.shape
    if num_rows != table.num_rows or num_columns <= table.num_features:
        raise DataError(
            f"{path} must have {table.num_rows} rows with {table.num_features} features and the "
            f"target, got {num_rows} rows of {num_columns} columns; the splits are of the table as "
            "UCI publishes it."
        )
    if not np.isfinite(numbers).all():
        raise DataError(f"{path} must hold finite numbers, got a missing or infinite one.")
    return numbers


def split_rows(numbers: np.ndarray, num_features: int, num_splits: int) -> Splits:
    """Splits and standardises the rows of a table; see `load_splits`.

    Args:
        numbers: `[row, column]`, features first, then the target.
        num_features: how many columns are features.
        num_splits: how many splits.
    """
    rows = ordered_rows(numbers, num_features, num_splits)
    num_train = round(0.9 * len(numbers))
    return standardised(rows[:, :num_train], rows[:, num_train:])


def validation_splits(numbers: np.ndarray, num_features: int, num_splits: int) -> Splits:
    """Splits the training rows of each split: the first 80 % train, the rest take the test's part.

    Args:
        numbers: `[row, column]`, features first, then the target.
        num_features: how many columns are features.
        num_splits: how many splits.

    Reference:
        The code of Mukhoti and Gal 2018, github.com/omegafragger/DropoutUncertaintyExps.
    """
    rows = ordered_rows(numbers, num_features, num_splits)[:, : round(0.9 * len(numbers))]
    num_train = int(0.8 * rows.shape[1])
    return standardised(rows[:, :num_train], rows[:, num_train:])


def ordered_rows(numbers: np.ndarray, num_features: int, num_splits: int) -> np.ndarray:
    """The features and the target of all rows, in the order of each split: `[split, row, column]`.

    Args:
        numbers: `[row, column]`, features first, then the target.
        num_features: how many columns are features.
        num_splits: how many splits.
    """
    # The published splits are those of this legacy generator.
    generator = np.random.RandomState(1)
    num_rows = len(numbers)
    orders = [generator.choice(num_rows, num_rows, replace=False) for _ in range(num_splits)]
    return numbers[np.stack(orders), : num_features + 1]


def standardised(train: np.ndarray, test: np.ndarray) -> Splits:
    """Standardises each column with the mean and the standard deviation of its training rows.

    Args:
        train: `[split, row, column]`, features first, then the target.
        test: `[split, row, column]`.
    """
    mean, scale = train.mean(1, keepdims=True), train.std(1, keepdims=True)
    # A constant column, as in the Naval table, stays 0.
    train, test = ((rows - mean) / np.where(scale == 0, 1, scale) for rows in (train, test))
    return Splits(
        train_inputs=train[..., :-1].astype(np.float32),
        train_targets=train[..., -1].astype(np.float32),
        test_inputs=test[..., :-1].astype(np.float32),
        test_targets=test[..., -1].astype(np.float32),
        target_scale=scale[:, 0, -1],
    )
