"""How far a comparison is: a bar on a terminal, lines elsewhere, both with the time left."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jdrop.study.data import Progress

Result = TypeVar("Result")


def with_progress(work: Callable[[Progress], Result], console: Console) -> Result:
    """Works with a bar that tells the time left or, where there is no terminal, with lines.

    Args:
        work: is called with a function that it calls as the work goes on.
        console: shows the bar or the lines.

    Returns:
        What `work` returns.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, tuple[Any, float, int]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total), time.monotonic(), done
            task, start, done_at_start = tasks[what]
            bars.update(task, completed=done)
            if not console.is_terminal and (done == total or done % -(-total // 4) == 0):
                line = f"{what}: {done}/{total}"
                if total > done > done_at_start:  # The clock starts when the first is done.
                    left = (time.monotonic() - start) * (total - done) / (done - done_at_start)
                    line += f", {left:.0f} s left"
                console.print(line, highlight=False)

        return work(progress)
