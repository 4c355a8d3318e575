"""Figures of scores against costs."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jdrop.study.methods import METHODS
from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    draw_band,
    draw_error_bars,
    legend_above,
    literal,
    main_scores,
    new_figure,
)
from jdrop.study.results import Comparison, Point
from jdrop.study.scores import COSTS

MAIN_COSTS = ("train_flops", "predict_flops")


def score_against_cost(comparison: Comparison) -> Figure | None:
    """Scores against the FLOPs of training and of a prediction: ensembles as curves."""
    if not comparison.has_costs:
        return None
    scores = main_scores(comparison)
    figure = new_figure(7.2)
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, score in zip(grid, scores, strict=True):
        for axes, cost in zip(row, MAIN_COSTS, strict=True):
            _draw_panel(axes, comparison, score, cost)
        row[0].set_ylabel(f"test {axis_label(score)}")
    searched = any(point.cost.search_flops for _, point in comparison.table if point.cost)
    titles = [COSTS["train_flops"] + " with search" * searched, COSTS["predict_flops"]]
    for axes, title in zip(grid[-1], titles, strict=True):
        axes.set_xlabel(title)
    legend_above(figure, grid[0][0])
    return figure


def score_against_other_costs(comparison: Comparison) -> Figure | None:
    """The main score against seconds, parameters and bytes."""
    if not comparison.has_costs:
        return None
    costs = [cost for cost in COSTS if cost not in MAIN_COSTS]
    figure = new_figure(7.2)
    grid = figure.subplots(2, 2, sharey=True)
    score = comparison.curve_scores[0]
    for axes, cost in zip(grid.flat, costs, strict=True):
        _draw_panel(axes, comparison, score, cost)
        axes.set_xlabel(COSTS[cost])
    for axes in grid[:, 0]:
        axes.set_ylabel(f"test {axis_label(score)}")
    legend_above(figure, grid[0, 0])
    return figure


def _draw_panel(axes: Axes, comparison: Comparison, score: str, cost: str) -> None:
    for method in comparison.methods:
        is_curve = method.name in METHODS and METHODS[method.name].is_curve
        points = method.points if is_curve else method.points[-1:]
        if points[-1].cost is None:
            continue  # A simple model.
        x = [_value(point, cost) for point in points]
        intervals = [point.over_seeds[score] for point in points]
        largest = points[-1].size
        if len({*x}) > 1:
            label = literal(method.title(f"1 to {largest}"))
            draw_band(axes, x, intervals, score, method.name, lw=1.8, label=label)
            continue
        # More masks cost no more training: only the average of all masks is drawn.
        label = literal(method.title(largest))
        style = {"ms": 7, "lw": 1, "ls": ""}
        draw_error_bars(axes, x[-1:], intervals[-1:], score, method.name, **style, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    add_grid(axes)


def _value(point: Point, cost: str) -> int | float:
    """A cost of a point; its training includes the search for epochs and weight decay."""
    assert point.cost is not None
    value = getattr(point.cost, cost)
    return value + point.cost.search_flops if cost == "train_flops" else value
