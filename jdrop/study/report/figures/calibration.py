"""The figure of calibration and selective prediction."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jdrop.study.report.figures.style import (
    add_grid,
    legend_above,
    literal,
    new_figure,
    style_of,
)
from jdrop.study.results import Comparison, MethodResult, Point

MAX_POINTS = 5

MIN_EXAMPLES = 5
"""In a bin that is drawn."""


def calibration(comparison: Comparison) -> Figure | None:
    """Reliability, and the error of the most confident predictions."""
    points = _shown_points(comparison)
    if not points:
        return None
    figure = new_figure(4)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#999999", lw=0.8)
    for method, point in points:
        color, _ = style_of(method.name)
        line = "-" if point.size > 1 else "--"
        reliability, risk = point.reliability, point.risk_coverage
        assert reliability is not None
        assert risk is not None
        # A bin of a few examples shows chance.
        is_shown = np.array(reliability.share) * comparison.data["test_size"] >= MIN_EXAMPLES
        left.plot(
            np.array(reliability.confidence)[is_shown],
            np.array(reliability.accuracy)[is_shown],
            color=color,
            ls=line,
            label=literal(method.title(point.size)),
        )
        right.plot(risk.coverage, np.array(risk.risk) * 100, color=color, ls=line)
    left.set_xlabel("probability of the top class")
    left.set_ylabel("how often it was right")
    right.set_xlabel("share, most confident first")
    right.set_ylabel("their error (%)")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        add_grid(axes)
    legend_above(figure, left)
    return figure


def _shown_points(comparison: Comparison) -> list[tuple[MethodResult, Point]]:
    """Smallest and largest size of the three main methods, else the first points of the table."""
    table = [(method, point) for method, point in comparison.table if point.reliability is not None]
    main = [
        (method, point)
        for method, point in table
        if method.name in ("plain", "dropout", "monte-carlo")
        and point.size in (1, method.points[-1].size)
    ]
    return (main or table)[:MAX_POINTS]
