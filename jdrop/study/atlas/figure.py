"""The figure of the atlas: the worth of one dropout network in every cell, grouped by axis."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from jdrop.statistics import EnsembleEquivalent
from jdrop.study.atlas.rows import Row
from jdrop.study.report.figures.style import GREY, literal, new_figure
from jdrop.study.report.figures.svg import add_hover_points
from jdrop.study.report.numbers import difference_text

COLORS = {
    "better": "#009E73",
    "not worse": "#0072B2",
    "equivalent": "#0072B2",
    "undecided": GREY,
    "refused": GREY,
    "worse": "#D55E00",
}
"""By verdict; colors remain distinct for color-blind readers (Okabe and Ito)."""

BELOW, BEYOND, END = 0.86, 1.16, 1.35
"""Where "≤1" ends; where ">largest" is marked, and where it ends, as multiples of the largest."""

TICKS = (1, 2, 3, 5, 10, 20, 50, 100)

ROW_HEIGHT = 0.2
"""In inches."""

Rows = Sequence[tuple[str, Sequence[tuple[str, Row]]]]
"""By group its title, and for each of its rows a label and the row."""


def draw(groups: Rows) -> Figure | None:
    """A line for each study: its worth with the 95 % interval; None without studies."""
    groups = [(title, rows) for title, rows in groups if rows]
    if not groups:
        return None
    all_rows = [row for _, rows in groups for _, row in rows]
    largest = max(row.ensemble_size for row in all_rows)
    num_lines = len(all_rows) + len(groups)
    figure = new_figure(1.0 + ROW_HEIGHT * num_lines, width=7.5)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(0.8, END * largest * 1.02)
    axes.annotate(
        "enough?", (1.02, 0), xycoords=("axes fraction", "data"), va="center", fontweight="bold"
    )
    line = 0
    ticks, labels = [], []
    for title, rows in groups:
        axes.text(
            0,
            line,
            literal(title),
            transform=axes.get_yaxis_transform(),
            ha="left",
            va="center",
            fontweight="bold",
            fontsize=10,
        )
        line += 1
        for label, row in rows:
            _draw_worth(axes, line, row)
            ticks.append(line)
            labels.append(literal(label))
            line += 1
    axes.set_yticks(ticks, labels, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(num_lines - 0.4, -0.7)
    shown = [tick for tick in TICKS if tick <= largest]
    shown += [largest] if largest not in shown else []
    axes.xaxis.set_major_locator(FixedLocator([*shown, END * largest * 0.93]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["≤1", *(str(tick) for tick in shown[1:]), f">{largest}"], fontsize=10)
    axes.set_xlabel(
        "plain networks that must be averaged to score as well as one dropout network,\n"
        "with the 95 % interval; a hollow line is not resolved",
        fontsize=10,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6, axis="x")
    axes.set_axisbelow(True)
    return figure


def _draw_worth(axes: Axes, line: int, row: Row) -> None:
    """Draws the worth of a row, and writes its verdict on the right."""
    worth, color = row.worth, COLORS[row.verdict]
    low, high = _at(worth.low, worth, END), _at(worth.high, worth, END)
    if not worth.is_resolved:
        low, high = BELOW, END * worth.largest
        axes.plot([low, high], [line] * 2, color=color, lw=5, solid_capstyle="round")
        axes.plot([low, high], [line] * 2, color="white", lw=3, solid_capstyle="round")
    else:
        if worth.low == math.inf:
            low = BEYOND * worth.largest
        if worth.high == 1:
            low, high = BELOW, 1.0
        axes.plot([low, high], [line] * 2, color=color, lw=2.2, solid_capstyle="butt")
        if worth.low == 1:
            axes.plot([low], [line], marker="<", color=color, ms=6)
        if worth.high == math.inf:
            axes.plot([high], [line], marker=">", color=color, ms=6)
        axes.plot([_at(worth.value, worth, BEYOND)], [line], "o", color=color, ms=7)
    axes.annotate(
        row.verdict,
        (1.02, line),
        xycoords=("axes fraction", "data"),
        va="center",
        color=color,
        fontsize=10,
    )
    text = (
        f"{row.title}: worth {worth}; minus {row.ensemble_size} plain "
        f"{difference_text(row.score, row.minus_ensemble, unit=True)}; {row.verdict}"
    )
    add_hover_points(axes, [math.sqrt(low * high)], [line], [text], size=14)


def _at(size: float, worth: EnsembleEquivalent, beyond: float) -> float:
    """Where a size lies on the axis; one beyond the largest ensemble lies at a multiple of it."""
    if size == math.inf:
        return beyond * worth.largest
    return BELOW if size == 1 and beyond == END else size
