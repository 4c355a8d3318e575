"""The figure of the cross-validation that chose the epochs."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from jdrop.study.analyses import TuningCurve
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
from jdrop.study.report.numbers import share_text, significant
from jdrop.study.results import Comparison

LARGEST_CIRCLE = 600
"""Area of the circle of a candidate that every resample chooses, in square points."""


def tuning(comparison: Comparison) -> Figure | None:
    """The left-out loss of each method by its epochs; a marker shows the chosen epochs.

    The area of a circle is the share of resamples that choose these epochs.
    Lines are dashed for the largest average of a method.
    """
    curves = [curve for curve in comparison.tuning if _is_drawn(comparison, curve)]
    if not curves:
        return None
    figure = new_figure(4.6)
    axes = figure.subplots()
    ends = []
    for curve in curves:
        color, marker = style_of(curve.method)
        method = comparison.method(curve.method)
        line = "-" if curve.size == method.table[0] else "--"
        title = method.title(curve.size)
        axes.plot(curve.epochs, curve.losses, color=color, ls=line, lw=1.6)
        assert curve.chosen is not None
        loss = curve.losses[curve.epochs.index(curve.chosen)]
        axes.plot([curve.chosen], [loss], color=color, marker=marker, ms=8)
        texts = [
            f"{title}, {epochs} epochs: {significant(loss)}"
            for epochs, loss in zip(curve.epochs, curve.losses, strict=True)
        ]
        if curve.choice_shares is not None:
            areas = [LARGEST_CIRCLE * share for share in curve.choice_shares]
            axes.scatter(curve.epochs, curve.losses, areas, color=color, alpha=0.3, lw=0)
            texts = [
                f"{text}, chosen by {share_text(share)} of resamples"
                for text, share in zip(texts, curve.choice_shares, strict=True)
            ]
        add_hover_points(axes, curve.epochs, curve.losses, texts)
        ends.append((curve.losses[-1], literal(title), color))
    # The first epochs may lie far above: they would flatten the rest.
    lowest = min(min(curve.losses) for curve in curves)
    highest = max(max(curve.losses[-1], 1.3 * min(curve.losses)) for curve in curves)
    axes.set_ylim(lowest / 1.05, highest * 1.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
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


def _is_drawn(comparison: Comparison, curve: TuningCurve) -> bool:
    """Whether a curve is of the chosen decay, and of a method's smallest or largest size."""
    table = comparison.method(curve.method).table
    return curve.chosen is not None and curve.size in (table[0], table[-1])
