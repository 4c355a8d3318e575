"""The look of all figures: colors, axes, bands and error bars."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from jdrop.statistics import Interval
from jdrop.study.methods import METHODS, Method
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import score_text
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES

WIDTH = 6.4
"""Of all figures, in inches: their letters stay readable on a screen of 390 pixels."""

GREY = "#777777"
"""Of zero lines, margins and other marks that are no method."""


MAX_HOVER_POINTS = 12
"""Points of a curve that show their values."""


def new_figure(height: int | float, width: float = WIDTH) -> Figure:
    """A figure of the common width; both lengths are in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def style_of(name: str) -> tuple[str, str]:
    """The color and the marker of a method; given predictions have the default ones."""
    method = METHODS.get(name, Method)
    return method.color, method.marker


def main_scores(comparison: Comparison) -> tuple[str, str]:
    """The two scores of figures with few panels: the main score, and the error where it exists."""
    first, second, *_ = comparison.curve_scores
    return first, "error" if "error" in comparison.curve_scores else second


def axis_label(score: str) -> str:
    """The title of a score and its unit in brackets."""
    shown_as = SCORES[score]
    return f"{shown_as.title} ({shown_as.unit})" if shown_as.unit else shown_as.title


def literal(text: str) -> str:
    """The text with its dollar signs escaped, so that names are not typeset as formulas."""
    return text.replace("$", r"\$")


def interval_arrays(
    intervals: Sequence[Interval], scale: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, lower and upper ends; both ends are the mean where there is one replicate."""
    ends = [
        (
            interval.mean,
            interval.mean if interval.low is None else interval.low,
            interval.mean if interval.high is None else interval.high,
        )
        for interval in intervals
    ]
    mean, low, high = np.array(ends).T * scale
    return mean, low, high


def draw_band(
    axes: Axes,
    x: Sequence[int | float],
    intervals: Sequence[Interval],
    score: str,
    method: str,
    **line: Any,
) -> None:
    """Draws a line through the means of a score and a band between the ends of its intervals."""
    mean, low, high = interval_arrays(intervals, SCORES[score].scale)
    color, _ = style_of(method)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(x, mean, color=color, **line)
    _add_scores(axes, x, mean, intervals, score, line.get("label", method))


def draw_error_bars(
    axes: Axes,
    x: Sequence[int | float],
    intervals: Sequence[Interval],
    score: str,
    method: str,
    **line: Any,
) -> None:
    """Draws the means of a score with error bars between the ends of its intervals."""
    mean, low, high = interval_arrays(intervals, SCORES[score].scale)
    color, marker = style_of(method)
    errors = np.stack([mean - low, high - mean])
    axes.errorbar(x, mean, errors, color=color, marker=marker, **line)
    _add_scores(axes, x, mean, intervals, score, line.get("label", method))


def _add_scores(
    axes: Axes,
    x: Sequence[int | float],
    mean: np.ndarray,
    intervals: Sequence[Interval],
    score: str,
    label: str,
) -> None:
    """Shows the scores when the pointer is over them."""
    name = label.replace(r"\$", "$")
    shown = np.unique(np.linspace(0, len(x) - 1, MAX_HOVER_POINTS).round().astype(int))
    texts = [f"{name}, {x[i]:g}: {score_text(score, intervals[i], unit=True)}" for i in shown]
    add_hover_points(axes, [x[i] for i in shown], [mean[i] for i in shown], texts)


def add_grid(axes: Axes) -> None:
    """Adds a grid and removes the frame's upper and right lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def label_log_ticks(axes: Axes) -> None:
    """Labels the ticks of a logarithmic x axis with plain numerals, not powers of ten."""
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: Figure, axes: Axes) -> None:
    """Adds one legend for all panels above them, with the entries of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9.5)


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes the name of each line at its right end, outside the data and without overlap.

    Args:
        figure: of the axes.
        axes: of the lines, with their final limits.
        ends: by line, the y value of its last point, the name, and the color.
    """
    # Shares of the axes' height, so that a logarithmic axis needs no other step.
    step = 12 / (axes.get_position().height * figure.get_figheight() * 72)
    left = axes.get_xlim()[0]
    placed = -np.inf
    for value, name, color in sorted(ends):
        height = axes.transAxes.inverted().transform(axes.transData.transform((left, value)))[1]
        placed = max(min(max(height, 0), 1), placed + step)
        axes.text(
            1.02, placed, name, va="center", color=color, fontsize=9.5, transform=axes.transAxes
        )
