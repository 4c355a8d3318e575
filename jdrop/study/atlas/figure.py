"""The figure of the atlas: the worth of one dropout network in every cell, grouped by axis."""

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE
from matplotlib.ticker import FixedLocator, NullLocator

from jdrop.study.atlas.rows import MOST_EPOCHS_NOTE, Row
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

BEYOND = 1.25
"""Where sizes beyond the largest average of all studies lie, as a multiple of it."""

TICKS = (1, 2, 3, 5, 10, 20, 50, 100)

ROW_HEIGHT, CAPTION_HEIGHT = 0.2, 0.17
"""Of a row, and of a line below the axis, in inches."""

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
    caption = _caption(all_rows)
    height = 0.65 + ROW_HEIGHT * num_lines + CAPTION_HEIGHT * len(caption)
    figure = new_figure(height, width=7.5)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(0.85, BEYOND * largest * 1.1)
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
            _draw_worth(axes, line, row, largest)
            ticks.append(line)
            labels.append(literal(label))
            line += 1
    axes.set_yticks(ticks, labels, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(num_lines - 0.4, -0.7)
    shown = [tick for tick in TICKS if tick <= largest]
    shown += [largest] if largest not in shown else []
    axes.xaxis.set_major_locator(FixedLocator([*shown, BEYOND * largest]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["≤1", *(str(tick) for tick in shown[1:]), f">{largest}"], fontsize=10)
    axes.set_xlabel("\n".join(literal(text) for text in caption), fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6, axis="x")
    axes.set_axisbelow(True)
    return figure


def _caption(rows: Sequence[Row]) -> list[str]:
    """The lines below the axis."""
    lines = [
        "plain networks that must be averaged to score as well as one dropout network,",
        "with the 95 % interval; a hollow line is not resolved",
    ]
    if any(row.mark for row in rows):
        lines.append(MOST_EPOCHS_NOTE)
    repeated = {title: n for title, n in Counter(row.title for row in rows).items() if n > 1}
    return lines + [
        f"the {count} rows of {title} are one study" for title, count in repeated.items()
    ]


def _draw_worth(axes: Axes, line: int, row: Row, largest: int) -> None:
    """Draws the worth of a row, and writes its verdict on the right.

    Args:
        axes: of the figure.
        line: where the row stands.
        row: of a study.
        largest: plain networks in the largest average of all studies.
    """
    worth, color = row.worth, COLORS[row.verdict]
    # A study of fewer networks ends at its own largest average, where a text says so.
    has_all = worth.largest == largest
    end = BEYOND * largest if has_all else worth.largest
    is_beyond = not worth.is_resolved or worth.high == math.inf
    if worth.is_resolved:
        low, high, value = (min(size, end) for size in (worth.low, worth.high, worth.value))
        axes.plot([low, high], [line] * 2, color=color, lw=2.2, solid_capstyle="butt")
        if worth.low == 1:
            axes.plot([low], [line], marker=CARETLEFTBASE, color=color, mew=0, ms=10)
        if is_beyond:
            axes.plot([high], [line], marker=CARETRIGHTBASE, color=color, mew=0, ms=10)
        axes.plot([value], [line], "o", color=color, ms=7)
    else:
        low, high = 1.0, end
        axes.plot([low, high], [line] * 2, color=color, lw=5, solid_capstyle="round")
        axes.plot([low, high], [line] * 2, color="white", lw=3, solid_capstyle="round")
    if is_beyond and not has_all:
        axes.annotate(
            f">{worth.largest}",
            (end, line),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
        )
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
