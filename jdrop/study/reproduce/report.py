"""The report of a reproduction: the answer, the table, the figure, and the files of a folder."""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.report.figures.style import GREY, add_grid, new_figure
from jdrop.study.report.figures.svg import add_hover_points, inline_svg
from jdrop.study.report.numbers import MINUS
from jdrop.study.report.page import fill
from jdrop.study.reproduce import CURVES
from jdrop.study.reproduce.protocol import (
    Cell,
    Measure,
    Protocol,
    Published,
    Statement,
    paper_interval,
)
from jdrop.study.reproduce.runner import Reproduction

COLOR = "#0072B2"
"""Of our numbers."""


def answer(reproduction: Reproduction) -> list[str]:
    """Sentences: how many numbers agree, and what a shorter run means."""
    protocol = reproduction.protocol
    sentences = []
    by_rule = "agree by the rule below the table"
    all_have_spreads = all(
        published.spread is not None
        for published in protocol.published.values()
        if isinstance(published, Published)
    )
    kinds = {
        "means": f"agree within one {protocol.spread}" if all_have_spreads else by_rule,
        "paired differences": by_rule,
        "statements": by_rule,
    }
    for kind, verb in kinds.items():
        by_measure: dict[str, list[bool]] = {}
        for cell in reproduction.cells:
            measure = protocol.measures[cell.measure]
            if cell.agrees is not None and _kind(cell, measure) == kind:
                by_measure.setdefault(measure.title, []).append(cell.agrees)
        judged = [agrees for column in by_measure.values() for agrees in column]
        if judged:
            counts = ", ".join(
                f"{title} {sum(agree)} of {len(agree)}" for title, agree in by_measure.items()
            )
            share = f"{sum(judged)} of {len(judged)}"
            sentences.append(f"{share} comparisons with published {kind} {verb}: {counts}.")
    return sentences + notes(reproduction)


def _kind(cell: Cell, measure: Measure) -> str:
    """What the paper has of a cell, in the words of `answer`."""
    if isinstance(cell.paper, Statement):
        return "statements"
    return "paired differences" if measure.is_difference else "means"


def notes(reproduction: Reproduction) -> list[str]:
    """Sentences that say how the run differs from the protocol."""
    config, replicate = reproduction.run_config, reproduction.protocol.replicate
    sentences = []
    describe_fraction = reproduction.protocol.describe_fraction
    if config["fraction"] < 1 and describe_fraction is not None:
        sentences.append(describe_fraction(config["fraction"]))
    elif config["fraction"] < 1:
        parts: dict[str, list[str]] = {}
        for part, result in reproduction.results.items():
            parts.setdefault(f"{result.epochs} of {result.paper_epochs}", []).append(part)
        epochs = "; ".join(f"{count} ({', '.join(names)})" for count, names in parts.items())
        sentences.append(f"The networks trained for a part of the paper's epochs: {epochs}.")
    missing = [part for part in reproduction.protocol.parts if part not in reproduction.results]
    if missing:
        sentences.append(f"Not complete yet: {', '.join(missing)}.")
    if config["splits"] is not None:
        sentences.append(
            f"Our means are over at most {config['splits']} {replicate}s of each part; the paper's "
            "may be over more."
        )
    return sentences


def rule(protocol: Protocol) -> str:
    """How the program decides what agrees."""
    return (
        f"Agrees: our mean, rounded to the paper's decimals, lies within one {protocol.spread} of "
        "the paper's mean; without a published one, our 95 % interval holds a number that rounds "
        "to the paper's mean. A paired difference with a published interval that excludes 0 agrees "
        "if ours lies on the same side of 0; any other agrees if both intervals overlap. A "
        "statement in words agrees if our interval lies on that side of 0, or holds 0 where no "
        "clear difference is stated. A statement such as “no gain” agrees in either case. "
        f"Behind ± stands the {protocol.spread} in the paper's column, and half the 95 % interval "
        f"over {protocol.replicate}s in ours. Intervals: whether both 95 % intervals overlap. "
        "Minutes: of the whole part, with all its measures."
    )


HEADER = ("", "measure", "paper", "ours", "agrees", "intervals", "minutes")


def rows(reproduction: Reproduction) -> list[list[str]]:
    """The rows of the table, a row for each cell; see `HEADER`."""
    table, last = [], None
    for cell in reproduction.cells:
        measure = reproduction.protocol.measures[cell.measure]
        is_first = cell.row != last
        last = cell.row
        table.append(
            [
                cell.row if is_first else "",
                measure.title,
                paper_text(cell),
                our_text(cell),
                {None: "", True: "yes", False: "no"}[cell.agrees],
                {None: "", True: "overlap", False: "apart"}[cell.overlaps],
                f"{cell.minutes:.1f}" if is_first else "",
            ]
        )
    return table


def paper_text(cell: Cell) -> str:
    """The published number and its spread, or the statement; empty where the paper has none."""
    if cell.paper is None:
        return ""
    if isinstance(cell.paper, Statement):
        return cell.paper.text
    text = cell.paper.text.replace("-", MINUS)
    return text if cell.paper.spread is None else f"{text}±{cell.paper.spread}"


def our_text(cell: Cell) -> str:
    """Our mean and half its interval, with the paper's decimals and two digits of the half-width.

    How many networks a method is worth stands with the ends of its interval.

    Example:
        >>> from jdrop.statistics import Interval
        >>> ours = Interval(1.1, 1.0754, 1.1246, 20)
        >>> our_text(Cell("Yacht", "rmse", None, ours, None, None, minutes=1.0))
        '1.100±0.025'
    """
    if isinstance(cell.ours, EnsembleEquivalent):
        return str(cell.ours)
    mean, low, high = cell.ours.mean, cell.ours.low, cell.ours.high
    decimals = cell.paper.decimals if isinstance(cell.paper, Published) else 0
    if low is None or high is None or not math.isfinite(high - low):
        return f"{mean:.{max(decimals, 3)}f}".replace("-", MINUS)
    half_width = (high - low) / 2
    if half_width > 0:
        decimals = max(decimals, 1 - math.floor(math.log10(half_width)))
    return f"{mean:.{decimals}f}±{half_width:.{decimals}f}".replace("-", MINUS)


def terminal(reproduction: Reproduction) -> Table:
    """The table for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEADER:
        is_text = name in ("", "measure", "agrees", "intervals")
        title = {"minutes": "min"}.get(name, name)
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for row in rows(reproduction):
        table.add_row(*(Text(cell) for cell in row))
    return table


def draw(reproduction: Reproduction) -> Figure | None:
    """Ours minus the paper's number, in the paper's spreads; a panel for each measure.

    The band is the paper's spread. Measures without published spreads are left out.
    """
    protocol = reproduction.protocol
    panels = {
        name: [cell for cell in reproduction.cells if cell.measure == name and _unit(cell)]
        for name in protocol.measures
    }
    panels = {name: shown for name, shown in panels.items() if shown}
    if not panels:
        return None
    heights = [len(shown) for shown in panels.values()]
    figure = new_figure(0.9 * len(panels) + 0.28 * sum(heights))
    axes_of_panels = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, shown) in zip(axes_of_panels, panels.items(), strict=True):
        _draw_panel(axes, protocol.measures[name].title, shown)
    axes_of_panels[-1].set_xlabel(
        f"ours minus the paper's, in the paper's {protocol.spread}s; line: our 95 % interval"
    )
    return figure


def _draw_panel(axes: Any, title: str, shown: Sequence[Cell]) -> None:
    add_grid(axes)
    axes.set_title(title, loc="left", fontsize=10)
    axes.axvspan(-1, 1, color=GREY, alpha=0.2, lw=0)
    axes.axvline(0, color=GREY, lw=1)
    for height, cell in enumerate(shown):
        assert isinstance(cell.paper, Published)
        assert isinstance(cell.ours, Interval)
        unit = _unit(cell)
        mean = (cell.ours.mean - cell.paper.value) / unit
        if cell.ours.low is not None and cell.ours.high is not None:
            ends = [(end - cell.paper.value) / unit for end in (cell.ours.low, cell.ours.high)]
            axes.plot(ends, [height, height], color=COLOR, lw=1.5)
        axes.plot([mean], [height], "o", color=COLOR, ms=5)
        text = f"{cell.row}: paper {paper_text(cell)}, ours {our_text(cell)}"
        add_hover_points(axes, [mean], [height], [text])
    axes.set_yticks(range(len(shown)), [cell.row for cell in shown], fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.6)


def _unit(cell: Cell) -> float:
    """The paper's spread, or half a unit of its last digit where it is printed as 0."""
    if not isinstance(cell.paper, Published) or cell.paper.spread is None:
        return 0.0
    return float(cell.paper.spread) or 0.5 * 10.0**-cell.paper.decimals


def draw_curves(reproduction: Reproduction) -> dict[str, tuple[Figure, str]]:
    """By name of the file, a figure of the protocol's curves and its caption; see `CURVES`."""
    module = CURVES.get(reproduction.protocol.name)
    if module is None:
        return {}
    figures: dict[str, tuple[Figure, str]] = importlib.import_module(module).draw(
        reproduction.results
    )
    return figures


def to_json(reproduction: Reproduction, command: str) -> str:
    """Everything as JSON; infinite numbers are the string "Infinity", and NaN is "NaN"."""
    protocol = reproduction.protocol
    values = {
        "protocol": protocol.name,
        "title": protocol.title,
        "paper": protocol.paper,
        "url": protocol.url,
        "spread": protocol.spread,
        "replicate": protocol.replicate,
        "rule": rule(protocol),
        "answer": answer(reproduction),
        "command": command,
        "run": reproduction.run_config,
        "versions": reproduction.versions,
        "cells": [
            {**dataclasses.asdict(cell), "paper_interval": _paper_ends(protocol, cell)}
            for cell in reproduction.cells
        ],
        "table": {"header": HEADER, "rows": rows(reproduction)},
        "parts": {name: dataclasses.asdict(part) for name, part in reproduction.results.items()},
    }
    adapter = pydantic.TypeAdapter(dict[str, Any], config={"ser_json_inf_nan": "strings"})
    return adapter.dump_json(values, indent=1).decode() + "\n"


def _paper_ends(protocol: Protocol, cell: Cell) -> list[float | None] | None:
    if not isinstance(cell.paper, Published):
        return None
    interval = paper_interval(cell.paper, protocol.spread)
    return [interval.low, interval.high]


def write(reproduction: Reproduction, command: str, folder: Path) -> None:
    """Writes `results.json`, the figures, `report.md` and `report.html` into a folder.

    The figures are `agreement.png` and those of `CURVES`.

    Args:
        reproduction: the results.
        command: what the user typed.
        folder: files of the same names are replaced.

    Raises:
        OSError: a file cannot be written.
    """
    write_text(folder / "results.json", to_json(reproduction, command))
    figure = draw(reproduction)
    svg = None if figure is None else _save(figure, "agreement", folder)
    curves = [
        {"name": name, "caption": caption, "svg": _save(curve_figure, name, folder)}
        for name, (curve_figure, caption) in draw_curves(reproduction).items()
    ]
    values = {
        "protocol": reproduction.protocol,
        "answer": answer(reproduction),
        "header": HEADER,
        "rows": rows(reproduction),
        "rule": rule(reproduction.protocol),
        "svg": svg,
        "curves": curves,
        "command": command,
        "run_config": {
            name: value
            for name, value in reproduction.run_config.items()
            if name not in ("data", "program")
        },
        "versions": reproduction.versions,
    }
    for name in ("report.md", "report.html"):
        write_text(folder / name, fill("jdrop.study.reproduce", f"{name}.jinja", **values))


def _save(figure: Figure, name: str, folder: Path) -> str:
    """Writes a figure as PNG, and returns it as SVG for the page."""
    with replacing(folder / f"{name}.png") as partial:
        figure.savefig(partial, dpi=160, format="png")
    return inline_svg(figure, name)
