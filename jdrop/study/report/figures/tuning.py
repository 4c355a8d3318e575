"""The figure of the cross-validation that chose the epochs."""

from matplotlib.figure import Figure

from jdrop.study.report.figures.style import (
    GREY,
    add_grid,
    label_ends,
    label_log_ticks,
    literal,
    new_figure,
    style_of,
)
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import significant
from jdrop.study.results import Comparison

LINES = ("-", "--", ":", "-.")
"""Line styles of the curves of one method."""


def tuning(comparison: Comparison) -> Figure | None:
    """The left-out loss of each method by its epochs; a marker shows the chosen epochs."""
    curves = comparison.tuning
    if not curves:
        return None
    figure = new_figure(4.2)
    axes = figure.subplots()
    ends = []
    drawn: dict[str, int] = {}
    for curve in curves:
        color, marker = style_of(curve.method)
        line = LINES[drawn.get(curve.method, 0) % len(LINES)]
        drawn[curve.method] = drawn.get(curve.method, 0) + 1
        title = comparison.method(curve.method).title(curve.size)
        if curve.weight_decay is not None:
            title += f", {curve.weight_decay:g}"
        axes.plot(curve.epochs, curve.losses, color=color, ls=line, lw=1.6)
        if curve.chosen is not None:
            loss = curve.losses[curve.epochs.index(curve.chosen)]
            axes.plot([curve.chosen], [loss], color=color, marker=marker, ms=9)
        texts = [
            f"{title}, {epochs} epochs: {significant(loss)}"
            for epochs, loss in zip(curve.epochs, curve.losses, strict=True)
        ]
        add_hover_points(axes, curve.epochs, curve.losses, texts)
        ends.append((curve.losses[-1], literal(title), color))
    # The first epochs may lie far above: they would flatten the rest.
    finite = [loss for curve in curves for loss in curve.losses]
    lowest = min(finite)
    highest = max(max(curve.losses[-1], 1.5 * min(curve.losses)) for curve in curves)
    pad = 0.08 * (highest - lowest)
    axes.set_ylim(lowest - pad, min(max(finite), highest) + pad)
    epochs = sorted({epochs for curve in curves for epochs in curve.epochs})
    axes.set_xscale("log")
    axes.set_xticks(epochs)
    label_log_ticks(axes)
    if "epochs" in comparison.settings:
        axes.axvline(comparison.settings["epochs"], color=GREY, lw=0.8, ls=":")
    axes.set_xlabel("epochs (dotted: those of the settings)")
    axes.set_ylabel("loss of left-out training examples")
    add_grid(axes)
    label_ends(figure, axes, ends)
    return figure
