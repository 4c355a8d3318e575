"""Figures of averages over masks beside weight scaling."""

import numpy as np
from matplotlib.figure import Figure

from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    interval_arrays,
    label_log_ticks,
    legend_above,
    main_scores,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import significant
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES


def mask_curve(comparison: Comparison) -> Figure | None:
    """The score of a Monte-Carlo average by its count of masks."""
    curve = comparison.mask_curve
    if curve is None:
        return None
    figure = new_figure(3.6)
    scores = main_scores(comparison)
    for axes, score in zip(figure.subplots(1, 2), scores, strict=True):
        scale = SCORES[score].scale
        values = np.array(curve.scores[score]) * scale
        color, _ = style_of("monte-carlo")
        axes.plot(curve.num_masks, values, color=color, label="average of masks")
        texts = [
            f"{count} masks: {significant(value)}"
            for count, value in zip(curve.num_masks, values, strict=True)
        ]
        add_hover_points(axes, curve.num_masks, values, texts)
        axes.axhline(
            curve.weight_scaling[score] * scale,
            color=style_of("dropout")[0],
            label="weight scaling of the same networks",
        )
        axes.set_xscale("log")
        axes.set_xticks([t for t in (1, 2, 5, 10, 20, 50, 100, 1000) if t <= curve.num_masks[-1]])
        axes.set_title(f"masks needed: {curve.masks_needed[score]}", loc="left", fontsize=10)
        axes.set_xlabel("masks averaged")
        axes.set_ylabel(f"test {axis_label(score)}")
        label_log_ticks(axes)
        add_grid(axes)
    legend_above(figure, figure.axes[0])
    return figure


def exact(comparison: Comparison) -> Figure | None:
    """Weight scaling, and the two averages over all masks of a small network."""
    enumerated = comparison.exact
    if enumerated is None:
        return None
    figure = new_figure(2.2)
    averages = {
        "weight scaling": enumerated.weight_scaling,
        "geometric": enumerated.geometric,
        "arithmetic": enumerated.arithmetic,
    }
    for axes, score in zip(figure.subplots(1, 3), ("nll", "brier", "error"), strict=True):
        intervals = [average[score] for average in averages.values()]
        mean, low, high = interval_arrays(intervals, SCORES[score].scale)
        errors = np.stack([mean - low, high - mean])
        rows = range(len(averages))
        axes.errorbar(mean, rows, xerr=errors, color="#333333", marker="o", ls="")
        axes.set_yticks(rows, list(averages) if score == "nll" else [""] * len(averages))
        axes.set_ylim(len(averages) - 0.5, -0.5)
        axes.set_xlabel(f"test {axis_label(score)}")
        add_grid(axes)
    return figure
