"""Figures of training: overfitting and learning curves."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    draw_band,
    label_log_ticks,
    legend_above,
    new_figure,
    style_of,
)
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES


def overfitting(comparison: Comparison) -> Figure | None:
    """Training and test scores by the count of training examples, with and without dropout."""
    results = sorted(comparison.overfitting, key=lambda result: result.train_size)
    sizes = sorted({result.train_size for result in results})
    if len(sizes) < 2:
        return None
    scores = [score for score in ("nll", "error", "mse") if score in results[0].test][:2]
    figure = new_figure(3.8)
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for networks in ("plain", "dropout"):
            by_size = [result for result in results if result.networks == networks]
            tests = [result.test[score] for result in by_size]
            trains = [result.train[score] for result in by_size]
            draw_band(axes, sizes, tests, score, networks, ls="-", label=f"{networks}, test")
            draw_band(axes, sizes, trains, score, networks, ls="--", label=f"{networks}, training")
        axes.set_xscale("log")
        axes.set_xticks(sizes)
        label_log_ticks(axes)
        axes.set_xlabel("training examples")
        axes.set_ylabel(axis_label(score))
        add_grid(axes)
    legend_above(figure, figure.axes[0])
    return figure


def learning_curves(comparison: Comparison) -> Figure | None:
    """Scores on training and test examples by epoch."""
    curves = comparison.learning_curves
    if not curves:
        return None
    scores = list(next(iter(curves.values())).test)
    figure = new_figure(3.8)
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        scale = SCORES[score].scale
        for networks, curve in curves.items():
            color, _ = style_of(networks)
            for split, values, line in (("test", curve.test, "-"), ("training", curve.train, "--")):
                shown = np.array(values[score]) * scale
                label = f"{networks}, {split}"
                axes.plot(curve.epochs, shown, color=color, ls=line, label=label)
        # The first epochs lie far above: they would flatten the end of the curves.
        late = [np.array(c.test[score])[len(c.epochs) // 4 :].max() for c in curves.values()]
        axes.set_ylim(0, 1.6 * max(*late, 1e-9) * scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(axis_label(score))
        add_grid(axes)
    legend_above(figure, figure.axes[0])
    return figure
