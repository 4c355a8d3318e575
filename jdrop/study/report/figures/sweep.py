"""The figure of a sweep."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from jdrop.statistics import EnsembleEquivalent
from jdrop.study.analyses import Cell
from jdrop.study.report.figures.style import (
    GREY,
    add_grid,
    axis_label,
    draw_error_bars,
    legend_above,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.results import Comparison


def sweep(comparison: Comparison) -> Figure | None:
    """The worth of one dropout network by the swept settings, in the main score."""
    cells = comparison.sweep
    if not cells:
        return None
    score = comparison.curve_scores[0]
    if len(cells[0].at) == 1:
        return _one_setting(cells, score)
    return _several_settings(cells, score)


def _one_setting(cells: list[Cell], score: str) -> Figure:
    """The worth, and the scores behind it, against the values of the setting."""
    (name,) = cells[0].at
    figure = new_figure(4)
    worth_axes, score_axes = figure.subplots(1, 2)
    values = [cell.at[name] for cell in cells]
    ensemble_label = f"average of {cells[0].worth[score].largest} plain"
    for networks, method, line, label in (
        ("plain", "plain", "-", "one plain"),
        ("ensemble", "plain", "--", ensemble_label),
        ("dropout", "dropout", "-", "one dropout"),
    ):
        intervals = [cell.scores[networks][score] for cell in cells]
        draw_error_bars(score_axes, values, intervals, score, method, ls=line, label=label)
    for value, cell in zip(values, cells, strict=True):
        _draw_worth(worth_axes, value, cell.worth[score])
    largest = cells[0].worth[score].largest
    worth_axes.set_yscale("log")
    worth_axes.set_ylim(0.9, 1.4 * largest)
    worth_axes.set_yticks([tick for tick in (1, 2, 3, 5, 10, 20, 50, 100) if tick <= largest])
    worth_axes.set_ylabel("worth in plain networks")
    score_axes.set_ylabel(f"test {axis_label(score)}")
    legend_above(figure, score_axes)
    for axes in (worth_axes, score_axes):
        axes.set_xlabel(_words(name))
        add_grid(axes)
    worth_axes.yaxis.set_major_formatter(ScalarFormatter())
    worth_axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _draw_worth(axes: Axes, x: int | float, worth: EnsembleEquivalent) -> None:
    beyond = worth.largest * 1.2
    low, value, high = (min(end, beyond) for end in (worth.low, worth.value, worth.high))
    color, marker = style_of("dropout")
    if worth.is_resolved:
        axes.plot([x] * 2, [low, high], color=color, lw=2)
        axes.plot([x], [value], color=color, marker=marker, ms=7)
    else:
        axes.plot([x] * 2, [low, high], color=color, lw=1, ls=":")
    if worth.high == math.inf:
        axes.plot([x], [beyond], color=color, marker="^", ms=5)
    add_hover_points(axes, [x], [value], [f"{x:g}: {worth}"], size=12)
    axes.axhline(worth.largest, color=GREY, lw=0.8, ls=":")


def _several_settings(cells: list[Cell], score: str) -> Figure:
    """A grid of worths over the first two settings, for each combination of the others."""
    row_name, column_name, *panel_names = cells[0].at
    row_values = sorted({cell.at[row_name] for cell in cells})
    column_values = sorted({cell.at[column_name] for cell in cells})
    panels = sorted({tuple(cell.at[name] for name in panel_names) for cell in cells})
    num_rows = -(-len(panels) // 2)
    figure = new_figure(0.9 + 3 * num_rows)
    grid = figure.subplots(num_rows, min(2, len(panels)), squeeze=False)
    largest = cells[0].worth[score].largest
    for axes, panel in zip(grid.flat, panels, strict=False):
        log_worth = np.full((len(row_values), len(column_values)), np.nan)
        for cell in cells:
            if tuple(cell.at[name] for name in panel_names) != panel:
                continue
            row = row_values.index(cell.at[row_name])
            column = column_values.index(cell.at[column_name])
            worth = cell.worth[score]
            log_worth[row, column] = math.log(min(worth.value, largest * 1.3))
            text = str(worth).replace(" [", "\n[")
            axes.text(column, row, text, ha="center", va="center", size=9)
        axes.imshow(log_worth, cmap="YlGnBu", vmin=0, vmax=1.8 * math.log(largest), aspect="auto")
        axes.set_yticks(range(len(row_values)), [f"{value:g}" for value in row_values])
        axes.set_xticks(range(len(column_values)), [f"{value:g}" for value in column_values])
        axes.set_ylabel(_words(row_name))
        axes.set_xlabel(_words(column_name))
        settings = zip(panel_names, panel, strict=True)
        title = ", ".join(f"{_words(name)} {value:g}" for name, value in settings)
        axes.set_title(title, loc="left", fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return figure


def _words(setting: str) -> str:
    return setting.replace("_", " ")
