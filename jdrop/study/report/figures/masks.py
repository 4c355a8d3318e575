"""Figures of averages over masks beside weight scaling."""

import numpy as np
from matplotlib.figure import Figure

from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    interval_arrays,
    label_log_ticks,
    main_scores,
    style_of,
)
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES


def mask_curve(comparison: Comparison) -> Figure | None:
    """The score of a Monte-Carlo average by its count of masks."""
    curve = comparison.mask_curve
    if curve is None:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    scores = main_scores(comparison)
    for axes, score in zip(figure.subplots(1, 2), scores, strict=True):
        scale = SCORES[score].scale
        values = np.array(curve.scores[score]) * scale
        color, marker = style_of("monte-carlo")
        axes.plot(curve.num_masks, values, color=color, marker=marker, label="average of masks")
        axes.axhline(
            curve.weight_scaling[score] * scale,
            color=style_of("dropout")[0],
            label=f"weight scaling; masks needed: {curve.masks_needed[score]}",
        )
        axes.set_xscale("log")
        axes.set_xticks([t for t in (1, 2, 5, 10, 20, 50, 100, 1000) if t <= curve.num_masks[-1]])
        axes.set_xlabel("masks averaged")
        axes.set_ylabel(f"test {axis_label(score)}")
        axes.legend(frameon=False, fontsize=9)
        label_log_ticks(axes)
        add_grid(axes)
    return figure


def exact(comparison: Comparison) -> Figure | None:
    """Weight scaling, and the two averages over all masks of a small network."""
    enumerated = comparison.exact
    if enumerated is None:
        return None
    figure = Figure(figsize=(10, 2.6), layout="constrained")
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
