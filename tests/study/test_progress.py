"""The lines of the progress where there is no terminal."""

import io

import pytest
from rich.console import Console

from jdrop.study import progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(work):
    console = Console(file=io.StringIO(), width=80)
    progress.with_progress(work, console)
    return console.file.getvalue().splitlines()


def steps(show, clock, what, total, seconds):
    for done in range(1, total + 1):
        clock[0] += seconds
        show(what, done, total)


def test_each_quarter_has_a_line_with_the_time_left(clock):
    assert lines(lambda show: steps(show, clock, "epochs", 8, seconds=3.0)) == [
        "epochs: 2/8, 18 s left",
        "epochs: 4/8, 12 s left",
        "epochs: 6/8, 6 s left",
        "epochs: 8/8",
    ]


def test_a_short_work_that_is_repeated_has_no_more_lines(clock):
    def work(show):
        for _ in range(3):
            steps(show, clock, "masks", 4, seconds=0.1)

    assert lines(work) == lines(lambda show: steps(show, clock, "masks", 4, seconds=0.1))


def test_the_time_left_of_a_repeated_work_is_its_own(clock):
    def work(show):
        steps(show, clock, "masks", 4, seconds=1000.0)
        steps(show, clock, "masks", 4, seconds=5.0)

    assert lines(work)[-3:] == [
        "masks: 2/4, 10 s left",
        "masks: 3/4, 5 s left",
        "masks: 4/4",
    ]


def test_a_work_that_ends_early_says_so(clock):
    def work(show):
        for done in (1, 2):
            clock[0] += 1.0
            show("epochs", done, 8)
        show("epochs", 2, 2)

    assert lines(work) == ["epochs: 2/8, 6 s left", "epochs: 2/2"]
