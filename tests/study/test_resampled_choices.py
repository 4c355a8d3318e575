"""How often resamples of the training examples choose the same candidate."""

import dataclasses

import numpy as np
import pytest
from bounds import binomial_bounds
from scipy import stats

from jdrop.study import tuning
from jdrop.study.analyses import TuningCurve
from jdrop.study.data import Dataset
from jdrop.study.parts import ResampledChoice, TuningPart
from jdrop.study.resampled_choices import (
    NUM_RESAMPLES,
    LeftOutPart,
    choice_shares,
    resampled_choices,
    store_losses,
)
from jdrop.study.run_folder import RunFolder

BERRY_ESSEEN = 0.4748
"""Of independent equal draws; Shevtsova 2011, arXiv:1111.6554."""


def share_of_first(differences, seed=0):
    """The share of a candidate whose losses are smaller than the other's by these differences."""
    rng = np.random.default_rng(5)
    other = rng.exponential(size=len(differences))
    losses = np.stack([other - differences, other])[:, None]
    shares = choice_shares(np.random.default_rng(seed), losses)
    assert shares.sum() == pytest.approx(1)
    return shares[0, 0]


@pytest.mark.parametrize(("num_better", "better", "worse"), [(4, 2.5, 1.0), (9, 0.6, 1.0)])
def test_shares_are_those_of_the_binomial_distribution(num_better, better, worse):
    """Of 15 examples some are better by one number, and the others worse by another."""
    n = 15
    differences = np.repeat([better, -worse], [num_better, n - num_better])
    # The first is chosen if k drawn examples that are better outweigh the others.
    outweigh = [k for k in range(n + 1) if k * better > (n - k) * worse + 1e-9]
    probability = stats.binom.sf(outweigh[0] - 1, n, num_better / n)
    low, high = binomial_bounds(NUM_RESAMPLES, probability)
    assert low <= NUM_RESAMPLES * share_of_first(differences) <= high


@pytest.mark.parametrize("standard_errors", [-1.5, 0.0, 0.5, 2.0])
def test_shares_are_those_of_the_normal_approximation(standard_errors):
    n = 2000
    noise = np.random.default_rng(1).gamma(2.0, size=n)
    noise -= noise.mean()
    differences = noise + standard_errors * noise.std() / np.sqrt(n)
    error = BERRY_ESSEEN * np.mean(abs(noise) ** 3) / (noise.std() ** 3 * np.sqrt(n))
    share = stats.norm.cdf(standard_errors)
    low = binomial_bounds(NUM_RESAMPLES, max(0.0, share - error))[0]
    high = binomial_bounds(NUM_RESAMPLES, min(1.0, share + error))[1]
    assert high - low < 0.4 * NUM_RESAMPLES  # The bounds say something.
    assert low <= NUM_RESAMPLES * share_of_first(differences) <= high


def test_sizes_are_chosen_each_by_itself_and_the_first_of_equal_losses():
    losses = np.zeros((3, 2, 10))
    losses[:, 0] += 1.0
    losses[:, 1] += np.array([0.3, 0.2, 0.4])[:, None]
    assert choice_shares(np.random.default_rng(0), losses).T.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_the_losses_of_examples_add_up_to_the_mean_loss():
    rng = np.random.default_rng(0)
    outputs = np.log(rng.dirichlet(np.ones(4), size=(3, 4, 9)))
    outputs[0, 1] = np.nan  # One network diverged,
    outputs[2] = np.nan  # and all of a replicate.
    labels = rng.integers(0, 4, 9)
    left_out = [np.arange(4), np.arange(4, 6), np.arange(6, 8)]
    sizes = [1, 3, 4]
    found = tuning.example_losses(outputs, labels, left_out, sizes)
    means = tuning.average_losses(outputs, labels, left_out)
    assert found.sum(1) == pytest.approx([means[size - 1] for size in sizes])
    single = -outputs[1, :, 4, labels[4]].mean()
    # Two examples of three replicates.
    assert found[0, 4] == pytest.approx(single / 2 / 3)
    assert not found[:, 8].any()
    outputs[:] = np.nan
    worst = tuning.example_losses(outputs, labels, left_out, sizes)
    assert worst.sum(1) == pytest.approx(tuning.WORST)


def test_the_squared_errors_of_examples_add_up_to_the_mean_loss():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(2, 3, 6)), rng.normal(size=6)
    left_out = [np.arange(3), np.arange(3, 6)]
    found = tuning.example_losses(outputs, targets, left_out, [1, 2, 3]).sum(1)
    assert found == pytest.approx(tuning.average_losses(outputs, targets, left_out))


def test_the_examples_of_a_group_are_drawn_together():
    inputs, labels = np.zeros((6, 1), np.float32), np.zeros(6, np.int32)
    data = Dataset("made up", inputs, labels, inputs, labels, 2)
    left_out = [np.array([0, 1]), np.array([2, 3, 4])]
    assert tuning._units(data, left_out).tolist() == [0, 1, 2, 3, 4, -1]
    groups = np.array([7, 3, 7, 3, 5, 4], np.int32)
    grouped = dataclasses.replace(
        data, train_groups=groups, test_groups=groups, group_name="person"
    )
    units = tuning._units(grouped, left_out)
    assert units.tolist() == [2, 0, 2, 0, 1, -1]
    losses = np.array([[1.0, 2.0, 4.0, 8.0, 16.0, 0.0]])
    assert tuning._add_up(losses, units).tolist() == [[10.0, 16.0, 5.0]]


def test_the_tokens_of_a_sequence_are_drawn_together():
    labels = np.array([[0, 1, -1], [1, -1, 0], [0, -1, -1]], np.int32)
    inputs = np.zeros((3, 3), np.int32)
    data = Dataset("made up", inputs, labels, inputs, labels, 2)
    assert tuning._units(data, [np.array([0, 1]), np.array([2, 3, 4])]).tolist() == [0, 0, 1, 1, 2]


def part_of(losses):
    return LeftOutPart({"plain": [1]}, {"plain": [np.asarray(losses, np.float32)[None]]})


def test_stored_losses_of_all_candidates_choose(tmp_path):
    folder = RunFolder(tmp_path, {})
    rng = np.random.default_rng(0)
    store_losses(folder, "tuning-plain", 5, part_of([0.2, 0.3]))
    assert resampled_choices(folder, "tuning-plain", [5, 10], rng) == {}  # As after an upgrade.
    store_losses(folder, "tuning-plain", 10, part_of([0.1, 0.2]))
    found = resampled_choices(folder, "tuning-plain", [5, 10], rng)
    assert found == {"plain": [ResampledChoice(1, [[0.0, 1.0]])]}


def test_parts_and_curves_of_earlier_versions_have_no_shares(tmp_path):
    @dataclasses.dataclass
    class Earlier:
        epochs: list
        losses: dict
        epoch_flops: float

    folder = RunFolder(tmp_path, {})
    folder.store("tuning-plain", Earlier([1, 2], {"plain": [[[0.5], [0.4]]]}, 1.0))
    assert folder.require("tuning-plain", TuningPart).resampled == {}
    assert TuningCurve("plain", 1, None, [1, 2], [0.5, 0.4], 2).choice_shares is None
