"""What the command `jdrop atlas` does: runs the cells, the cheapest first, and reports them."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

from jdrop.study.atlas import report
from jdrop.study.atlas.cells import Cell, Group, by_cost, command_line, make_groups
from jdrop.study.atlas.report import Atlas
from jdrop.study.atlas.rows import Row, row_of, rows_of_studies
from jdrop.study.atomic_writes import write_text
from jdrop.study.cli import compare_command
from jdrop.study.errors import UserError
from jdrop.study.locks import Locks
from jdrop.study.processes import Processes
from jdrop.study.results import Comparison
from jdrop.study.settings import Settings

FAILURES = (UserError, click.ClickException, OSError, jax.errors.JaxRuntimeError)
"""What ends one cell, and not the atlas: mistakes, files, and too little memory."""


Train = Callable[[dict[str, Any], str, Console], tuple[Comparison, Path] | None]
"""`train(options, command_line, console)` runs a study, and returns its results and its folder."""


def run(
    *,
    data_dir: Path | None,
    studies: Path | None,
    out: Path,
    train: Train,
    typed: str,
    console: Console,
) -> None:
    """Runs the cells that the folder does not hold, and reports after each.

    Args:
        data_dir: folder of the data; None runs the cells of digits alone.
        studies: folder whose folders hold reports of other studies, which are shown too.
        out: folder of the results; an atlas that was stopped goes on from there.
        train: runs a study.
        typed: what the user typed, for the report.
        console: shows the progress and the table.

    Raises:
        UserError: cells that failed; another atlas at work in the folder; `studies` that hold
            something else.
        OSError: a file cannot be read or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    stored = [] if studies is None else rows_of_studies(studies)
    groups = make_groups()
    with Locks(out, Processes()).locked():
        rows, todo, left_out = _plan(groups, data_dir, out)
        _say(console, f"Complete studies: {len(rows)}; to run: {len(todo)}; folder: {out}")
        atlas = Atlas(groups, rows, stored, left_out, {}, todo, typed)
        report.write(atlas, out)
        clock = _Clock(sum((cell.cost for cell in todo), 0.0))
        while atlas.missing:
            cell = atlas.missing.pop(0)
            _say(console, f"{cell.title}: begins{clock.left()}")
            try:
                comparison = _run_cell(cell, data_dir, out, train, console)
                rows[cell] = _row(cell, comparison, out)
                clock.done += cell.cost
                found = f"worth {rows[cell].worth}, {rows[cell].verdict}"
            except FAILURES as error:
                message = str(error)
                if isinstance(error, click.ClickException):
                    message = error.format_message()
                atlas.failed[cell.title] = " ".join(message.split())
                clock.total -= cell.cost  # Its time says nothing on that of others.
                found = f"failed: {atlas.failed[cell.title]}"
            _say(console, f"{cell.title}: {found}")
            report.write(atlas, out)
    console.print(report.terminal(atlas))
    for sentence in (*report.answer(atlas), *atlas.left_out):
        _say(console, f"- {sentence}")
    _say(console, str(out / "atlas.html"))
    if atlas.failed:
        raise UserError(
            f"these studies failed: {'; '.join(atlas.failed)}. The report says why; the same "
            "command tries them again."
        )


def _plan(
    groups: list[Group], data_dir: Path | None, folder: Path
) -> tuple[dict[Cell, Row], list[Cell], list[str]]:
    """The rows of complete cells, the cells to run, and a sentence for each absent data set."""
    rows: dict[Cell, Row] = {}
    todo: list[Cell] = []
    left_out: dict[str, None] = {}
    for cell in by_cost(groups):
        comparison = _complete(cell, folder)
        if comparison is not None:
            rows[cell] = _row(cell, comparison, folder)
        elif (sentence := cell.missing(data_dir)) is not None:
            left_out[sentence] = None
        else:
            todo.append(cell)
    return rows, todo, [*left_out]


@dataclass
class _Clock:
    """Tells the time left from the costs of the cells."""

    total: float
    done: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def left(self) -> str:
        """Such as ", about 12 minutes left"; empty before the first cell has ended."""
        if not self.done:
            return ""
        seconds = (time.monotonic() - self.start) * (self.total - self.done) / self.done
        return f", about {seconds / 60:.0f} minutes left"


def _folder_of(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / cell.name


def _run_cell(
    cell: Cell, data_dir: Path | None, folder: Path, train: Train, console: Console
) -> Comparison:
    """Runs a cell as the command `jdrop` does, and stores its results."""
    if cell.is_table:
        assert data_dir is not None
        cell.write_table(data_dir, folder)
    arguments = cell.arguments(data_dir, folder)
    # Off a terminal, the lines of each cell would be hundreds.
    quiet = console if console.is_terminal else Console(quiet=True)
    results = train(
        {**_options(arguments), "out": str(_folder_of(cell, folder))},
        command_line(arguments),
        quiet,
    )
    assert results is not None  # It is None in other processes than the first.
    comparison, out = results
    write_text(out / "results.json", comparison.to_json())
    return comparison


def _options(arguments: list[str]) -> dict[str, Any]:
    """The options of the comparison, by name, with their defaults."""
    with compare_command.make_context("jdrop", list(arguments)) as context:
        return {**context.params, "margins": {}, "sweep": {}, "processes": Processes()}


def _complete(cell: Cell, folder: Path) -> Comparison | None:
    """The stored results of a cell; None if it must run.

    It must run if the results are absent, damaged, or of other settings or another jdrop. The
    program of the networks is not compared here: its trace would take longer than all else. A cell
    that runs compares it, and refuses the folder of another program; intact parts train nothing.
    """
    path = _folder_of(cell, folder) / "results.json"
    if not path.exists():
        return None
    try:
        comparison = Comparison.from_json(path.read_text(encoding="utf-8"))
    except ValueError:  # No JSON, another schema, or other JSON.
        return None
    options = _options(cell.arguments(None, folder))
    names = [setting.name for setting in dataclasses.fields(Settings)]
    has_same = all(comparison.settings.get(name) == options[name] for name in names)
    return comparison if has_same and comparison.versions.get("jdrop") == version("jdrop") else None


def _row(cell: Cell, comparison: Comparison, folder: Path) -> Row:
    return row_of(
        comparison,
        cell.title,
        data=cell.data,
        source=_folder_of(cell, folder).as_posix(),
        units=cell.units,
        rate=cell.rate,
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
