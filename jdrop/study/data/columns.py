"""Tables of text: read, checked and encoded as numbers, column by column."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from jdrop.study.data.arrays import as_task, require_finite, require_variance
from jdrop.study.data.dataset import DataError, list_names, quote

MAX_CLASSES = 100  # A column of more distinct numbers is the target of a regression.

MAX_CATEGORIES = 50  # A column of more distinct words is no category.

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})

# Missing values too, but only beside numbers: "-" alone may be a class, as "+" is.
PLACEHOLDERS = frozenset(
    {"-", "--", ".", "..", "*", "#n/a", "#na", "#value!", "#div/0!", "<na>", "missing", "nil"}
)

MOSTLY_NUMBERS = 0.8  # From this share of numbers on, the words of a column are mistakes.


@dataclass(frozen=True)
class Examples:
    """The examples of a training table and of those beside it, encoded.

    Attributes:
        inputs: float64 `[example, feature]` of the training table, and of the test table if any.
        labels: for each of `inputs`, classes int64 or targets float64 `[example]`.
        ood_inputs: as an array of `inputs`; None without a table of them.
        classes: what the table calls each class; None in regression.
        group_name: the column of the groups; None without such a column.
        groups: text `[example]` of the training table, then of the test table if any; None without
            such a column.
    """

    inputs: list[np.ndarray]
    labels: list[np.ndarray]
    ood_inputs: np.ndarray | None
    classes: list[str | int] | None
    group_name: str | None
    groups: np.ndarray | None


def read_examples(
    path: Path,
    *,
    target: str | None,
    task: str | None,
    test_path: Path | None,
    ood_path: Path | None,
    groups: str | None,
) -> Examples:
    """Reads tables and encodes their columns; the arguments are those of `load_table`."""
    train = _read_table(path)
    names = list(train.cells.columns)
    target = _target_name(path, names, target)
    group_name = None if groups is None else _group_column(path, names, groups)
    if group_name == target:
        raise DataError(
            f"groups (--groups) must be another column of {path} than the target {quote(target)}, "
            "which is to be predicted."
        )
    features = [name for name in names if name not in (target, group_name)]
    if not features:
        beside = quote(target) if group_name is None else f"{quote(target)} and {quote(group_name)}"
        raise DataError(f"{path} must have columns beside {beside}, to predict {quote(target)}.")
    labelled = [train]
    if test_path is not None:
        labelled.append(_read_table(test_path))
        _require_columns(labelled[1], names, path)
    tables = list(labelled)
    if ood_path is not None:
        tables.append(_read_table(ood_path))
        _require_columns(tables[-1], features, path)
    inputs = _encode_features(tables, features)
    labels, classes = _encode_labels(labelled, target, task)
    ood_inputs = inputs.pop() if ood_path is not None else None
    group_of_example = None
    if group_name is not None:
        group_of_example = np.concatenate([table.groups(group_name) for table in labelled])
    return Examples(inputs, labels, ood_inputs, classes, group_name, group_of_example)


@dataclass(frozen=True)
class _Table:
    """The cells of a file, as text, by column."""

    path: Path
    cells: pd.DataFrame

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, NaN where the cell is a word.

        Raises:
            DataError: a missing or infinite value, or commas in numbers.
        """
        self._require_values(name)
        cells = self.cells[name]
        numbers = _to_numbers(cells)
        if np.isnan(numbers).any():
            # Such columns would pass for words otherwise.
            point = cells.str.replace(",", ".", regex=False)
            joined = cells.str.replace(r"(?<=\d),(?=\d{3}(?:\D|$))", "", regex=True)
            if not np.isnan(_to_numbers(point)).any() or not np.isnan(_to_numbers(joined)).any():
                raise DataError(
                    f"{self.path} has numbers with a comma in column {quote(name)}; write a "
                    "decimal point, and nothing between thousands."
                )
        else:
            require_finite(f"column {quote(name)} of {self.path}", numbers)
        return numbers

    def groups(self, name: str) -> np.ndarray:
        """A column as text.

        Raises:
            DataError: a missing value.
        """
        self._require_values(name)
        return self.cells[name].to_numpy().astype(str)

    def _require_values(self, name: str) -> None:
        is_missing = self.cells[name].str.lower().isin(MISSING)
        if is_missing.any():
            raise DataError(
                f"{self.path} has a missing value in column {quote(name)}, example "
                f"{is_missing.argmax() + 1}; fill it in, or leave such examples out."
            )

    def first(self, name: str, condition: np.ndarray) -> str:
        """The first cell of a column where the condition holds, for messages."""
        row = int(condition.argmax())
        return f"{quote(self.cells[name].iloc[row])} in example {row + 1}"

    def require_words(self, name: str, numbers: np.ndarray, hint: str, share: float) -> None:
        """Raises if a column of words holds placeholders beside numbers, or mostly numbers."""
        is_word = np.isnan(numbers)
        is_placeholder = self.cells[name].str.lower().isin(PLACEHOLDERS).to_numpy()
        num_words, num_cells = int(is_word.sum()), len(is_word)
        num_numbers = num_cells - num_words
        if not num_words or not num_numbers:
            return
        if is_placeholder.any() or num_numbers >= share * num_cells:
            first = self.first(name, is_placeholder if is_placeholder.any() else is_word)
            raise DataError(
                f"column {quote(name)} of {self.path} must hold numbers in every row or words in "
                f"every row, but {num_numbers} of {num_cells} cells are numbers and {num_words} "
                f"are not, such as {first}; fill missing values in, or leave such examples "
                f"out{hint}."
            )


def _to_numbers(cells: pd.Series) -> np.ndarray:
    return pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)


def _read_table(path: Path) -> _Table:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}).") from error
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    unquoted = re.sub(r'"[^"]*"', "", first_line)
    delimiter = max(",;\t", key=unquoted.count)
    has_delimiter = delimiter in unquoted
    try:
        cells = pd.read_csv(
            io.StringIO(text),
            sep=delimiter if has_delimiter else r"\s+",
            quoting=csv.QUOTE_MINIMAL if has_delimiter else csv.QUOTE_NONE,
            # Every cell stays the text that it is: pandas would rename equal columns, take the
            # first column for an index, and read words such as "None" as missing.
            header=None,
            index_col=False,
            dtype=object,
            na_filter=False,
        )
    except pd.errors.EmptyDataError:
        cells = pd.DataFrame()
    except pd.errors.ParserError as error:
        counts = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if counts is None:
            raise DataError(f"{path} cannot be read as a table ({error}).") from error
        raise DataError(
            f"{path} must have {counts[1]} columns in every row, got {counts[3]} in row "
            f"{counts[2]}{_comment_hint(first_line)}."
        ) from error
    if len(cells) < 2:
        raise DataError(f"{path} must hold a header and a row for each example, got no examples.")
    cells = cells.map(str.strip)
    if not text.endswith("\n"):
        _refuse_cut_word(path, cells.iloc[1:, -1])
    if not np.isnan(_to_numbers(cells.iloc[0])).any():
        cells.columns = [str(index) for index in cells.columns]
        _refuse_header_of_numbers(path, cells)
        return _Table(path, cells)
    cells, names = cells.iloc[1:].reset_index(drop=True), cells.iloc[0].tolist()
    _refuse_header_of_data(path, names, cells)
    cells.columns = names
    is_repeated = cells.columns.duplicated()
    if is_repeated.any() or "" in names:
        wrong = "a column without a name"
        if is_repeated.any():
            wrong = f"more than one {list_names(cells.columns[is_repeated].unique())}"
        raise DataError(
            f"{path} must have a different name for each column, got {wrong}; rename the columns "
            "in the first row."
        )
    return _Table(path, cells)


def _refuse_cut_word(path: Path, column: pd.Series) -> None:
    """Raises if the file ends inside a word, which would pass for a class or a category."""
    *others, last = column
    if last in others or not np.isnan(_to_numbers(column.iloc[[-1]])).any():
        return
    whole = next((cell for cell in others if last and cell.startswith(last)), None)
    if whole is not None:
        raise DataError(
            f"{path} seems to be cut short: it ends with {quote(last)}, the beginning of "
            f"{quote(whole)}, without an end of the line; copy the file again, or end the line if "
            "it is complete."
        )


def _refuse_header_of_numbers(path: Path, cells: pd.DataFrame) -> None:
    """Raises if the first row holds numbers but seems to name the columns."""
    below = cells.iloc[1:]
    for name in cells.columns[np.isnan(_to_numbers(cells.iloc[1]))]:
        if np.isnan(_to_numbers(below[name])).all():
            raise DataError(
                f"the first row of {path} holds only numbers, as an example does, but below "
                f"{quote(cells[name].iloc[0])} column {name} holds words such as "
                f"{quote(below[name].iloc[0])}; name the columns in the first row, by words."
            )
    if len(cells.columns) > 2 and cells.iloc[0].tolist() == cells.columns.tolist():
        raise DataError(
            f"the first row of {path} counts the columns, 0, 1, 2, ..., but a first row of "
            "numbers is an example; name the columns in the first row, by words."
        )


def _refuse_header_of_data(path: Path, names: Sequence[str], cells: pd.DataFrame) -> None:
    """Raises if the first row, with words, seems to be an example."""
    for index, name in enumerate(names):
        is_name = (cells.iloc[:, index] == name).to_numpy()
        if name.lower() in (MISSING | PLACEHOLDERS) - {""}:
            raise DataError(
                f"the first row of {path} must name the columns, but its cell {quote(name)} is a "
                "missing value of an example; put a row of names above it, or rename the column."
            )
        # A column of zeros and ones may well be named "1".
        if name and is_name.any() and not name.isdecimal():
            raise DataError(
                f"the first row of {path} must name the columns, but it seems to be an example: "
                f"{quote(name)} stands in its column again, in row {is_name.argmax() + 2}; put a "
                "row of names above it, or rename the column."
            )


def _target_name(path: Path, names: Sequence[str], target: str | None) -> str:
    name = None if target is None else _find_column(names, target)
    if name is not None:
        return name
    got = "none was given" if target is None else f"got {quote(target)}"
    raise DataError(
        f"target (--target) must name the column of {path} to predict, or give its index from 0: "
        f"one of {list_names(names)}; {got}{_comment_hint(names[0])}."
    )


def _comment_hint(first_line: str) -> str:
    return "; delete the first row if it is a comment" if first_line.startswith("#") else ""


def _group_column(path: Path, names: Sequence[str], groups: str) -> str | None:
    """The column that `groups` names; None if it names a file."""
    name = _find_column(names, groups)
    if name is None and not Path(groups).is_file():
        raise DataError(
            f"groups (--groups) must name a column of {path}, one of {list_names(names)}, or a "
            f"file with the group of each example; got {quote(groups)}."
        )
    return name


def _find_column(names: Sequence[str], column: str) -> str | None:
    """A column by its name or its index from 0; None if there is no such column."""
    if column in names:
        return column
    return names[int(column)] if column.isdecimal() and int(column) < len(names) else None


def _require_columns(table: _Table, names: Sequence[str], path: Path) -> None:
    present = set(table.cells.columns)
    missing = [name for name in names if name not in present]
    if missing:
        raise DataError(
            f"{table.path} must have the columns of {path}, but it lacks {list_names(missing)}."
        )


def _encode_features(tables: Sequence[_Table], features: Sequence[str]) -> list[np.ndarray]:
    """The inputs of each table: a column of numbers stays one, each word becomes a column."""
    train = tables[0]
    columns = []
    for name in features:
        numbers = [table.numbers(name) for table in tables]
        if np.isnan(numbers[0]).any():
            hint = "; if these are categories, write none of them as a number"
            train.require_words(name, numbers[0], hint, MOSTLY_NUMBERS)
            words = pd.concat([table.cells[name] for table in tables])
            if words.nunique() > MAX_CATEGORIES:
                raise DataError(
                    f"column {quote(name)} of {train.path} must be numbers or at most "
                    f"{MAX_CATEGORIES} different words, got {words.nunique()}; leave it out."
                )
            columns.append(pd.get_dummies(words, dtype=float).to_numpy())
            continue
        require_variance(f"column {quote(name)} of {train.path}", numbers[0])
        for table, values in zip(tables, numbers, strict=True):
            if np.isnan(values).any():
                raise DataError(
                    f"column {quote(name)} of {table.path} must be numbers, as it is in "
                    f"{train.path}, got {table.first(name, np.isnan(values))}."
                )
        columns.append(np.concatenate(numbers)[:, None])
    ends = np.cumsum([len(table.cells) for table in tables])
    return np.split(np.concatenate(columns, 1), ends[:-1])


def _encode_labels(
    tables: Sequence[_Table], target: str, task: str | None
) -> tuple[list[np.ndarray], list[str | int] | None]:
    """The labels of each table, and what the table calls the classes."""
    train = tables[0]
    numbers = [table.numbers(target) for table in tables]
    column = f"column {quote(target)}"
    for table, values in zip(tables, numbers, strict=True):
        if task == "regression" and np.isnan(values).any():
            raise DataError(
                f"{column} must be numbers for a regression, but {table.path} has "
                f"{table.first(target, np.isnan(values))}."
            )
    if any(np.isnan(values).any() for values in numbers):
        hint = "; if these are classes, say so (--task classification)" if task is None else ""
        share = MOSTLY_NUMBERS if task is None else np.inf
        for table, values in zip(tables, numbers, strict=True):
            table.require_words(target, values, hint, share)
        num_words = train.cells[target].nunique()
        if task is None and num_words > MAX_CLASSES:
            raise DataError(
                f"{column} must be numbers or at most {MAX_CLASSES} different words, got "
                f"{num_words}; if these are classes, say so (--task classification)."
            )
        return _number_classes(column, [table.cells[target].to_numpy() for table in tables])
    if task != "classification":
        require_variance(column, numbers[0])
    if task is None:
        distinct = np.unique(numbers[0])
        is_whole = bool((distinct == np.round(distinct)).all())
        task = "classification" if is_whole and len(distinct) <= MAX_CLASSES else "regression"
    if task == "regression":
        return numbers, None
    return _number_classes(column, [as_task(column, values, task) for values in numbers])


def _number_classes(
    column: str, labels: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[str | int]]:
    """Counts the classes of the training table from 0, in order."""
    classes = np.unique(labels[0])
    for test_labels in labels[1:]:
        unknown = sorted(set(test_labels.tolist()) - set(classes.tolist()))
        if unknown:
            raise DataError(
                f"{column} has the class {unknown[0]!r} in the test examples, of which there is no "
                "training example."
            )
    return [np.searchsorted(classes, values) for values in labels], classes.tolist()
