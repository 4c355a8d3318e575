"""Sets the report of one study from 1 process x 1 device, 1 x 8 and 2 x 4 side by side.

Other options are those of the command `jdrop`. All processes run on this machine; the devices are
those that JAX makes of its CPU.
"""

import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench_processes import free_port

from jdrop.statistics import EquivalenceTest, Interval

STUDY = ("--train-size", "300", "--batch-size", "50", "--hidden", "32", "--epochs", "20")
STUDY += ("--replicates", "2", "--ensemble-size", "5", "--budget", "5", "--num-samples", "5")
STUDY += ("--no-theory", "--no-controls")
"""Ten plain networks, which neither 8 nor 4 devices divide, and cross-validation."""

LAYOUTS = {"1 process x 1 device": (1, 1), "1 x 8": (1, 8), "2 x 4": (2, 4)}
"""Processes, and devices of each."""

RESULTS = Path(__file__).parent / "results" / "scale.md"

WITH_DEVICES = (
    "import sys, jax; jax.config.update('jax_num_cpu_devices', int(sys.argv.pop(1))); "
    "from jdrop.study.cli import run_command; sys.exit(run_command(sys.argv[1:]))"
)
"""Runs the command with as many devices as its first argument says."""

LEFT_OUT = ("schema_version", "command", "settings", "versions", "seconds")
"""What `results.json` holds besides results."""

NO_JSON_NUMBERS = ("NaN", "Infinity", "-Infinity")
"""What `results.json` holds as text."""

COUNTS = "sizes, epochs, FLOPs and bytes"

KINDS = {
    "num_replicates": COUNTS,
    "worth": "worth, in plain networks",
    "reliability": "curves of reliability and risk",
    "risk_coverage": "curves of reliability and risk",
    "p_value": "p-values of verdicts",
    "low": "ends of intervals",
    "high": "ends of intervals",
    "scores": "mean scores",
    "over_seeds": "mean scores",
    "mean": "mean differences of scores",
}
"""Numbers of methods, by the first of these names that occurs in their path."""


@dataclass(frozen=True)
class Difference:
    """How far the numbers of one kind lie apart in two reports.

    Attributes:
        count: how many numbers there are.
        relative: the largest difference, as a share of the larger of the two numbers.
        absolute: the largest difference.
    """

    count: int
    relative: float
    absolute: float


def run(folder: Path, count: int, num_devices: int, options: tuple[str, ...]) -> None:
    """Runs the study in `folder` with so many processes of so many devices each."""
    meeting = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count))
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", WITH_DEVICES, str(num_devices), *STUDY, *options),
                *(*meeting, "--process-id", str(index), "--out", str(folder)),
            ],
            stdout=subprocess.DEVNULL,
        )
        for index in range(count)
    ]
    if any([process.wait() for process in processes]):
        raise click.ClickException("a process has failed; see above.")


def numbers_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, float]]:
    """The numbers of a report and their paths, without times."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            if "seconds" not in name and not (path == () and name in LEFT_OUT):
                yield from numbers_of(child, (*path, name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from numbers_of(child, (*path, index))
    elif value in NO_JSON_NUMBERS or type(value) in (int, float):
        yield path, float(value)


def kind_of(path: tuple[str | int, ...]) -> str:
    """The kind of a number, in words."""
    part = str(path[0])
    if part not in ("methods", "same_epochs"):
        return part.replace("_", " ")
    kinds = (kind for name, kind in KINDS.items() if name in path)
    return next(kinds, COUNTS)


def verdicts_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """The word of each verdict on a method against an ensemble, and its path."""
    if isinstance(value, Mapping) and {"difference", "margin"} <= {*value}:
        ends = [value["difference"].get(name) for name in ("mean", "low", "high")]
        mean, low, high = (float(end) if end in NO_JSON_NUMBERS else end for end in ends)
        difference = Interval(mean, low, high, value["difference"]["num_replicates"])
        p_value, refusal = value.get("p_value"), value.get("refusal")
        yield path, EquivalenceTest(difference, value["margin"], p_value, refusal).verdict
    elif isinstance(value, Mapping | list):
        children = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, child in children:
            yield from verdicts_of(child, (*path, name))


def differences(report: Any, other: Any) -> dict[str, Difference]:
    """How far two reports lie apart, by the kind of number.

    Raises:
        click.ClickException: a number is in one of the reports only.
    """
    numbers, others = dict(numbers_of(report)), dict(numbers_of(other))
    if single := {*numbers} ^ {*others}:
        paths = ", ".join("/".join(map(str, path)) for path in sorted(single, key=str)[:3])
        raise click.ClickException(
            f"{len(single)} numbers are in one report only, such as {paths}."
        )
    found: dict[str, Difference] = {}
    for path, number in numbers.items():
        absolute = _distance(number, others[path])
        larger = max(abs(number), abs(others[path]))
        relative = absolute / larger if 0 < larger < math.inf else min(absolute, 1.0)
        before = found.get(kind_of(path), Difference(0, 0.0, 0.0))
        found[kind_of(path)] = Difference(
            before.count + 1, max(before.relative, relative), max(before.absolute, absolute)
        )
    return found


def _distance(number: float, other: float) -> float:
    if number == other or (math.isnan(number) and math.isnan(other)):
        return 0.0
    return abs(number - other) if math.isfinite(number - other) else math.inf


def page(reports: Mapping[str, Any], options: tuple[str, ...]) -> str:
    """The reports side by side, and the largest differences, in Markdown.

    Args:
        reports: what `results.json` holds, by layout; the others are compared with the first.
        options: of the command, besides those of the study.
    """
    report, *_ = reports.values()
    _, *others = reports.items()
    versions = report["versions"]
    of_script = " ".join(["python scripts/scale_report.py", shlex.join(options)]).strip()
    lines = [
        "# One study on one device, on eight, and in two processes",
        "",
        f"`{of_script}` runs this study three times, with jax {versions['jax']}:",
        "",
        "```text",
        f"jdrop {shlex.join([*STUDY, *options])}",
        "```",
        "",
        "JAX makes the devices of one CPU. The processes of a run meet through its folder.",
        "",
        "## Scores of the largest average of each method",
        "",
        *_row(
            "method",
            *(f"NLL, {layout}" for layout in reports),
            *(f"error, {layout}" for layout in reports),
        ),
        *_row("---", *("---",) * 2 * len(reports)),
    ]
    for index, method in enumerate(report["methods"]):
        points = [each["methods"][index]["points"][-1] for each in reports.values()]
        cells = [_interval(each["scores"][name]) for name in ("nll", "error") for each in points]
        lines += _row(method["label"].replace("{n}", str(points[0]["size"])), *cells)
    lines += [
        "",
        "Brackets hold the intervals of the report.",
        "",
        "## Largest differences from 1 process x 1 device",
        "",
        *_row("numbers", "how many", *(f"relative, absolute: {layout}" for layout, _ in others)),
        *_row("---", "---", *("---" for _ in others)),
    ]
    compared = [differences(report, other) for _, other in others]
    for kind, difference in compared[0].items():
        cells = [f"{each[kind].relative:.2g}, {each[kind].absolute:.2g}" for each in compared]
        lines += _row(kind, f"{difference.count:,}", *cells)
    words = dict(verdicts_of(report))
    same = [
        sum(word == words.get(path) for path, word in verdicts_of(other)) for _, other in others
    ]
    lines += _row(
        "verdicts that are the same word", f"{len(words):,}", *(f"{count:,}" for count in same)
    )
    lines += [
        "",
        "A relative difference is a share of the larger of the two numbers. A number near 0, such "
        "as a difference of two scores, may have a large relative difference and a small absolute "
        "one. Times are left out.",
    ]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _interval(score: Mapping[str, Any]) -> str:
    low, high = (float(score.get(end, math.nan)) for end in ("low", "high"))
    return f"{score['mean']:.6f} [{low:.4f}, {high:.4f}]"


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option(
    "--page",
    "path",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="File to write the page to.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(path: Path, options: tuple[str, ...]) -> None:
    """Runs the study in each layout, prints the page and writes it."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (layout, (count, num_devices)) in enumerate(LAYOUTS.items()):
            out = Path(folder, str(index))
            run(out, count, num_devices, options)
            reports[layout] = json.loads((out / "results.json").read_text(encoding="utf-8"))
            click.echo(f"{layout}: {reports[layout]['versions']['device']}", err=True)
    text = page(reports, options)
    path.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
