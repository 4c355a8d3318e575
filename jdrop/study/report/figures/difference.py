"""Figures of differences: of each method to all plain networks, and of the examples behind one."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jdrop.study.analyses import Influence
from jdrop.study.report.figures.style import (
    GREY,
    add_grid,
    interval_arrays,
    literal,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import (
    difference_text,
    ends_text,
    signed_text,
    significant,
)
from jdrop.study.results import Comparison, Point
from jdrop.study.scores import SCORES

MAX_REACH = 5
"""A simple model is drawn if it is at most so many times as far from 0 as a network is."""


def difference(comparison: Comparison) -> Figure | None:
    """Each method's difference to the average of all plain networks, in the main score.

    The thick bar is the 90 % interval, which decides the verdict; the thin one has 95 %.
    """
    rows = [
        (method, point)
        for method, point in comparison.table
        if not (method.name == "plain" and point.size == comparison.ensemble.size)
    ]
    if not rows:
        return None
    score = comparison.curve_scores[0]
    shown_as = SCORES[score]
    # Narrower than others, so that the first figure has the largest letters.
    figure = new_figure(1.3 + 0.28 * len(rows), width=5.2)
    axes = figure.subplots()
    intervals = [point.minus_ensemble[score] for _, point in rows]
    means, lows, highs = interval_arrays(intervals, shown_as.scale)
    for row, (method, point) in enumerate(rows):
        color, marker = style_of(method.name)
        is_headline = comparison.headline is not None and point is comparison.headline[1]
        decides = point.against_ensemble[score].difference
        _, low, high = interval_arrays([decides], shown_as.scale)
        for ends, width in (
            ((lows[row], highs[row]), 1),
            ((low[0], high[0]), 5 if is_headline else 3.5),
        ):
            axes.plot(ends, [row] * 2, color=color, lw=width, solid_capstyle="butt")
        axes.plot([means[row]], [row], color=color, marker=marker, ms=10 if is_headline else 7)
    networks = [not method.is_baseline for method, _ in rows]
    near = np.abs(means) <= MAX_REACH * np.abs(means[networks]).max(initial=0)
    _limit(axes, lows[near], means[near], highs[near])
    _point_beyond(axes, means, [style_of(method.name)[0] for method, _ in rows])
    margin = comparison.margins[score] * shown_as.scale
    axes.axvspan(-margin, margin, color=GREY, alpha=0.18, lw=0)
    axes.axvline(0, color=GREY, lw=1)
    _label_rows(axes, comparison, rows, score)
    add_hover_points(
        axes,
        np.clip(means, *axes.get_xlim()),
        range(len(rows)),
        [_hover_text(comparison, method.title(point.size), point, score) for method, point in rows],
        size=14,
    )
    unit = f" ({shown_as.difference_unit})" if shown_as.difference_unit else ""
    axes.set_xlabel(
        f"{shown_as.title} − average of {comparison.ensemble.size} plain networks{unit}"
    )
    for text, side in (("← better  ", "right"), ("  worse →", "left")):
        axes.text(
            0,
            1.01,
            text,
            ha=side,
            va="bottom",
            fontsize=9.5,
            transform=axes.get_xaxis_transform(),
        )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    add_grid(axes)
    axes.grid(visible=False, axis="y")
    return figure


def _limit(axes: Axes, lows: np.ndarray, means: np.ndarray, highs: np.ndarray) -> None:
    """Shows all networks; an interval that would squeeze the others is cut off."""
    reach = 2.3 * max(float(np.abs(means).max()), 1e-12)
    left, right = max(min(lows.min(), 0.0), -reach), min(max(highs.max(), 0.0), reach)
    pad = 0.06 * (right - left)
    axes.set_xlim(left - pad, right + pad)


def _point_beyond(axes: Axes, means: np.ndarray, colors: Sequence[str]) -> None:
    """Points to a simple model that is far worse than all networks, and writes its difference."""
    for row in map(int, np.flatnonzero(means > axes.get_xlim()[1])):
        text = f"{significant(means[row])} →"
        axes.annotate(
            text,
            (0.98, row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=colors[row],
        )


def _label_rows(axes: Axes, comparison: Comparison, rows: list, score: str) -> None:
    """Writes the methods on the left and their verdicts on the right, outside the data."""
    axes.set_yticks(range(len(rows)), [literal(method.title(point.size)) for method, point in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row, (_, point) in enumerate(rows):
        label = axes.get_yticklabels()[row]
        if comparison.headline is not None and point is comparison.headline[1]:
            label.set_fontweight("bold")
        axes.annotate(
            point.against_ensemble[score].verdict,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            fontweight=label.get_fontweight(),
        )


def _hover_text(comparison: Comparison, title: str, point: Point, score: str) -> str:
    text = difference_text(score, point.minus_ensemble[score], unit=True)
    test = point.against_ensemble[score]
    decides = ends_text(score, test.difference)
    return (
        f"{title} minus {comparison.ensemble.size} plain: {text}; 90 % interval {decides}; "
        f"{test.verdict}"
    )


def example_differences(comparison: Comparison) -> Figure | None:
    """The sorted differences of the examples, and their running sum."""
    found = comparison.influence
    if not found:
        return None
    figure = new_figure(2.9 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), result in zip(grid, found, strict=True):
        method = comparison.method(result.method)
        against = comparison.method("plain").title(result.against)
        title = literal(f"{method.title(result.size)} minus {against}")
        left.set_title(title, loc="left", fontsize=10)
        _draw_sorted(left, result, style_of(result.method)[0])
        _draw_sum(right, result, style_of(result.method)[0])
    for axes in grid[-1]:
        axes.set_xlabel("share of the examples, sorted (%)")
    return figure


def _draw_sorted(axes: Axes, result: Influence, color: str) -> None:
    scale = SCORES[result.score].scale
    values = np.array(result.differences) * scale
    share = np.linspace(0, 100, len(values))
    axes.fill_between(share, 0, values, color=color, lw=0, alpha=0.4)
    axes.plot(share, values, color=color, lw=1.2)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_ylabel(_label(result, "loss difference"))
    add_grid(axes)


def _draw_sum(axes: Axes, result: Influence, color: str) -> None:
    scale = SCORES[result.score].scale
    sums = np.array(result.cumulative) * scale
    share = np.linspace(0, 100, len(sums))
    axes.plot(share, sums, color=color, lw=1.6)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.plot([100], [sums[-1]], color=color, marker="o", ms=6, clip_on=False)
    places = np.linspace(0, len(sums) - 1, 21).round().astype(int)
    texts = [
        f"the first {share[place]:.0f} %: {signed_text(result.score, sums[place] / scale)}"
        for place in places
    ]
    add_hover_points(axes, share[places], sums[places], texts)
    axes.set_ylabel(_label(result, "running sum / n"))
    add_grid(axes)


def _label(result: Influence, what: str) -> str:
    shown_as = SCORES[result.score]
    unit = f" ({shown_as.difference_unit})" if shown_as.difference_unit else ""
    return f"{what}{unit}"
