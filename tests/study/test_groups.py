"""Groups of examples that belong together, and folds that respect them."""

import numpy as np
import pytest

from jdrop.study.data import DataError, folds

# Folds.


@pytest.mark.parametrize("counts", [[40, 7, 23], [1, 1, 50], [5, 5, 5]])
def test_folds_and_their_classes_are_even_to_within_one_example(counts):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    fold = folds(labels, None, None, 5, seed=0)
    assert fold.dtype == np.int64
    for chosen in (labels == 0, labels == 1, labels == 2, labels >= 0):
        sizes = np.bincount(fold[chosen], minlength=5)
        assert len(sizes) == 5
        assert np.ptp(sizes) <= 1


def test_folds_of_targets_are_even_and_no_function_of_the_order_or_the_targets():
    targets = np.arange(1000.0)
    fold = folds(targets, None, None, 5, seed=0)
    assert np.bincount(fold).tolist() == [200] * 5
    # The mean of 200 of 0, ..., 999 has a standard deviation of 18; a failure lies 5.5 of them off.
    for index in range(5):
        assert abs(targets[fold == index].mean() - 499.5) < 100


def test_folds_follow_from_the_seed_alone():
    labels = np.arange(50) % 3
    first, again, other = (folds(labels, None, None, 5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_group_lies_in_one_fold_if_the_test_groups_are_others():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    labels = rng.integers(0, 3, 400)
    for test_groups in (np.array([40, 41]), None):
        fold = folds(labels, groups, test_groups, 5, seed=0)
        for group in range(40):
            assert len(np.unique(fold[groups == group])) == 1
        for label in range(3):
            share = np.bincount(fold[labels == label], minlength=5) / (labels == label).sum()
            assert np.all(np.abs(share - 0.2) < 0.05), share


def test_a_group_is_divided_if_a_test_group_has_training_examples():
    groups, labels = np.repeat(np.arange(10), 20), np.arange(200) % 2
    fold = folds(labels, groups, np.array([9, 10]), 5, seed=0)
    np.testing.assert_array_equal(fold, folds(labels, None, None, 5, seed=0))


def test_no_fold_is_empty_beside_one_large_group():
    groups = np.repeat(np.arange(5), [1000, 1, 1, 1, 1])
    labels = np.where(groups == 0, np.arange(1004) % 2, 0)
    fold = folds(labels, groups, None, 5, seed=0)
    assert sorted(np.bincount(fold).tolist()) == [1, 1, 1, 1, 1000]


def test_there_are_no_more_folds_than_groups_or_examples():
    assert np.unique(folds(np.arange(12) % 2, np.arange(12) % 3, None, 5, seed=0)).size == 3
    assert np.unique(folds(np.arange(4) % 2, None, None, 5, seed=0)).size == 4


def test_a_single_group_is_divided_by_example():
    fold = folds(np.arange(20) % 2, np.zeros(20, int), np.ones(3, int), 5, seed=0)
    assert np.bincount(fold).tolist() == [4] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(4), None, None, 1, 0), "num_folds must be at least 2, got 1"),
        ((np.arange(1), None, None, 5, 0), "at least 2 training examples, got 1"),
        ((np.arange(4), np.arange(3), None, 5, 0), r"each of the 4 labels, got the shape \(3,\)"),
        ((np.arange(4), None, None, 5, -1), "seed must not be negative"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        folds(*arguments)
