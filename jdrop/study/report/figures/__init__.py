"""The figures of a comparison. A function returns None where the comparison lacks its results."""

from collections.abc import Callable

from matplotlib.figure import Figure

from jdrop.study.report.figures.calibration import calibration
from jdrop.study.report.figures.cost import score_against_cost, score_against_other_costs
from jdrop.study.report.figures.difference import difference, example_differences
from jdrop.study.report.figures.diversity import diversity
from jdrop.study.report.figures.hidden_units import co_adaptation, features
from jdrop.study.report.figures.masks import exact, mask_curve
from jdrop.study.report.figures.sweep import sweep
from jdrop.study.report.figures.training import learning_curves, overfitting
from jdrop.study.report.figures.tuning import tuning
from jdrop.study.report.figures.worth import score_against_size, worth_chart
from jdrop.study.results import Comparison

FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "difference": difference,
    "score_against_cost": score_against_cost,
    "score_against_size": score_against_size,
    "worth_chart": worth_chart,
    "example_differences": example_differences,
    "tuning": tuning,
    "score_against_other_costs": score_against_other_costs,
    "mask_curve": mask_curve,
    "exact": exact,
    "overfitting": overfitting,
    "learning_curves": learning_curves,
    "diversity": diversity,
    "calibration": calibration,
    "co_adaptation": co_adaptation,
    "features": features,
    "sweep": sweep,
}
"""The figures in the order of the report, by the name of their file."""
