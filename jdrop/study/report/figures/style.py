"""The look of all figures: colors, axes, bands and error bars."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from jdrop.statistics import Interval
from jdrop.study.methods import METHODS, Method
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES


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
    color, marker = style_of(method)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(x, mean, color=color, marker=marker, **line)


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
    """Adds one legend for all panels, with the entries of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
