"""Measures how often intervals of the worth hold the truth, and how often verdicts are wrong.

Studies are simulated by `coverage_studies.py`, so that true worths are known exactly. A worth of 1
is missed only by an interval above it, and one beyond the largest ensemble only by an interval
below. So at least 97.5 % of intervals should hold these two, and 95 % the others. A worth is
refused with 2 replicates, but its interval is given, and the table shows its coverage.

A verdict such as "not worse" or "better" is wrong if the true difference is the margin; the test
allows 5 %. Here the differences are between one network and the largest ensemble. The truth is
their mean over all studies of a kind. "Good" counts the 90 % intervals that lie wholly below it, so
that a method with that difference seems better than it is. "Bad" counts those wholly above it. A
refused verdict is no error: "good refused" counts where being below a value cannot be claimed, and
"bad refused" where being above one cannot.
"""

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np
from coverage_studies import LARGEST, NUM_EXAMPLES, SCORES, SIMULATORS, TRUTHS, simulate
from rich.console import Console
from rich.table import Table

from jdrop.statistics import EnsembleCurve, equivalence_test

REPLICATES = (2, 3, 5, 10)

FAR = 1000.0
"""A difference larger than any margin, and than any loss here."""

CHUNK = 20
"""Studies that a process simulates at a time."""

WIDTH = 110
"""Characters of the table, also if no terminal shows it."""

Job = tuple[str, int, int, int]
"""The simulator, the number of replicates, how many studies, and a seed."""


def run_chunk(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Simulates studies.

    Returns:
        Whether the interval holds the truth, `[study, score, truth]`; and for the difference
        `[study, score, 5]`: its mean, the ends of its 90 % interval, and whether a claim is refused
        that it is below a value, and above one.
    """
    name, num_replicates, num_studies, seed = job
    rng = np.random.default_rng([seed, list(SIMULATORS).index(name), num_replicates])
    covered = np.zeros((num_studies, len(SCORES), len(TRUTHS)), bool)
    differences = np.zeros((num_studies, len(SCORES), 5))
    for index in range(num_studies):
        study = simulate(name, rng, num_replicates)
        for score, (plain, methods) in enumerate(zip(study.plain, study.methods, strict=True)):
            curve = EnsembleCurve(plain)
            for position, truth in enumerate(TRUTHS):
                equivalent = curve.equivalent(methods[:, position])
                reached = truth if truth <= LARGEST else math.inf
                covered[index, score, position] = equivalent.low <= reached <= equivalent.high
            difference = methods[:, 0] - plain[:, -1]
            # Far from the margin, the verdicts are "better" and "worse".
            below, above = (equivalence_test(difference + far, 1.0) for far in (-FAR, FAR))
            mean, high = below.difference.mean + FAR, below.difference.high + FAR
            refused = [test.refusal is not None for test in (below, above)]
            differences[index, score] = mean, above.difference.low - FAR, high, *refused
    return covered, differences


def rows_of(
    name: str, results: dict[int, tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[str, ...]]:
    """The rows of a simulator: its name, score, replicates, coverages and errors in percent."""
    true_differences = np.concatenate([result[1] for result in results.values()])[..., 0].mean(0)
    for score, title in enumerate(SCORES):
        for num_replicates, (covered, differences) in results.items():
            _, low, high, below_refused, above_refused = differences[:, score].T
            truth = true_differences[score]
            shares = [
                *covered[:, score].mean(0),
                ((high < truth) & (below_refused == 0)).mean(),
                ((low > truth) & (above_refused == 0)).mean(),
                below_refused.mean(),
                above_refused.mean(),
            ]
            percentages = [f"{100 * share:.1f}" for share in shares]
            yield name, title, str(num_replicates), *percentages


def header() -> list[str]:
    """The titles of the columns."""
    truths = [f"{truth:g}" if truth <= LARGEST else f">{LARGEST}" for truth in TRUTHS]
    return ["kind", "score", "replicates", *truths, "good", "bad", "good refused", "bad refused"]


def as_markdown(rows: list[tuple[str, ...]], num_studies: int, command: str) -> str:
    """The table and how to read it, as a page."""
    lines = [header(), ["---"] * len(header()), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    kinds = "\n".join(f"- {name}: {explanation}." for name, explanation in SIMULATORS.items())
    return (
        f"# Coverage of the intervals\n\n{__doc__.strip()}\n\n"
        f"{num_studies:,} studies for each row, of {NUM_EXAMPLES} test examples and up to "
        f"{LARGEST} networks. All figures are in percent. {errors_sentence(num_studies)}\n\n"
        f"The method is an average of as many networks as its true worth, and of {TRUTHS[-1]:g} "
        f"for >{LARGEST}. The kinds of studies:\n\n{kinds}\n\n"
        f"{table}\n\nWritten by:\n\n```\n{command}\n```\n"
    )


def errors_sentence(num_studies: int) -> str:
    """The standard errors of a simulation of so many studies."""
    of_coverage, of_error = (100 * math.sqrt(p * (1 - p) / num_studies) for p in (0.95, 0.05))
    return (
        f"The standard error of a coverage of 95 is {of_coverage:.1f}, and that of an error rate "
        f"of 5 is {of_error:.1f}."
    )


@click.command(help=__doc__)
@click.option("--studies", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--out", type=click.Path(path_type=Path), help="A file for the table in Markdown.")
def main(studies: int, seed: int, out: Path | None) -> None:
    """Prints coverage and errors by kind of study, score and number of replicates."""
    cells = list(itertools.product(SIMULATORS, REPLICATES))
    starts = range(0, studies, CHUNK)
    jobs = [
        (name, replicates, min(CHUNK, studies - start), seed * studies + start)
        for name, replicates in cells
        for start in starts
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        chunks = list(pool.map(run_chunk, jobs))
    results: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for index, (name, replicates) in enumerate(cells):
        of_cell = chunks[index * len(starts) : (index + 1) * len(starts)]
        covered, differences = (np.concatenate(parts) for parts in zip(*of_cell, strict=True))
        results.setdefault(name, {})[replicates] = covered, differences
    rows = [row for name, of_name in results.items() for row in rows_of(name, of_name)]
    table = Table(*header(), title=f"{studies} studies of {NUM_EXAMPLES} examples", box=None)
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(WIDTH, Console().width))
    console.print(table)
    console.print(errors_sentence(studies))
    if out is not None:
        command = f"python scripts/coverage.py --studies {studies} --seed {seed} --out {out}"
        out.write_text(as_markdown(rows, studies, command))


if __name__ == "__main__":
    main()
