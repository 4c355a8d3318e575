"""Scores: predictions and labels in, numbers out. No plots, no files.

Scores of classification take normalised log-probabilities, of one prediction `[batch, class]`, be
it a network's or a pool's, or of its members `[member, batch, class]`, and are computed in float32
or, for 64-bit predictions, in float64. Labels of another shape or dtype than `[batch]` integers,
and predictions of another shape, are a `ValueError`; a label that is no class makes a score NaN,
and so does a prediction that is.
"""

from jdrop.metrics.calibration import calibrated_losses as calibrated_losses
from jdrop.metrics.calibration import calibrated_nll as calibrated_nll
from jdrop.metrics.calibration import confidence_bins as confidence_bins
from jdrop.metrics.calibration import debiased_ece as debiased_ece
from jdrop.metrics.calibration import ece as ece
from jdrop.metrics.calibration import fit_temperature as fit_temperature
from jdrop.metrics.calibration import mean_over_halvings as mean_over_halvings
from jdrop.metrics.calibration import reliability_curve as reliability_curve
from jdrop.metrics.diversity import Ambiguity as Ambiguity
from jdrop.metrics.diversity import ambiguity as ambiguity
from jdrop.metrics.diversity import disagreement as disagreement
from jdrop.metrics.diversity import pairwise_kl as pairwise_kl
from jdrop.metrics.diversity import q_statistic as q_statistic
from jdrop.metrics.regression import calibrated_mixture_losses as calibrated_mixture_losses
from jdrop.metrics.regression import crps_losses as crps_losses
from jdrop.metrics.regression import fit_scale as fit_scale
from jdrop.metrics.regression import interval_coverage as interval_coverage
from jdrop.metrics.regression import mixture_losses as mixture_losses
from jdrop.metrics.regression import rmse as rmse
from jdrop.metrics.regression import squared_ambiguity as squared_ambiguity
from jdrop.metrics.regression import squared_losses as squared_losses
from jdrop.metrics.scores import brier as brier
from jdrop.metrics.scores import error as error
from jdrop.metrics.scores import losses as losses
from jdrop.metrics.scores import nll as nll
from jdrop.metrics.uncertainty import auroc as auroc
from jdrop.metrics.uncertainty import entropy as entropy
from jdrop.metrics.uncertainty import mutual_information as mutual_information
from jdrop.metrics.uncertainty import risk_coverage as risk_coverage
