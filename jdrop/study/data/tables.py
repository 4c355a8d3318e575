"""Files of the user, `.npz` archives and tables of text: loaded, split and standardised."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jdrop.study.data.arrays import (
    checked_labels,
    from_arrays,
    read_npz,
    require_arrays,
)
from jdrop.study.data.dataset import (
    DataError,
    Dataset,
    generator,
    printable,
    strata,
    stratified,
    with_label_noise,
)
from jdrop.study.data.groups import number_groups, read_groups, split_groups
from jdrop.study.data.inputs import checked_inputs

TEST_SHARE = 0.2  # Of a file without test examples.


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
    groups: str | None = None,
    as_features: bool = False,
) -> Dataset:
    """Loads a data set from a file of the user.

    An `.npz` holds `train_inputs`, `train_labels`, `test_inputs` and `test_labels`, or `inputs` and
    `labels`, of which a fifth is held out for testing. It may hold `ood_inputs`. The inputs are not
    scaled.

    Any other file is a table of text, with commas, semicolons, tabs or spaces between the columns.
    The first row names the columns. If it holds only numbers, it is an example, and the columns are
    named "0", "1", ... A column of words becomes a column of zeros and ones for each word.
    Every column is standardised by its mean and standard deviation over the training examples. A
    column that is constant over the training examples becomes 0.

    Args:
        path: the file.
        target: the column of a table to predict: its name, or its index from 0.
        task: "classification" or "regression". None takes for classes: words or at most 100
            different whole numbers in a table, integers in an `.npz`.
        test_path: a second table, of test examples.
        train_size: count of training examples; None takes all that are not held out.
        label_noise: share of training labels, in [0, 1), that become wrong.
        seed: chooses the held-out examples, the training examples and the wrong labels.
        ood_path: file of out-of-distribution inputs: an `.npz` with `inputs` for an `.npz`, a table
            with the same columns for a table.
        groups: the column of a table that says to which group an example belongs, such as its
            patient: the name or index of the column, which is then no feature. Or a file with the
            group of each example, see `jdrop.study.data.groups.read_groups`: of all examples,
            first the training examples, or of the given test examples alone. None takes the
            examples as independent.
        as_features: whether integers among the inputs of an `.npz` are features, as the MLP takes
            them, and not token ids.

    Raises:
        DataError: the file is missing, damaged or not as described; the message names the column,
            the row and the cell.

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
    classes = group_name = group_of_example = None
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
        parts, ood_inputs = _npz_parts(path, task, ood_path, as_features)
    else:
        # Imported here: pandas takes longer to import than other data sets take to load.
        from jdrop.study.data.columns import read_examples

        examples = read_examples(
            path,
            target=target,
            task=task,
            test_path=test_path,
            ood_path=ood_path,
            groups=groups,
        )
        pairs = zip(examples.inputs, examples.labels, strict=True)
        parts = [array for pair in pairs for array in pair]
        ood_inputs, classes = examples.ood_inputs, examples.classes
        group_name, group_of_example = examples.group_name, examples.groups
    if groups is not None and group_of_example is None:
        group_name, group_of_example = "group", read_groups(Path(groups))
    inputs, labels, *test = parts
    rng = generator(seed, "split")
    classes_of_examples = strata(labels)
    chosen = np.ones(len(labels), bool)
    num_given_test = len(test[1]) if test else 0
    if not test:
        if len(labels) < 2:
            raise DataError(
                f"{path} must hold examples to train on and to test on, got one in all."
            )
        num_test = max(1, round(TEST_SHARE * len(labels)))
        num_train = len(labels) - num_test
        if train_size is not None:
            num_train = _fitting(train_size, len(labels) - 1)
        chosen = stratified(rng, classes_of_examples, num_train)
        test = [inputs[~chosen], labels[~chosen]]
    elif train_size is not None:
        chosen = stratified(rng, classes_of_examples, _fitting(train_size, len(labels)))
    inputs, labels = inputs[chosen], labels[chosen]
    if is_table:
        if classes is not None:
            _require_every_class(classes, labels)
        # Rounding keeps the standard deviation of equal numbers above 0.
        varies = inputs.max(0) > inputs.min(0)
        mean = np.where(varies, inputs.mean(0), inputs[0])
        scale = np.where(varies, inputs.std(0), 1)
        inputs, test[0] = (inputs - mean) / scale, (test[0] - mean) / scale
        if ood_inputs is not None:
            ood_inputs = (ood_inputs - mean) / scale
    data = from_arrays(printable(path.stem), inputs, labels, test[0], test[1], ood_inputs)
    if group_of_example is not None:
        parts_of_groups = split_groups(
            f"groups (--groups) of {path}", group_of_example, chosen, num_given_test
        )
        train_groups, test_groups, group_labels = number_groups(*parts_of_groups)
        data = replace(
            data,
            group_name=group_name,
            train_groups=train_groups,
            test_groups=test_groups,
            group_labels=group_labels,
        )
    return with_label_noise(data, label_noise, seed)


def _require_every_class(classes: Sequence[str | int], labels: np.ndarray) -> None:
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if len(absent):
        raise DataError(
            f"labels must have a training example of every class, but class "
            f"{classes[absent[0]]!r} has none; train on more examples (--train-size), or leave "
            "this class out."
        )


def _fitting(train_size: int, available: int) -> int:
    if not 2 <= train_size <= available:
        raise DataError(
            f"train_size (--train-size) must lie in [2, {available}], got {train_size}."
        )
    return train_size


def _npz_parts(
    path: Path, task: str | None, ood_path: Path | None, as_features: bool
) -> tuple[list[np.ndarray], np.ndarray | None]:
    arrays = read_npz(path)
    names = ["inputs", "labels"]
    if "train_inputs" in arrays:
        names = ["train_inputs", "train_labels", "test_inputs", "test_labels"]
    require_arrays(path, arrays, names)
    parts = []
    for inputs_name, labels_name in zip(names[::2], names[1::2], strict=True):
        inputs = checked_inputs(inputs_name, arrays[inputs_name], as_features=as_features)
        parts += [inputs, checked_labels(labels_name, arrays[labels_name], len(inputs), task)]
    ood_inputs = arrays.get("ood_inputs")
    if ood_path is not None:
        others = read_npz(ood_path)
        require_arrays(ood_path, others, ["inputs"])
        ood_inputs = others["inputs"]
    if ood_inputs is not None:
        ood_inputs = checked_inputs("ood_inputs", ood_inputs, as_features=as_features)
    return parts, ood_inputs
