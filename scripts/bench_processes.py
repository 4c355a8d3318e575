"""Times one study by one process of one core, and by two processes of one core each.

Other options are those of the command `jdrop`; the rounds follow each other. The first round fills
JAX's cache of compiled programs and does not count.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

STUDY = ("--replicates", "4", "--train-size", "1000", "--epochs", "200", "--num-samples", "20")
STUDY += ("--no-controls", "--no-theory")
"""A study in which the training takes most of the time."""

ON_CORE = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv.pop(1))}); "
    "from jdrop.study import main; sys.exit(main())"
)
"""Runs the command on the core that its first argument names."""


def free_port() -> int:
    """A port on which nothing listens yet."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run(count: int, options: tuple[str, ...], cache: str) -> tuple[float, float]:
    """Runs the study with so many processes.

    Returns:
        The seconds until the report is there, and those of them in which process 0 trains,
        predicts and waits.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise click.ClickException(f"{count} processes need {count} cores, there is {len(cores)}.")
    meeting = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count))
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", ON_CORE, str(cores[index]), *STUDY, *options),
                    *(*meeting, "--process-id", str(index), "--out", folder),
                ],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for index in range(count)
        ]
        if any(process.wait() for process in processes):
            raise click.ClickException("a process has failed; see above.")
        seconds = time.perf_counter() - start
        summary = json.loads(Path(folder, "parts", "summary.json").read_text(encoding="utf-8"))
    return seconds, summary["seconds"]["this run"]


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Rounds that count.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(rounds: int, options: tuple[str, ...]) -> None:
    """Prints both times, and how many times as fast two processes are."""
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as cache:
        for index in range(rounds + 1):
            for count in times:
                seconds = run(count, options, cache)
                if index:
                    times[count].append(seconds)
                    click.echo(f"{count}: {seconds[0]:.1f} s, training {seconds[1]:.1f} s")
    for place, name in enumerate(("the command", "training and predictions")):
        one, two = (statistics.median(pair[place] for pair in pairs) for pairs in times.values())
        click.echo(f"{name}: {one:.1f} s and {two:.1f} s, {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
