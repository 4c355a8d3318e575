"""How far a comparison is: a bar on a terminal, lines elsewhere, both with the time left."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

Result = TypeVar("Result")


class _ShrinkingColumn(TextColumn):
    """Text that ends in an ellipsis on a narrow terminal; the other columns keep their width."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """Returns the text, on one line."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Display:
    """Shows the progress: call it as `progress(what, done, total)`.

    Args:
        bars: are shown on a terminal.
        console: shows lines if it is no terminal.

    Attributes:
        note: is shown beside the next step of the progress, once.
    """

    def __init__(self, bars: Bars, console: Console) -> None:
        self._bars, self._console = bars, console
        self._tasks: dict[str, tuple[Any, float, int]] = {}
        self.note = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps of the work `what` are done."""
        note, self.note = self.note, ""
        if what not in self._tasks:
            task = self._bars.add_task(what, total=total, note="")
            self._tasks[what] = task, time.monotonic(), done
        task, start, done_at_start = self._tasks[what]
        self._bars.update(task, completed=done, note=note)
        if not self._console.is_terminal and (done == total or done % -(-total // 4) == 0):
            line = f"{what}: {done}/{total}"
            if total > done > done_at_start:  # The clock starts when the first is done.
                left = (time.monotonic() - start) * (total - done) / (done - done_at_start)
                line += f", {left:.0f} s left"
            with_note = f"{line}, {note}" if note else line
            fits = len(with_note) <= self._console.width
            self._console.print(with_note if fits else line, highlight=False)


def with_progress(work: Callable[[Display], Result], console: Console) -> Result:
    """Works with a bar that tells the time left or, where there is no terminal, with lines.

    Args:
        work: is called with a display, which it calls as the work goes on.
        console: shows the bar or the lines.

    Returns:
        What `work` returns.
    """
    columns = (
        _ShrinkingColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _ShrinkingColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        return work(Display(bars, console))
