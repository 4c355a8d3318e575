import numpy as np
import pytest
from scipy import stats

from jdrop.statistics import mean_interval


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=8)
    interval = mean_interval(list(values))
    expected = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.num_replicates == 8


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    """5,000 samples of 4: the share of intervals that hold the mean is within 5 sigma of 0.95."""
    samples = np.random.default_rng(0).normal(size=(5000, 4))
    intervals = [mean_interval(list(sample)) for sample in samples]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert abs(covered - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 5000), covered


def test_one_replicate_has_no_interval():
    interval = mean_interval([0.5])
    assert (interval.mean, interval.low, interval.high, interval.num_replicates) == (
        0.5,
        None,
        None,
        1,
    )


def test_no_replicates_are_an_error():
    with pytest.raises(ValueError, match="at least one replicate"):
        mean_interval([])
