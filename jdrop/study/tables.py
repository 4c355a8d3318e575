"""Data of the user's own: arrays, `.npz` files, tables of text, and predictions made elsewhere.

What is wrong with them is said in a sentence, before anything is trained.
"""

import csv
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.data import (
    DataError,
    Dataset,
    generator,
    shuffled,
    stratified,
    with_label_noise,
)

MAX_CLASSES = 100  # A column of more distinct numbers is taken for a regression's target.

MAX_CATEGORIES = 50  # A column of more distinct words is no category.

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})

TEST_SHARE = 0.2  # Of examples that come in one piece.


def from_arrays(
    name: str,
    inputs: Any,
    labels: Any,
    test_inputs: Any,
    test_labels: Any,
    ood_inputs: Any = None,
) -> Dataset:
    """A data set of arrays, checked: integer labels are classes, others are targets.

    Args:
        name: for people.
        inputs: training examples, `[example, ...]`, of any number type.
        labels: `[example]`.
        test_inputs: as `inputs`.
        test_labels: as `labels`.
        ood_inputs: as `inputs`, inputs of another kind, for classification; if not given, test
            inputs with their features in random order.

    Raises:
        DataError: shapes, dtypes or values that do not fit.

    Example:
        >>> data = from_arrays("x", np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1])
        >>> data.num_classes, data.ood_name
        (2, 'shuffled features')
    """
    train, test = _inputs("inputs", inputs), _inputs("test_inputs", test_inputs)
    _same_features("test_inputs", test, train)
    ood_name = None
    others = None
    if ood_inputs is not None:
        others = _inputs("ood_inputs", ood_inputs)
        _same_features("ood_inputs", others, train)
        ood_name = "the inputs given"
    given = _labels("labels", labels, train), _labels("test_labels", test_labels, test)
    if given[0].dtype.kind != given[1].dtype.kind:
        raise DataError(
            f"labels and test_labels must both be integers (classes) or both floats (targets), "
            f"got {given[0].dtype} and {given[1].dtype}."
        )
    if given[0].dtype.kind == "f":
        if others is not None:
            raise DataError(
                "ood_inputs are for classification, where scores tell them by how unsure the class "
                "is, but labels are floats (targets); leave them out."
            )
        # Not `std() == 0`, which rounding denies.
        if given[0].min() == given[0].max():
            raise DataError(f"labels must differ, got {given[0][0]} for every training example.")
        mean, scale = float(given[0].mean()), float(given[0].std())
        standardised = [((part - mean) / scale).astype(np.float32) for part in given]
        return Dataset(
            name=name,
            train_inputs=train,
            train_labels=standardised[0],
            test_inputs=test,
            test_labels=standardised[1],
            num_classes=None,
            target_mean=mean,
            target_scale=scale,
        )
    num_classes = _num_classes(*given)
    if others is None:
        ood_name, others = "shuffled features", shuffled(test, 0)
    return Dataset(
        name=name,
        train_inputs=train,
        train_labels=given[0].astype(np.int32),
        test_inputs=test,
        test_labels=given[1].astype(np.int32),
        num_classes=num_classes,
        ood_name=ood_name,
        ood_inputs=others,
    )


def _inputs(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} must be numbers, got the dtype {array.dtype}.")
    if array.ndim < 2 or 0 in array.shape:
        raise DataError(
            f"{name} must be [example, feature, ...] with at least one of each, got the shape "
            f"{array.shape}; a single feature is `{name}[:, None]`."
        )
    array = np.ascontiguousarray(array, np.float32)
    _finite(name, array)
    return array


def _finite(name: str, array: np.ndarray) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index[0]) for index in np.nonzero(bad))
        raise DataError(
            f"{name} must be finite, but {int(bad.sum())} of {array.size} values are not, the "
            f"first at {first}; fill them in, or leave those examples out."
        )


def _same_features(name: str, array: np.ndarray, train: np.ndarray) -> None:
    if array.shape[1:] != train.shape[1:]:
        raise DataError(
            f"{name} must have examples of shape {train.shape[1:]}, as the training inputs have, "
            f"got {array.shape[1:]}."
        )


def _labels(name: str, labels: Any, inputs: np.ndarray, task: str | None = None) -> np.ndarray:
    """Labels as int64 or float64."""
    array = np.asarray(labels)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"{name} must be integers (classes) or floats (targets), got the dtype {array.dtype}."
        )
    if array.shape != inputs.shape[:1]:
        hint = ""
        if array.ndim == 2 and array.shape[0] == len(inputs) and array.shape[1] > 1:
            hint = "; turn one-hot labels into integers with `labels.argmax(-1)`"
        raise DataError(
            f"{name} must hold one number for each of the {len(inputs)} inputs, got the shape "
            f"{array.shape}{hint}."
        )
    array = _as_task(name, array, task)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.min() < 0:
        raise DataError(
            f"{name} must be classes from 0, got {array.min()}; for regression give floats."
        )
    return array.astype(np.int64)


def _num_classes(train: np.ndarray, test: np.ndarray) -> int:
    classes = np.unique(train)
    absent = np.flatnonzero(classes != np.arange(len(classes)))
    if not len(absent):
        absent = np.setdiff1d(test, classes)
    if len(absent):
        raise DataError(
            f"labels must have a training example of every class, but class {absent[0]} has none; "
            "train on more examples, or number the classes that there are from 0."
        )
    if len(classes) < 2:
        raise DataError("labels must be of at least 2 classes, got one.")
    return len(classes)


def load_table(
    path: Path,
    *,
    target: str | None,
    task: str | None,
    test_path: Path | None,
    train_size: int | None,
    label_noise: float,
    seed: int,
    ood_path: Path | None,
) -> Dataset:
    """Loads a data set of the user's own.

    An `.npz` holds `train_inputs`, `train_labels`, `test_inputs` and `test_labels`, or `inputs` and
    `labels`, of which a fifth is held out; `ood_inputs` too, if there are any. Inputs are taken as
    they are.

    Any other file is a table of text, with commas, semicolons, tabs or spaces between its columns,
    and with a first row of names unless that is all numbers; then columns are named "0", "1", ...
    A column of words becomes one of 0 and 1 for each word. Every column is standardised by its
    mean and standard deviation over the training examples; one that is constant there becomes 0.

    Args:
        path: of the file.
        target: of a table, the column to predict, by its name or else its number, from 0.
        task: "classification" or "regression"; if not given, words or at most 100 different whole
            numbers in a table, and integers in an `.npz`, are classes.
        test_path: a second table of test examples.
        train_size: how many training examples; if not given, all that are not held out.
        label_noise: share of training labels made wrong.
        seed: of what is held out, chosen and made wrong.
        ood_path: beside an `.npz`, another with `inputs`; beside a table, another with its columns.

    Raises:
        DataError: a file that is missing, damaged or does not hold this; the message says more.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flowers.npz")
        ...     np.savez(path, inputs=np.eye(10), labels=np.arange(10) % 2)
        ...     data = load_table(
        ...         path, target=None, task=None, test_path=None, train_size=None,
        ...         label_noise=0.0, seed=0, ood_path=None,
        ...     )
        >>> data.name, len(data.train_labels), len(data.test_labels), data.num_classes
        ('flowers', 8, 2, 2)
    """
    is_table = path.suffix != ".npz"
    if ood_path is not None and (ood_path.suffix != ".npz") != is_table:
        raise DataError(
            f"ood (--ood) must be {'a table' if is_table else 'an .npz'}, as {path} is, got "
            f"{ood_path}."
        )
    if not is_table:
        if target is not None or test_path is not None:
            raise DataError(
                f"{path} is an .npz: its labels are the array `labels` or `train_labels`, its test "
                "examples `test_inputs`; --target and --test-file are for tables."
            )
        parts, ood_inputs = _npz_parts(path, task, ood_path)
    else:
        parts, ood_inputs = _table_parts(path, target, task, test_path, ood_path)
    inputs, labels, *test = parts
    rng = generator(seed, "split")
    groups = np.zeros(len(labels), int) if labels.dtype.kind == "f" else labels
    if not test:
        if len(labels) < 2:
            raise DataError(
                f"{path} must hold examples to train on and to test on, got one in all."
            )
        num_test = max(1, round(TEST_SHARE * len(labels)))
        num_train = len(labels) - num_test
        if train_size is not None:
            num_train = _fitting(train_size, len(labels) - 1)
        chosen = stratified(rng, groups, num_train)
        test = [inputs[~chosen], labels[~chosen]]
        inputs, labels = inputs[chosen], labels[chosen]
    elif train_size is not None:
        chosen = stratified(rng, groups, _fitting(train_size, len(labels)))
        inputs, labels = inputs[chosen], labels[chosen]
    if is_table:
        # Not by `std() > 0`: rounding gives equal numbers a mean beside them.
        varies = inputs.max(0) > inputs.min(0)
        mean = np.where(varies, inputs.mean(0), inputs[0])
        scale = np.where(varies, inputs.std(0), 1)
        inputs, test[0] = (inputs - mean) / scale, (test[0] - mean) / scale
        if ood_inputs is not None:
            ood_inputs = (ood_inputs - mean) / scale
    data = from_arrays(path.stem, inputs, labels, test[0], test[1], ood_inputs)
    return with_label_noise(data, label_noise, seed)


def _fitting(train_size: int, available: int) -> int:
    if not 2 <= train_size <= available:
        raise DataError(f"train_size must lie in [2, {available}], got {train_size}.")
    return train_size


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} must be an .npz of several arrays, got a single one.")
            arrays = {name: archive[name] for name in archive.files}
    # RuntimeError: of archives that are encrypted, or compressed in a way that Python cannot read.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as an .npz of numbers; write it with `numpy.savez`, without "
            "objects."
        ) from error
    return arrays


def _require(path: Path, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        if name not in arrays:
            raise DataError(
                f"{path} must hold an array {name!r}, got {', '.join(sorted(arrays)) or 'none'}."
            )


def _npz_parts(
    path: Path, task: str | None, ood_path: Path | None
) -> tuple[list[np.ndarray], np.ndarray | None]:
    arrays = _read_npz(path)
    names = ["inputs", "labels"]
    if "train_inputs" in arrays:
        names = ["train_inputs", "train_labels", "test_inputs", "test_labels"]
    _require(path, arrays, names)
    parts = []
    for inputs_name, labels_name in zip(names[::2], names[1::2], strict=True):
        inputs = _inputs(inputs_name, arrays[inputs_name])
        parts += [inputs, _labels(labels_name, arrays[labels_name], inputs, task)]
    if ood_path is None:
        return parts, arrays.get("ood_inputs")
    others = _read_npz(ood_path)
    _require(ood_path, others, ["inputs"])
    return parts, others["inputs"]


def _as_task(name: str, labels: np.ndarray, task: str | None) -> np.ndarray:
    """Numbers as the task asks: integers for classes, floats for targets."""
    if labels.dtype.kind != "f":
        return labels.astype(np.float64) if task == "regression" else labels
    _finite(name, labels)
    if task != "classification":
        return labels
    broken = labels[labels != np.round(labels)]
    if len(broken):
        raise DataError(f"{name} must be whole numbers to be classes, got {broken[0]}.")
    return labels.astype(np.int64)


@dataclass(frozen=True)
class _Table:
    """The cells of a file, as text, by column."""

    path: Path
    columns: dict[str, list[str]]

    def numbers(self, name: str) -> np.ndarray | None:
        """A column as numbers, None if a cell is none.

        Raises:
            DataError: a missing value, or a comma in place of the decimal point.
        """
        cells = self.columns[name]
        for row, cell in enumerate(cells):
            if cell.lower() in MISSING:
                raise DataError(
                    f"{self.path} has a missing value in column {name!r}, example {row + 1}; fill "
                    "it in, or leave such examples out."
                )
        if not all(_is_number(cell) for cell in cells):
            # They would pass for words otherwise.
            if all(_is_number(cell.replace(",", ".")) for cell in cells):
                raise DataError(
                    f"{self.path} has numbers with a comma in column {name!r}; write a decimal "
                    "point, and nothing between thousands."
                )
            return None
        numbers = np.array([float(cell) for cell in cells])
        _finite(f"column {name!r} of {self.path}", numbers)
        return numbers


def _read_table(path: Path) -> _Table:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}).") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise DataError(f"{path} must hold a header and a row for each example, got no examples.")
    delimiter = max(",;\t", key=lines[0].count)
    if lines[0].count(delimiter):
        try:
            cells = list(csv.reader(lines, delimiter=delimiter))
        except csv.Error as error:
            raise DataError(f"{path} cannot be read as a table ({error}).") from error
        rows = [[cell.strip() for cell in row] for row in cells]
    else:
        rows = [line.split() for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise DataError(
                f"{path} must have {len(rows[0])} columns in every row, got {len(row)} in row "
                f"{number}."
            )
    names = [str(index) for index in range(len(rows[0]))]
    if not all(_is_number(cell) for cell in rows[0]):
        names, rows = rows[0], rows[1:]
        if len({*names}) < len(names) or "" in names:
            raise DataError(f"{path} must have a different name for each column, got {names}.")
    return _Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)})


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    # Python's numbers may be written 1_000, those of tables are not: 1_000 is a word.
    return "_" not in cell


def _table_parts(
    path: Path,
    target: str | None,
    task: str | None,
    test_path: Path | None,
    ood_path: Path | None,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    tables = [_read_table(path)]
    names = list(tables[0].columns)
    target = _column(path, names, target)
    if test_path is not None:
        tables.append(_read_table(test_path))
    others = None
    if ood_path is not None and ood_path.suffix != ".npz":
        others = _read_table(ood_path)
    features = [name for name in names if name != target]
    if not features:
        raise DataError(f"{path} must have columns beside {target!r}, to predict it from.")
    for table in (*tables[1:], *([others] if others else [])):
        missing = [name for name in features if name not in table.columns]
        if missing or (table is not others and target not in table.columns):
            raise DataError(f"{table.path} must have the columns of {path}: {', '.join(names)}.")
    everything = [*tables, *([others] if others else [])]
    blocks: list[list[np.ndarray]] = [[] for _ in everything]
    for name in features:
        numbers = [table.numbers(name) for table in everything]
        if numbers[0] is not None:
            for table, block, of_table in zip(everything, blocks, numbers, strict=True):
                if of_table is None:
                    raise DataError(
                        f"column {name!r} of {table.path} must be numbers, as it is in {path}."
                    )
                block.append(of_table[:, None])
            continue
        words = sorted({cell for table in everything for cell in table.columns[name]})
        if len(words) > MAX_CATEGORIES:
            raise DataError(
                f"column {name!r} of {path} must be numbers or at most {MAX_CATEGORIES} different "
                f"words, got {len(words)}; leave it out."
            )
        for block, table in zip(blocks, everything, strict=True):
            cells = np.array(table.columns[name])
            block.append((cells[:, None] == np.array(words)[None]).astype(float))
    inputs = [np.concatenate(block, 1) for block in blocks]
    labels = _table_labels(tables, target, task)
    parts = [part for both in zip(inputs, labels, strict=False) for part in both]
    return parts, inputs[-1] if others else None


def _column(path: Path, names: Sequence[str], target: str | None) -> str:
    """The name of the target."""
    if target is not None:
        if target in names:
            return target
        if target.isdecimal() and int(target) < len(names):
            return names[int(target)]
    got = "none was given" if target is None else f"got {target!r}"
    raise DataError(
        f"target (--target) must name the column of {path} to predict, or be its number from 0: "
        f"one of {', '.join(names)}; {got}."
    )


def _table_labels(tables: Sequence[_Table], target: str, task: str | None) -> list[np.ndarray]:
    numbers = [table.numbers(target) for table in tables]
    if any(of_table is None for of_table in numbers):
        if task == "regression":
            raise DataError(f"column {target!r} must be numbers for a regression.")
        classes = sorted({*tables[0].columns[target]})
        if task is None and len(classes) > MAX_CLASSES:
            raise DataError(
                f"column {target!r} must be numbers or at most {MAX_CLASSES} different words, got "
                f"{len(classes)}; if these are classes, say so (--task classification)."
            )
        places = {word: place for place, word in enumerate(classes)}
        unknown = {word for table in tables for word in table.columns[target]} - {*classes}
        if unknown:
            raise DataError(
                f"column {target!r} has the class {sorted(unknown)[0]!r} in the test examples, of "
                "which there is no training example."
            )
        return [np.array([places[word] for word in table.columns[target]]) for table in tables]
    given = [np.asarray(of_table) for of_table in numbers]
    if task is None:
        distinct = np.unique(given[0])
        whole = bool((distinct == np.round(distinct)).all())
        task = "classification" if whole and len(distinct) <= MAX_CLASSES else "regression"
    if task == "regression":
        return given
    given = [_as_task(f"column {target!r}", of_table, task) for of_table in given]
    classes_of = np.unique(given[0])
    for of_table in given[1:]:
        unknown_numbers = np.setdiff1d(of_table, classes_of)
        if len(unknown_numbers):
            raise DataError(
                f"column {target!r} has the class {unknown_numbers[0]} in the test examples, of "
                "which there is no training example."
            )
    return [np.searchsorted(classes_of, of_table) for of_table in given]


@dataclass(frozen=True)
class Predictions:
    """What networks that were trained elsewhere predict for the same test examples.

    Attributes:
        log_probs: by method, float32 `[member, example, class]`; of "monte_carlo" the masks are
            `[network, mask, example, class]`.
        labels: int32 `[example]`.
    """

    log_probs: dict[str, np.ndarray]
    labels: np.ndarray


def load_predictions(path: Path) -> Predictions:
    """Loads predictions from an `.npz`.

    It holds `labels` `[example]` and `plain` `[member, example, class]`, normalised
    log-probabilities of independently trained networks; and of what they are compared with:
    `dropout` `[member, example, class]`, `monte_carlo` `[mask, example, class]` or
    `[network, mask, example, class]`, and any others by a name of their own, like `dropout`.

    Raises:
        DataError: a file that is missing, damaged or does not hold this; the message says more.

    Example:
        >>> import pathlib, tempfile
        >>> coin = np.full((4, 10, 2), np.log(0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "mine.npz")
        ...     np.savez(path, labels=np.arange(10) % 2, plain=coin, dropout=coin)
        ...     predictions = load_predictions(path)
        >>> predictions.log_probs["dropout"].shape
        (4, 10, 2)
    """
    arrays = _read_npz(path)
    _require(path, arrays, ("labels", "plain"))
    labels = arrays.pop("labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels of {path} must be integers [example], got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    log_probs = {}
    shape = arrays["plain"].shape[-1:]
    if shape == (1,):
        raise DataError(
            f"plain of {path} must have at least 2 classes, got 1; where there are two, give the "
            "log-probabilities of both."
        )
    for name, array in arrays.items():
        if name == "monte_carlo" and array.ndim == 3:
            array = array[None]
        wanted = 4 if name == "monte_carlo" else 3
        if array.ndim != wanted or array.shape[-2:] != (len(labels), *shape) or 0 in array.shape:
            axes = "[network, mask, example, class]" if wanted == 4 else "[member, example, class]"
            raise DataError(
                f"{name} of {path} must be {axes} with the {len(labels)} examples of labels and "
                f"the classes of plain, got the shape {array.shape}."
            )
        log_probs[name] = _log_probs(f"{name} of {path}", array)
    if len(arrays["plain"]) < 4:
        raise DataError(
            f"plain of {path} must hold at least 4 networks, two groups of two, got "
            f"{len(arrays['plain'])}."
        )
    if len(arrays) == 1:
        raise DataError(
            f"{path} must hold something to compare with plain: dropout, monte_carlo or another "
            "method."
        )
    if labels.min() < 0 or labels.max() >= shape[0]:
        raise DataError(
            f"labels of {path} must lie in [0, {shape[0]}), the classes of plain, got "
            f"{labels.min()} to {labels.max()}."
        )
    for name, array in log_probs.items():
        of_label = array[..., np.arange(len(labels)), labels]
        ruled_out = np.argwhere(np.isneginf(of_label))
        if len(ruled_out):
            *network, example = (int(index) for index in ruled_out[0])
            raise DataError(
                f"{name} of {path} gives the right class the probability 0 in {len(ruled_out)} "
                f"places, first in {network} of the networks at example {example}, and its NLL is "
                "infinite; take log_softmax of the logits in floats that can hold it."
            )
    return Predictions(log_probs, labels.astype(np.int32))


def _log_probs(what: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise DataError(f"{what} must be log-probabilities, floats, got the dtype {array.dtype}.")
    # What float32 cannot hold has the probability 0.
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if np.isnan(array).any():
        raise DataError(f"{what} must be numbers, but {int(np.isnan(array).sum())} are NaN.")
    sums = np.exp(np.minimum(array, 50)).sum(-1)
    if np.abs(sums - 1).max() > 1e-3:
        hint = "take `log_softmax` of logits"
        if array.min() >= 0 and np.abs(array.sum(-1) - 1).max() < 1e-3:
            hint = "these are probabilities, take their logarithm"
        raise DataError(
            f"{what} must be normalised log-probabilities, whose exponentials sum to 1, but they "
            f"sum to {sums.min():.3g} to {sums.max():.3g}; {hint}."
        )
    return array
