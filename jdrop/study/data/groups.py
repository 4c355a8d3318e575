"""Groups of examples that belong together: of one writer, patient or molecule."""

from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.data.dataset import DataError, list_names


def read_groups(path: Path) -> np.ndarray:
    """Reads the group of each example: text `[example]`, or integers from a `.npy`.

    A `.npy` holds one array `[example]` of integers or text. Any other file is text with one label
    in each line.

    Raises:
        DataError: the file is missing or damaged, or a line of it is empty.
    """
    try:
        if path.suffix == ".npy":
            return checked_groups(str(path), np.load(path, allow_pickle=False))
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except DataError:
        raise
    # A damaged .npy raises EOFError or ValueError; a UnicodeDecodeError is a ValueError.
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"groups (--groups) must be a text file with one label in each line, or a .npy, but "
            f"{path} cannot be read ({error})."
        ) from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path} must hold the group of each example, one in each line, got none.")
    if "" in lines:
        raise DataError(
            f"{path} must hold the group of an example in each line, but line "
            f"{lines.index('') + 1} is empty; fill it in."
        )
    return np.array(lines)


def checked_groups(name: str, groups: Any) -> np.ndarray:
    """Groups as integers or text `[example]`; raises if they are neither."""
    if np.ma.is_masked(groups):
        raise DataError(
            f"{name} must hold a group for every example, but {np.ma.count_masked(groups)} are "
            "masked; fill them in."
        )
    array = np.asarray(groups)
    if array.dtype.kind == "O" and all(isinstance(group, str) for group in array.flat):
        array = array.astype(str)  # As pandas holds text.
    if array.dtype.kind not in "iuU" or array.ndim != 1:
        raise DataError(
            f"{name} must be integers or text [example], the group of each example, got the dtype "
            f"{array.dtype} and the shape {array.shape}."
        )
    return array


def split_groups(
    name: str, groups: np.ndarray, chosen: np.ndarray, num_test: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Divides the groups of a file's examples into those of the training and the test examples.

    Args:
        name: of the groups, for messages.
        groups: of all examples `[example]`, in the order of the data, first the training examples;
            or of the test examples alone, where the data divides training and test examples.
        chosen: Booleans `[example]`: True for the examples that are trained on.
        num_test: count of further examples, all of them for testing. If it is 0, the test examples
            are those that are not chosen.

    Returns:
        The training groups, None if they are not known, and the test groups.

    Raises:
        DataError: too many or too few groups.
    """
    num_examples = len(chosen) + num_test
    if len(groups) == num_examples:
        rest = groups[len(chosen) :] if num_test else groups[~chosen]
        return groups[: len(chosen)][chosen], rest
    if num_test and len(groups) == num_test:
        return None, groups
    allowed = f"for each of the {num_examples} examples"
    if num_test:
        allowed += (
            f" ({len(chosen)} to train on, then {num_test} to test on), or for the {num_test} "
        )
        allowed += "test examples alone"
    raise DataError(f"{name} must hold a group {allowed}, got {len(groups)}.")


def number_groups(
    groups: np.ndarray | None, test_groups: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray, tuple[str, ...]]:
    """Numbers groups from 0, in order; equal groups of training and test get equal numbers.

    Args:
        groups: of the training examples, integers or text `[example]`; None if they are not known.
        test_groups: of the test examples.

    Returns:
        Both as int32 `[example]`, and the groups by their number.

    Raises:
        DataError: all test examples are of one group, or one part holds text and the other numbers.

    Example:
        >>> train, test, labels = number_groups(np.array(["ann", "eve"]), np.array(["bob", "eve"]))
        >>> train.tolist(), test.tolist(), labels
        ([0, 2], [1, 2], ('ann', 'bob', 'eve'))
    """
    names = np.unique(test_groups)
    if len(names) < 2:
        raise DataError(
            f"the test examples must be of at least 2 groups, since whole groups are resampled, "
            f"but all are of the group {list_names(map(str, names))}; test on more groups, or "
            "leave the groups out."
        )
    parts = [test_groups] if groups is None else [groups, test_groups]
    if len({part.dtype.kind == "U" for part in parts}) > 1:
        raise DataError(
            f"groups and test_groups must both be integers or both text, got "
            f"{parts[0].dtype} and {parts[1].dtype}."
        )
    labels, numbers = np.unique(np.concatenate(parts), return_inverse=True)
    numbers = numbers.astype(np.int32)
    train_numbers = None if groups is None else numbers[: len(groups)]
    return train_numbers, numbers[-len(test_groups) :], tuple(map(str, labels))
