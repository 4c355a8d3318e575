"""Margins: the largest differences between two methods that count as none."""

from collections.abc import Mapping

import numpy as np

from jdrop.study.errors import UserError
from jdrop.study.evaluation.readings import Reading

CLASSIFICATION_MARGINS = {"nll": 0.01, "calibrated_nll": 0.01, "brier": 0.005, "error": 0.005}
"""By score, the default margins in classification."""


def regression_margins(plain: Reading, labels: np.ndarray, scale: float) -> dict[str, float]:
    """Returns the default margins in regression, see `jdrop.study.evaluation.evaluate`.

    Args:
        plain: predictions of the plain networks.
        labels: targets of the test examples.
        scale: standard deviation of the targets in the training examples.
    """
    step = 0.01 * scale
    rmse = float(np.sqrt(np.mean((plain.outputs.mean(1, dtype=np.float64) - labels) ** 2)))
    # Moving the RMSE by a small step moves the MSE by the step times twice the RMSE.
    return {"calibrated_nll": 0.01, "crps": step, "mse": 2 * step * rmse}


def choose_margins(
    defaults: Mapping[str, float], given: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the default margins, with the given ones in their place.

    Raises:
        UserError: if a given margin is of a score without a default.
    """
    unknown = set(given or ()) - set(defaults)
    if unknown:
        raise UserError(
            f"margins (--margin) must be of {', '.join(defaults)}, got one of "
            f"{', '.join(sorted(unknown))}."
        )
    return {**defaults, **(given or {})}
