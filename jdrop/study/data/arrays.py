"""Arrays of the user, in memory or in an `.npz`: checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.data.dataset import (
    DataError,
    Dataset,
    Progress,
    list_names,
    no_progress,
    require_finite,
    shuffled,
    unmasked,
)
from jdrop.study.data.groups import checked_groups, number_groups
from jdrop.study.data.inputs import checked_inputs, require_alike
from jdrop.study.data.streams import num_examples


def from_arrays(
    name: str,
    inputs: Any,
    labels: Any,
    test_inputs: Any,
    test_labels: Any,
    ood_inputs: Any = None,
    groups: Any = None,
    test_groups: Any = None,
    *,
    progress: Progress = no_progress,
) -> Dataset:
    """Makes a data set of arrays: integer labels are classes, floats are targets.

    Args:
        name: for reports and messages.
        inputs: training inputs `[example, feature, ...]`, or a pytree of arrays `[example, ...]`;
            or sources of examples; see `jdrop.study.data.inputs.checked_inputs`.
        labels: training labels `[example]`, classes from 0 or targets; or classes of tokens
            `[example, length]`, where numbers below 0 mark positions without a label.
        test_inputs: as `inputs`.
        test_labels: as `labels`.
        ood_inputs: out-of-distribution inputs, as `inputs`, for classification of whole examples.
            By default test inputs with their features in random order, if the inputs are one array
            of floats.
        groups: the group of each training example, such as its patient: integers or text
            `[example]`.
        test_groups: the group of each test example, as `groups`. If not given, the examples are
            taken as independent. Tokens of one example always belong together.
        progress: is called as inputs are read from a source.

    Raises:
        DataError: shapes or dtypes do not fit, values are not finite or masked, a class has no
            training example, or all test examples are of one group.

    Example:
        >>> data = from_arrays("x", np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1])
        >>> data.num_classes, data.ood_name
        (2, 'shuffled features')
    """
    data = _without_groups(name, inputs, labels, test_inputs, test_labels, ood_inputs, progress)
    if test_groups is None:
        if groups is not None:
            raise DataError(
                "test_groups must be given beside groups, since the groups of the test examples "
                "are resampled; give both, or leave both out."
            )
        return data
    train_groups = None
    if groups is not None:
        train_groups = _one_for_each("groups", groups, len(data.train_labels))
    train_groups, test_groups, group_labels = number_groups(
        train_groups, _one_for_each("test_groups", test_groups, len(data.test_labels))
    )
    return replace(
        data,
        group_name="group",
        train_groups=train_groups,
        test_groups=test_groups,
        group_labels=group_labels,
    )


def _one_for_each(name: str, groups: Any, num_examples: int) -> np.ndarray:
    array = checked_groups(name, groups)
    if len(array) != num_examples:
        raise DataError(
            f"{name} must hold one group for each of the {num_examples} examples, got {len(array)}."
        )
    return array


def _without_groups(
    name: str,
    inputs: Any,
    labels: Any,
    test_inputs: Any,
    test_labels: Any,
    ood_inputs: Any,
    progress: Progress,
) -> Dataset:
    """The data set of arrays, whose examples are taken as independent."""
    train = checked_inputs("inputs", inputs, progress=progress)
    test = checked_inputs("test_inputs", test_inputs, progress=progress)
    require_alike("test_inputs", test, train)
    ood_name = None
    others = None
    if ood_inputs is not None:
        others = checked_inputs("ood_inputs", ood_inputs, progress=progress)
        require_alike("ood_inputs", others, train)
        ood_name = "the inputs given"
    given = (
        checked_labels("labels", labels, num_examples(train)),
        checked_labels("test_labels", test_labels, num_examples(test)),
    )
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
        # Rounding keeps the standard deviation of equal numbers above 0.
        if given[0].min() == given[0].max():
            raise DataError(f"labels must differ, got {given[0][0]} for every training example.")
        require_variance("labels", given[0])
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
    if given[0].ndim != given[1].ndim:
        raise DataError(
            f"labels and test_labels must both be of examples or both of tokens, got the shapes "
            f"{given[0].shape} and {given[1].shape}."
        )
    is_per_token = given[0].ndim > 1
    if is_per_token and others is not None:
        raise DataError(
            "ood_inputs are for one label per example, since nothing says which of their tokens "
            "count; leave them out."
        )
    data = Dataset(
        name=name,
        train_inputs=train,
        train_labels=given[0].astype(np.int32),
        test_inputs=test,
        test_labels=given[1].astype(np.int32),
        num_classes=_num_classes_of_tokens(*given) if is_per_token else _num_classes(*given),
        ood_name=ood_name,
        ood_inputs=others,
    )
    if others is None and not is_per_token and data.has_features:
        return replace(data, ood_name="shuffled features", ood_inputs=shuffled(test, 0))
    return data


def require_variance(name: str, values: np.ndarray) -> None:
    """Raises if values differ but float64 cannot hold their variance."""
    smallest, largest = values.min(), values.max()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        variance = values.var()
    if smallest != largest and not np.finfo(np.float64).tiny <= variance < np.inf:
        raise DataError(
            f"{name} must have a variance that float64 can hold, got values from {smallest:.3g} "
            f"to {largest:.3g}; give them in another unit."
        )


def checked_labels(
    name: str, labels: Any, num_examples: int, task: str | None = None
) -> np.ndarray:
    """Labels as int64 or float64; raises if they are not those of so many examples."""
    array = unmasked(name, labels)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"{name} must be integers (classes) or floats (targets), got the dtype {array.dtype}."
        )
    has_length = array.ndim > 1 and array.shape[0] == num_examples and array.shape[1] > 1
    is_per_token = has_length and array.dtype.kind in "iu" and task != "regression"
    if array.shape != (num_examples,) and not is_per_token:
        hint = ""
        if array.ndim == 2 and has_length:
            hint = "; turn one-hot labels into integers with `labels.argmax(-1)`"
        raise DataError(
            f"{name} must hold one number for each of the {num_examples} inputs, or one integer "
            f"for each of their tokens, got the shape {array.shape}{hint}."
        )
    if is_per_token:
        return _checked_labels_of_tokens(name, array)
    array = as_task(name, array, task)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.min() < 0:
        raise DataError(
            f"{name} must be classes from 0, got {array.min()}; for regression give floats."
        )
    return array.astype(np.int64)


def _checked_labels_of_tokens(name: str, labels: np.ndarray) -> np.ndarray:
    """Labels per token as int64, -1 for all that are below 0."""
    if labels.max() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"{name} must hold a class from 0 for at least one token, and below 0 only positions "
            f"without a label, got {labels.min()} to {labels.max()}."
        )
    return np.maximum(labels.astype(np.int64), -1)


def _num_classes_of_tokens(train: np.ndarray, test: np.ndarray) -> int:
    if len(np.unique(np.nonzero(test >= 0)[0])) < 2:
        raise DataError(
            "test_labels must have labels in at least 2 examples, since the tokens of an example "
            "are resampled together, got one; test on more."
        )
    return max(2, int(train.max()) + 1, int(test.max()) + 1)


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


def as_task(name: str, labels: np.ndarray, task: str | None) -> np.ndarray:
    """Labels with the dtype of the task: integers for classes, floats for targets."""
    if labels.dtype.kind != "f":
        return labels.astype(np.float64) if task == "regression" else labels
    require_finite(name, labels)
    if task != "classification":
        return labels
    broken = labels[labels != np.round(labels)]
    if len(broken):
        raise DataError(f"{name} must be whole numbers to be classes, got {broken[0]}.")
    if np.abs(labels).max() > 2**53:
        raise DataError(f"{name} must be at most 2^53 to be classes, got {np.abs(labels).max()}.")
    return labels.astype(np.int64)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an `.npz` by name; raises if it cannot be read."""
    if not path.exists():
        raise DataError(f"{path} cannot be read: there is no such file.")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} must be an .npz of several arrays, got a single one.")
            arrays = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give a file that can be read."
        ) from error
    except Exception as error:  # NumPy and zipfile raise many on damaged files.
        raise DataError(
            f"{path} cannot be read as an .npz of numbers; write it with `numpy.savez`, without "
            "objects."
        ) from error
    return arrays


def require_arrays(path: Path, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Raises if an array is missing."""
    for name in names:
        if name not in arrays:
            raise DataError(
                f"{path} must hold an array {name!r}, got {list_names(sorted(arrays)) or 'none'}."
            )
