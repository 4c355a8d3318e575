"""Folds of the training examples, for choices that must not see the test examples."""

import numpy as np

from jdrop.study.data.dataset import DataError, generator

NUM_FOLDS = 5


def folds(
    labels: np.ndarray,
    groups: np.ndarray | None,
    test_groups: np.ndarray | None,
    num_folds: int,
    seed: int,
) -> np.ndarray:
    """Divides training examples into folds for cross-validation: fold numbers `[example]`.

    The folds imitate the split into training and test examples:

    - Without groups, or where at least half of the test examples are in groups that have training
      examples too, every example is drawn by itself. The sizes of two folds differ by at most 1,
      and so do their counts of a class.
    - Otherwise whole groups are drawn. The largest group goes first, each to the fold where it
      makes the classes most even.

    Args:
        labels: `[example]`: integers are classes; floats are targets, which are not balanced.
        groups: group of each example, integers `[example]`; None without groups.
        test_groups: groups of the test examples. None without them: the test groups then count as
            others than the training groups.
        num_folds: count of folds, at least 2. There are fewer where there are fewer examples or,
            if whole groups are drawn, fewer groups. A single group is divided by example.
        seed: at least 0; equal arguments give equal folds.

    Returns:
        int64 `[example]`, from 0; every fold has examples.

    Raises:
        DataError: fewer than 2 folds or examples, a negative seed, or groups that are not one for
            each example.

    Example:
        >>> fold = folds(np.arange(20) % 2, None, None, 5, seed=0)
        >>> np.bincount(fold).tolist()
        [4, 4, 4, 4, 4]
    """
    if num_folds < 2:
        raise DataError(f"num_folds must be at least 2, got {num_folds}.")
    if len(labels) < 2:
        raise DataError(f"folds need at least 2 training examples, got {len(labels)}; give more.")
    if groups is not None and groups.shape != labels.shape:
        raise DataError(
            f"groups must hold one group for each of the {len(labels)} labels, got the shape "
            f"{groups.shape}."
        )
    rng = generator(seed, "folds")
    classes = np.zeros(len(labels), int)
    if labels.dtype.kind != "f":
        classes = np.unique(labels, return_inverse=True)[1]
    order = rng.permutation(len(labels))
    share_known = 0.0
    if groups is not None and test_groups is not None:
        share_known = float(np.isin(test_groups, groups).mean())
    if groups is not None and share_known < 0.5:
        group_of = np.unique(groups, return_inverse=True)[1]
        if group_of.max() > 0:
            return _folds_of_groups(rng, classes, group_of, num_folds)
    fold = np.empty(len(labels), int)
    # One class after another, each in random order.
    queue = order[np.argsort(classes[order], kind="stable")]
    fold[queue] = np.arange(len(labels)) % num_folds
    return fold


def _folds_of_groups(
    rng: np.random.Generator, classes: np.ndarray, group_of: np.ndarray, num_folds: int
) -> np.ndarray:
    """Fold numbers `[example]` that are equal within a group."""
    counts = np.zeros((group_of.max() + 1, classes.max() + 1))  # [group, class]
    np.add.at(counts, (group_of, classes), 1)
    shares = counts / counts.sum(0)
    # Random among groups of one size.
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    num_folds = min(num_folds, len(counts))
    filled = np.zeros((num_folds, counts.shape[1]))
    fold_of = np.empty(len(counts), int)
    for position, group in enumerate(order):
        # A group for each fold that is empty still, if the groups that are left are so few.
        is_empty = filled.sum(1) == 0
        must_fill = len(order) - position <= is_empty.sum()
        # The sum of squares over folds grows least where this product is smallest.
        growth = (2 * filled + shares[group]) @ shares[group]
        fold = int(np.argmin(np.where(is_empty | (not must_fill), growth, np.inf)))
        fold_of[group] = fold
        filled[fold] += shares[group]
    return fold_of[group_of]
