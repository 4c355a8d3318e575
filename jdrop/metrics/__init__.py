"""Scores: arrays of predictions and labels in, numbers out. No plots, no files.

Classification scores take normalised log-probabilities: `[batch, class]` for a single network or a
pool, `[member, batch, class]` for members. Labels are integer class indices `[batch]`, from 0. All
scores are computed in float32, or in float64 for 64-bit predictions.

Scores that take labels raise a `ValueError` for arrays of other shapes and labels of other dtypes.
A NaN in the predictions, or a label out of range, makes the score NaN.
"""

from jdrop.metrics.calibration import (
    calibrated_losses,
    calibrated_nll,
    confidence_bins,
    debiased_ece,
    ece,
    fit_temperature,
    mean_over_splits,
    reliability_curve,
)
from jdrop.metrics.diversity import Ambiguity, ambiguity, disagreement, pairwise_kl, q_statistic
from jdrop.metrics.regression import (
    calibrated_mixture_losses,
    crps_losses,
    fit_scale,
    interval_coverage,
    mixture_losses,
    rmse,
    squared_ambiguity,
    squared_losses,
)
from jdrop.metrics.scores import brier, error, losses, nll
from jdrop.metrics.uncertainty import auroc, entropy, mutual_information, risk_coverage

__all__ = [
    "Ambiguity",
    "ambiguity",
    "auroc",
    "brier",
    "calibrated_losses",
    "calibrated_mixture_losses",
    "calibrated_nll",
    "confidence_bins",
    "crps_losses",
    "debiased_ece",
    "disagreement",
    "ece",
    "entropy",
    "error",
    "fit_scale",
    "fit_temperature",
    "interval_coverage",
    "losses",
    "mean_over_splits",
    "mixture_losses",
    "mutual_information",
    "nll",
    "pairwise_kl",
    "q_statistic",
    "reliability_curve",
    "risk_coverage",
    "rmse",
    "squared_ambiguity",
    "squared_losses",
]
