"""Intervals without values that a score cannot have."""

import math
from dataclasses import replace

from jdrop.statistics import Interval

LARGEST = {
    "nll": math.inf,
    "perplexity": math.inf,
    "brier": 2.0,
    "error": 1.0,
    "crps": math.inf,
    "mse": math.inf,
    "rmse": math.inf,
    "coverage": 1.0,
    "ece": 1.0,
    "ece_equal_mass": 1.0,
    "debiased_ece": 1.0,
    "aurc": 1.0,
    "entropy": math.inf,
    "mutual_information": math.inf,
    "auroc_entropy": 1.0,
    "auroc_mutual_information": 1.0,
}
"""By score, its largest value. None of these is below 0; the calibrated NLL of targets may be."""


def possible(score: str, interval: Interval) -> Interval:
    """The interval of a mean score, without values that the score cannot have."""
    if score not in LARGEST or interval.low is None or interval.high is None:
        return interval
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, LARGEST[score]))
