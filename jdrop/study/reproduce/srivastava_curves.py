"""The curves of `srivastava_figures`: figures 9, 10 and 11 of the paper from our numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jdrop.statistics import Interval, mean_interval
from jdrop.study.report.figures.style import (
    MAX_HOVER_POINTS,
    add_grid,
    interval_arrays,
    legend_above,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import significant
from jdrop.study.reproduce.protocol import PartResult
from jdrop.study.reproduce.srivastava_figures import (
    ENSEMBLE_SIZE,
    KEEP_PROBS,
    LARGEST_ENSEMBLE,
    NUM_MASKS,
    UPDATE_SHARES,
    Values,
    row_9,
    row_10,
    row_11,
)

BANDS = "Bands and bars: 95 % intervals over seeds."
SCORES = {"": "test error (%)", "-nll": "test NLL (nats)"}
"""By the ending of a measure's name, the title of the axis."""
WEIGHT_SCALING = "dropout, weight scaling"
ONE_PLAIN = "one plain network"

Curve = dict[float, Interval]
"""By x, a mean over seeds and its interval."""


def draw(results: Mapping[str, PartResult]) -> dict[str, tuple[Figure, str]]:
    """By name of the file, each figure that has points, and its caption.

    Args:
        results: by name of the part; of the parts that are complete.
    """
    rows: Values = {}
    for result in results.values():
        rows |= result.values
    figures = {
        "figure-9": (
            _by_keep_prob(rows),
            "Figure 9: the error against the probability to keep a hidden unit. In a, all networks "
            "have the same units; in b, they keep equally many units on average. At 1 there is no "
            f"dropout. The average of {ENSEMBLE_SIZE} plain networks has the units of the networks "
            f"at 1. {BANDS}",
        ),
        "figure-10": (
            _by_train_size(rows),
            f"Figure 10: error and NLL against the number of training examples. {BANDS}",
        ),
        "figure-11": (
            _by_count(rows),
            f"Figure 11: error and NLL of averages of 1 to {NUM_MASKS} masks of one dropout "
            f"network, and of 1 to {LARGEST_ENSEMBLE} plain networks. {BANDS}",
        ),
    }
    return {name: (figure, text) for name, (figure, text) in figures.items() if figure is not None}


def _curve(rows: Values, row_names: Mapping[float, str], *measures: str) -> Curve:
    """The points of the rows that exist, each with the first measure that its row has."""
    return {
        x: mean_interval(rows[name][measure])
        for x, name in row_names.items()
        if name in rows
        for measure in [next((one for one in measures if one in rows[name]), None)]
        if measure is not None
    }


def _by_keep_prob(rows: Values) -> Figure | None:
    names = {panel: {keep: row_9(panel, keep) for keep in KEEP_PROBS} for panel in "ab"}
    if not any(name in rows for of_panel in names.values() for name in of_panel.values()):
        return None
    figure = new_figure(5.6)
    titles = {"a": "a: units are fixed", "b": "b: kept units are fixed"}
    test_axes, training_axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for panel, of_test, of_training in zip("ab", test_axes, training_axes, strict=True):
        curve = _curve(rows, names[panel], "dropout", "plain")
        _draw_points(of_test, curve, "dropout", WEIGHT_SCALING)
        average = _curve(rows, names[panel], "ensemble").get(1.0)
        if average is not None:
            _draw_level(of_test, average, "plain", f"average of {ENSEMBLE_SIZE} plain", ls="--")
        curve = _curve(rows, names[panel], "training-error")
        _draw_points(of_training, curve, "dropout", WEIGHT_SCALING)
        of_test.set_title(titles[panel], loc="left", fontsize=10)
        of_training.set_xlabel("probability to keep a hidden unit")
        of_training.set_xlim(0.05, 1.05)
        of_training.set_xticks([0.2, 0.4, 0.6, 0.8, 1])
        _log_errors(of_test)
        # Networks that fit all training examples have the error 0, which has no logarithm.
        of_training.set_yscale("symlog", linthresh=0.1)
        of_training.set_ylim(bottom=0)
        of_training.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axes in (of_test, of_training):
            add_grid(axes)
    test_axes[0].set_ylabel("test error (%)")
    training_axes[0].set_ylabel("training error (%)")
    legend_above(figure, test_axes[0])
    return figure


def _by_train_size(rows: Values) -> Figure | None:
    names = {float(size): row_10(size) for size in UPDATE_SHARES}
    if not any(name in rows for name in names.values()):
        return None
    figure = new_figure(3.9)
    for axes, (ending, title) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for measure, method, label, line in (
            ("plain", "plain", ONE_PLAIN, "-"),
            ("ensemble", "plain", f"average of {ENSEMBLE_SIZE} plain", "--"),
            ("dropout", "dropout", WEIGHT_SCALING, "-"),
        ):
            curve = _curve(rows, names, measure + ending)
            _draw_points(axes, curve, method, label, ls=line)
        axes.set_xscale("log")
        axes.set_xticks([100, 1000, 10_000])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("training examples")
        axes.set_ylabel(title)
        _log_errors(axes)
        add_grid(axes)
    legend_above(figure, figure.axes[0])
    return figure


def _by_count(rows: Values) -> Figure | None:
    masks = {float(count): row_11(count, "masks") for count in range(1, NUM_MASKS + 1)}
    networks = {float(count): row_11(count, "networks") for count in range(1, LARGEST_ENSEMBLE + 1)}
    if masks[1] not in rows:
        return None
    figure = new_figure(3.9)
    for axes, (ending, title) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        level = mean_interval(rows[row_10(max(UPDATE_SHARES))][f"dropout{ending}"])
        _draw_level(axes, level, "dropout", WEIGHT_SCALING)
        curve = _curve(rows, masks, f"masks-curve{ending}")
        _draw_band(axes, curve, "monte-carlo", "dropout, average of masks")
        curve = _curve(rows, networks, f"networks-curve{ending}")
        _draw_band(axes, curve, "plain", "average of plain networks", ls="--")
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 120])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("masks or networks averaged")
        axes.set_ylabel(title)
        add_grid(axes)
    legend_above(figure, figure.axes[0])
    return figure


def _draw_points(axes: Axes, curve: Curve, method: str, label: str, **line: Any) -> None:
    if not curve:
        return
    x, (mean, low, high) = list(curve), interval_arrays(list(curve.values()))
    color, marker = style_of(method)
    errors = np.stack([mean - low, high - mean])
    axes.errorbar(x, mean, errors, color=color, marker=marker, ms=4.5, label=label, **line)
    _add_values(axes, curve, mean, label)


def _draw_band(axes: Axes, curve: Curve, method: str, label: str, **line: Any) -> None:
    x, (mean, low, high) = list(curve), interval_arrays(list(curve.values()))
    color, _ = style_of(method)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(x, mean, color=color, label=label, **line)
    _add_values(axes, curve, mean, label)


def _draw_level(axes: Axes, level: Interval, method: str, label: str, **line: Any) -> None:
    color, _ = style_of(method)
    (mean,), (low,), (high,) = interval_arrays([level])
    axes.axhspan(low, high, color=color, alpha=0.12, lw=0)
    axes.axhline(mean, color=color, label=label, **line)


def _add_values(axes: Axes, curve: Curve, mean: np.ndarray, label: str) -> None:
    """Shows the values when the pointer is over them."""
    shown = np.unique(np.linspace(0, len(curve) - 1, MAX_HOVER_POINTS).round().astype(int))
    x = list(curve)
    texts = [f"{label}, {x[index]:g}: {significant(mean[index])}" for index in shown]
    add_hover_points(axes, [x[index] for index in shown], [mean[index] for index in shown], texts)


def _log_errors(axes: Axes) -> None:
    """A logarithmic y axis with plain numerals."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
