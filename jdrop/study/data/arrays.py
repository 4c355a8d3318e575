"""Arrays of the user, in memory or in an `.npz`: checked before anything is trained."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.data.dataset import DataError, Dataset, list_names, shuffled
from jdrop.study.data.groups import checked_groups, number_groups


def from_arrays(
    name: str,
    inputs: Any,
    labels: Any,
    test_inputs: Any,
    test_labels: Any,
    ood_inputs: Any = None,
    groups: Any = None,
    test_groups: Any = None,
) -> Dataset:
    """Makes a data set of arrays: integer labels are classes, floats are targets.

    Args:
        name: for reports and messages.
        inputs: training inputs `[example, ...]` of any real dtype.
        labels: training labels `[example]`, classes from 0 or targets.
        test_inputs: as `inputs`.
        test_labels: as `labels`.
        ood_inputs: out-of-distribution inputs, as `inputs`, for classification; if not given, test
            inputs with their features in random order.
        groups: the group of each training example, such as its patient: integers or text
            `[example]`.
        test_groups: the group of each test example, as `groups`. If not given, the examples are
            taken as independent.

    Raises:
        DataError: shapes or dtypes do not fit, values are not finite or masked, a class has no
            training example, or all test examples are of one group.

    Example:
        >>> data = from_arrays("x", np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1])
        >>> data.num_classes, data.ood_name
        (2, 'shuffled features')
    """
    data = _without_groups(name, inputs, labels, test_inputs, test_labels, ood_inputs)
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
    name: str, inputs: Any, labels: Any, test_inputs: Any, test_labels: Any, ood_inputs: Any
) -> Dataset:
    """The data set of arrays, whose examples are taken as independent."""
    train, test = checked_inputs("inputs", inputs), checked_inputs("test_inputs", test_inputs)
    _same_features("test_inputs", test, train)
    ood_name = None
    others = None
    if ood_inputs is not None:
        others = checked_inputs("ood_inputs", ood_inputs)
        _same_features("ood_inputs", others, train)
        ood_name = "the inputs given"
    given = (
        checked_labels("labels", labels, train),
        checked_labels("test_labels", test_labels, test),
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


def checked_inputs(name: str, array: Any) -> np.ndarray:
    """Inputs as float32; raises if they are no finite numbers `[example, feature, ...]`."""
    array = _unmasked(name, array)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} must be numbers, got the dtype {array.dtype}.")
    if array.ndim < 2 or 0 in array.shape:
        raise DataError(
            f"{name} must be [example, feature, ...] with at least one of each, got the shape "
            f"{array.shape}; a single feature is `{name}[:, None]`."
        )
    require_finite(name, array)
    largest = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(single).all():
        raise DataError(
            f"{name} must lie within {largest:.2g} of 0, as float32 numbers do, got "
            f"{array[~np.isfinite(single)][0]}; scale them."
        )
    return single


def _unmasked(name: str, array: Any) -> np.ndarray:
    """The array; raises if values are masked, which NumPy would forget."""
    if np.ma.is_masked(array):
        raise DataError(
            f"{name} must hold a value everywhere, but {np.ma.count_masked(array)} are masked; "
            "fill them in (`array.filled(...)`), or leave those examples out."
        )
    return np.asarray(array)


def require_finite(name: str, array: np.ndarray) -> None:
    """Raises if a value is infinite or NaN."""
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index[0]) for index in np.nonzero(bad))
        raise DataError(
            f"{name} must be finite, but {int(bad.sum())} of {array.size} values are not, the "
            f"first at {first}; fill them in, or leave those examples out."
        )


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


def _same_features(name: str, array: np.ndarray, train: np.ndarray) -> None:
    if array.shape[1:] != train.shape[1:]:
        raise DataError(
            f"{name} must have examples of shape {train.shape[1:]}, as the training inputs have, "
            f"got {array.shape[1:]}."
        )


def checked_labels(
    name: str, labels: Any, inputs: np.ndarray, task: str | None = None
) -> np.ndarray:
    """Labels as int64 or float64; raises if they do not fit the inputs."""
    array = _unmasked(name, labels)
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
    array = as_task(name, array, task)
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
    if not path.is_file():
        raise DataError(f"{path} cannot be read: there is no such file.")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} must be an .npz of several arrays, got a single one.")
            arrays = {name: archive[name] for name in archive.files}
    # RuntimeError: the archive is encrypted, or its compression is unknown to Python.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
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
