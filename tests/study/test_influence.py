"""Which examples carry a difference, on differences that can be added up by hand."""

import numpy as np
import pytest

from jdrop.study.evaluation.influence import influence

NAMES = {"method": "dropout", "size": 1, "against": 10, "score": "nll"}


def carried_by(differences, groups=None, labels=None):
    reference = np.zeros((2, len(differences)))
    # The two replicates differ, and their mean is what counts.
    losses = np.stack([np.array(differences) + 1, np.array(differences) - 1.0])
    return influence(losses, reference, groups, labels, **NAMES)


def test_a_few_examples_carry_half_of_the_difference():
    result = carried_by([-6.0, 1.0, -3.0, 1.0, 0.0, 1.0, -2.0, 0.0])
    assert result.difference == -1.0
    assert result.half == 1
    assert result.without == pytest.approx({"1": -2 / 7, "5": 3 / 3})
    assert (result.share_better, result.share_worse) == (3 / 8, 3 / 8)
    assert result.differences == [-6, -3, -2, 0, 0, 1, 1, 1]
    assert result.cumulative == pytest.approx(np.cumsum(result.differences) / 8)
    assert (result.method, result.against, result.largest_group) == ("dropout", 10, None)


def test_examples_that_favour_the_other_method_carry_a_positive_difference():
    result = carried_by([1.0, -1.0, 5.0, 3.0])
    assert result.difference == 2.0
    assert result.half == 1
    assert result.without["1"] == 1.0


def test_every_example_carries_an_even_difference():
    assert carried_by([-1.0] * 8).half == 4
    assert carried_by([-1.0] * 9).half == 5


def test_without_a_difference_no_example_carries_it():
    result = carried_by([1.0, -1.0])
    assert (result.half, result.without) == (None, {"1": -1.0})


def test_the_group_with_the_largest_share_is_named():
    result = carried_by([-6.0, 1.0, -3.0, 0.0], np.array([1, 1, 0, 0]), ["eve", "ann"])
    assert result.largest_group == "ann"
    assert result.largest_group_share == 5 / 8
    assert result.without_largest_group == -3 / 2


def test_many_examples_are_shown_by_quantiles():
    result = carried_by(np.arange(5000.0))
    assert len(result.differences) == len(result.cumulative) == 1001
    assert result.differences[0] == 0
    assert result.differences[-1] == 4999
    assert result.cumulative[-1] == pytest.approx(result.difference)
