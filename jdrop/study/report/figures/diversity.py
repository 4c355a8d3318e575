"""The figure of diversity."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jdrop.study.report.figures.style import add_grid, legend_above, literal, new_figure, style_of
from jdrop.study.results import Comparison


def diversity(comparison: Comparison) -> Figure | None:
    """The loss of members against the gain of averaging them, for masks and seeds on one scale."""
    results = comparison.diversity
    if not results:
        return None
    ambiguities = list(results[0].ambiguity)
    figure = new_figure(4)
    panels = figure.subplots(1, len(ambiguities), squeeze=False)[0]
    for axes, name in zip(panels, ambiguities, strict=True):
        for result in results:
            ambiguity = result.ambiguity[name]
            gain = ambiguity.diversity
            below = 0 if gain.low is None else max(gain.mean - gain.low, 0)
            above = 0 if gain.high is None else max(gain.high - gain.mean, 0)
            color, marker = style_of(result.method)
            axes.errorbar(
                [ambiguity.members.mean],
                [gain.mean],
                yerr=[[below], [above]],
                color=color,
                marker=marker,
                ms=8,
                ls="",
                label=literal(comparison.method(result.method).title(result.size)),
            )
        _draw_equal_loss_lines(axes)
        axes.set_title(name, loc="left", fontsize=10)
        add_grid(axes)
    panels[0].set_ylabel("gained by averaging")
    figure.supxlabel("mean loss of the members", fontsize=10)
    legend_above(figure, panels[0])
    return figure


def _draw_equal_loss_lines(axes: Axes) -> None:
    """Draws lines along which the average has the same loss."""
    axes.margins(0.15)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    bottom = min(bottom, 0)
    for loss in np.linspace(left - top, right - bottom, 9)[1:-1]:
        axes.plot([left, right], [left - loss, right - loss], color="#999999", lw=0.5, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
