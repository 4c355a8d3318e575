"""Figures of the worth in plain networks."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jdrop.statistics import EnsembleEquivalent
from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    draw_band,
    label_log_ticks,
    literal,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES

GIVEN_LINES = ("-", ":", "-.", "--")
"""Given methods have the same color, so their lines tell them apart."""

SIZE_TICKS = (1, 2, 3, 5, 10, 20, 50, 100)
"""Labels of a logarithmic axis of ensemble sizes."""

WIDE_SIZE_TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
"""Its labels beyond 100, where there is less room for each."""


def score_against_size(comparison: Comparison) -> Figure | None:
    """The worth of a method: where the curve of plain ensembles meets the method's score."""
    plain = comparison.method("plain")
    main = ("dropout", "monte-carlo")
    # A run has many controls, which the other figures show. Given methods are all of interest.
    methods = [
        method
        for method in comparison.methods
        if method.name in main or (not comparison.has_costs and method.name != "plain")
    ]
    given = [method.name for method in methods if method.name not in main]
    scores = comparison.curve_scores
    num_rows = -(-len(scores) // 2)
    figure = new_figure(3.7 * num_rows)
    grid = figure.subplots(num_rows, 2, squeeze=False)
    sizes = [point.size for point in plain.points]
    for axes, score in zip(grid.flat, scores, strict=False):
        intervals = [point.over_seeds[score] for point in plain.points]
        label = "average of plain networks"
        draw_band(axes, sizes, intervals, score, "plain", label=label)
        for method in methods:
            point = method.points[-1] if method.unit == "masks" else method.points[0]
            color, marker = style_of(method.name)
            mean = point.over_seeds[score].mean * SCORES[score].scale
            line = "--" if method.unit == "masks" else "-"
            if method.name in given:
                line = GIVEN_LINES[given.index(method.name) % len(GIVEN_LINES)]
            worth = point.worth[score]
            label = literal(f"{method.title(point.size)}: {worth}")
            axes.axhline(mean, color=color, ls=line, lw=1.5, label=label)
            ends = [min(end, sizes[-1] + 0.4) for end in (worth.low, worth.high)]
            if worth.is_resolved:
                axes.plot(ends, [mean] * 2, color=color, lw=6, alpha=0.35, solid_capstyle="butt")
            if worth.is_resolved and math.isfinite(worth.value):
                axes.plot([worth.value], [mean], color=color, marker=marker, ms=8)
        if len(sizes) < sizes[-1]:  # The larger sizes are on a grid.
            _set_log_sizes(axes, sizes[-1], end=sizes[-1] * 1.05)
        else:
            axes.set_xlim(0.6, sizes[-1] + 0.4)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("networks averaged")
        axes.set_ylabel(f"test {axis_label(score)}")
        # Above the panel, where no line can cross it.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.25, 1),
            frameon=False,
            fontsize=9,
            handlelength=1.2,
        )
        add_grid(axes)
    for axes in grid.flat[len(scores) :]:
        axes.set_visible(False)
    return figure


def worth_chart(comparison: Comparison) -> Figure | None:
    """The worth of each method in each score, with intervals."""
    rows = [(method, point) for method, point in comparison.table if method.name != "plain"]
    if not rows:
        return None
    scores = comparison.curve_scores
    num_rows = -(-len(scores) // 2)
    figure = new_figure(num_rows * (0.9 + 0.26 * len(rows)))
    largest = comparison.ensemble.size
    grid = figure.subplots(num_rows, 2, sharey=True, squeeze=False)
    for axes, score in zip(grid.flat, scores, strict=False):
        for row, (method, point) in enumerate(rows):
            if score in point.unreliable:
                continue
            _draw_worth(axes, row, point.worth[score], style_of(method.name))
            x = min(point.worth[score].value, largest * 1.3)
            text = f"{method.title(point.size)}: {point.worth[score]}"
            add_hover_points(axes, [x], [row], [text], size=12)
        _set_log_sizes(axes, largest, end=largest * 1.6)
        axes.axvspan(largest, largest * 1.6, color="#888888", alpha=0.12, lw=0)
        axes.set_title(SCORES[score].title, loc="left", fontsize=10)
        axes.set_xlabel("plain networks")
        add_grid(axes)
    titles = [literal(method.title(point.size)) for method, point in rows]
    grid[0, 0].set_yticks(range(len(rows)), titles)
    grid[0, 0].invert_yaxis()
    for axes in grid.flat[len(scores) :]:
        axes.set_visible(False)
    return figure


def _set_log_sizes(axes: Axes, largest: int, end: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.85, end)
    ticks = SIZE_TICKS if largest <= SIZE_TICKS[-1] else WIDE_SIZE_TICKS
    axes.set_xticks([tick for tick in ticks if tick <= largest])
    label_log_ticks(axes)


def _draw_worth(axes: Axes, row: int, worth: EnsembleEquivalent, style: tuple[str, str]) -> None:
    color, marker = style
    beyond = worth.largest * 1.3
    low, value, high = (min(end, beyond) for end in (worth.low, worth.value, worth.high))
    if not worth.is_resolved:
        axes.plot([low, high], [row, row], color=color, lw=1, ls=":")
        return
    axes.plot([low, high], [row, row], color=color, lw=2, solid_capstyle="butt")
    axes.plot([value], [row], color=color, marker=marker, ms=7)
    if worth.high == math.inf:
        axes.plot([beyond], [row], color=color, marker=">", ms=5)
