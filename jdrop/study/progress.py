"""How far a comparison is: a bar on a terminal, lines elsewhere, both with the time left."""

import time
from collections.abc import Callable
from dataclasses import dataclass
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


SHORT = 2.0
"""Seconds after which a repeated work has lines too, where there is no terminal."""


@dataclass
class _Work:
    """A work that is shown.

    Attributes:
        bar: on a terminal.
        start: the time of its first step, in seconds.
        done_at_start: the steps that were done then.
        step: the steps that are done, and their total.
        is_repeated: whether the same work was done before.
    """

    bar: Any
    start: float
    done_at_start: int
    step: tuple[int, int]
    is_repeated: bool


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
        self._works: dict[str, _Work] = {}
        self.note = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps of the work `what` are done."""
        note, self.note = self.note, ""
        now = time.monotonic()
        if what not in self._works:
            bar = self._bars.add_task(what, total=total, note="")
            self._works[what] = _Work(bar, now, done, (done, total), is_repeated=False)
        elif done < self._works[what].step[0] or (done, total) == self._works[what].step:
            bar = self._works[what].bar
            self._works[what] = _Work(bar, now, done, (done, total), is_repeated=True)
        work = self._works[what]
        work.step = done, total
        self._bars.update(work.bar, completed=done, total=total, note=note)
        is_shown = not work.is_repeated or now - work.start > SHORT
        is_quarter = done == total or done % -(-total // 4) == 0
        if not self._console.is_terminal and is_shown and is_quarter:
            line = f"{what}: {done}/{total}"
            if total > done > work.done_at_start:  # The clock starts when the first is done.
                left = (now - work.start) * (total - done) / (done - work.done_at_start)
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
