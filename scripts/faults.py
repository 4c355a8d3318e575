"""Disturbs a small comparison in many ways, and checks that its numbers stay the same.

The comparison runs undisturbed once. Then it is killed, stopped, damaged or left without space, and
the same command is given again. It must end with the same `results.json`, apart from times, or say
in one sentence what is wrong. Checkpoints are written all the time, so that kills meet many.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import jax
import numpy as np

from jdrop.study import checkpoints, report
from jdrop.study.cli import run_command
from jdrop.study.errors import RunError
from jdrop.study.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "faults.md"

STUDY = [
    *("--train-size", "100", "--batch-size", "20", "--hidden", "8", "--epochs", "40"),
    *("--replicates", "2", "--ensemble-size", "2", "--budget", "2", "--num-samples", "2"),
    *("--no-controls", "--no-theory", "--sweep", "rate=0.2,0.5", "--out", "run"),
]

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells ignore it in the background.
from jdrop.study import checkpoints, main
checkpoints.SECONDS_BETWEEN_CHECKPOINTS, checkpoints.WRITING_SHARE = 0.0, 1.0
sys.exit(main())
"""

FIRST_LINE = "folder: run"
"""The command prints it when all is imported and checked."""

LAST_TRAINING = "training dropout networks at rate 0.5: 10/40"
"""The command prints it in the last cell of the sweep."""

TIMES = ("seconds", "train_seconds", "predict_seconds")
"""The keys of `results.json` that differ between runs."""

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}

FULL_SHARES = (0.012, 0.028, 0.3, 0.95)
"""Sizes of the disks, as shares of what the run needs.

They are too small for the baselines, for checkpoints, for a part, and for the report.
"""

Row = tuple[str, str]
"""What was done to the run, and what it led to."""


class FaultError(Exception):
    """A fault that changed the numbers, lost work, or was told in no clear sentence."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code and all that it printed."""

    code: int
    output: str


@dataclass(frozen=True)
class Undisturbed:
    """What is known of the run that nothing disturbed.

    Attributes:
        folder: holds the folder `run`.
        numbers: what `results.json` holds, without times.
        seconds: from its first line to its end.
        num_bytes: of the folder.
    """

    folder: Path
    numbers: Any
    seconds: float
    num_bytes: int


def run(
    folder: Path, text: str = "", seconds: float | None = None, number: int = signal.SIGKILL
) -> Ended:
    """Gives the command in a folder.

    Args:
        folder: the current folder of the command.
        text: the command prints it.
        seconds: after the text, the process gets a signal, if it still runs; by default none.
        number: of the signal.
    """
    with start(folder) as process:
        if seconds is not None:
            wait_for(process, folder, text)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
    return Ended(process.returncode, printed(folder))


def start(folder: Path) -> subprocess.Popen[str]:
    """Starts the command in a folder; `output.txt` gets what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, *STUDY],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            # Elsewhere, `python -c` would not find a jdrop that is not installed.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def printed(folder: Path) -> str:
    """What the command in a folder has printed so far."""
    return (folder / "output.txt").read_text(errors="replace")


def wait_for(process: subprocess.Popen[str], folder: Path, text: str) -> None:
    """Waits until the process has printed the text, or has ended."""
    while text not in printed(folder) and process.poll() is None:
        time.sleep(0.01)


def run_here(folder: Path) -> Ended:
    """Gives the command in this process, which is faster; its figures are left out."""

    def write_results(comparison: Any, out: Path) -> None:
        (out / "results.json").write_text(comparison.to_json())

    with (
        contextlib.chdir(folder),
        io.StringIO() as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(report, "write", write_results),
        mock.patch.object(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", 0.0),
    ):
        return Ended(run_command(STUDY), output.getvalue())


def numbers(folder: Path) -> Any:
    """What `results.json` of a run holds, without times."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_times(item) for key, item in value.items() if key not in TIMES}
        return [*map(without_times, value)] if isinstance(value, list) else value

    return without_times(json.loads((folder / "run" / "results.json").read_text()))


def check(holds: bool, failure: str, ended: Ended) -> None:
    """Raises with the last lines of the output if a condition does not hold."""
    if not holds:
        raise FaultError(f"{failure}; exit code {ended.code}:\n{ended.output[-2000:]}")


def check_same(folder: Path, ended: Ended, undisturbed: Undisturbed) -> str:
    """Checks that a run ended well, and with the numbers of the undisturbed run."""
    check(ended.code == 0, "the command failed", ended)
    check(numbers(folder) == undisturbed.numbers, f"{folder} holds other numbers", ended)
    return "the same numbers"


def error_line(ended: Ended) -> str:
    """The sentence with which a command ended."""
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    check(ended.code == 1 and len(lines) == 1, "no clear sentence", ended)
    check("Traceback" not in ended.output, "a traceback", ended)
    return lines[0]


def kept(folder: Path) -> str:
    """Which parts and checkpoints a run holds."""
    try:
        return RunFolder.open(folder / "run").describe_progress()
    except RunError:
        return "nothing yet"


def part_times(folder: Path) -> dict[str, int]:
    """When each part was completed."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("run/parts/*.json")}


def check_kept(folder: Path, before: dict[str, int], ended: Ended) -> None:
    """Checks that no part that was complete has been made again."""
    check(before.items() <= part_times(folder).items(), "a part was made again", ended)


def run_undisturbed(folder: Path) -> Undisturbed:
    """Runs the command from its start to its end."""
    with start(folder) as process:
        wait_for(process, folder, FIRST_LINE)
        begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    ended = Ended(process.returncode, printed(folder))
    check(ended.code == 0, "the undisturbed command failed", ended)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Undisturbed(folder, numbers(folder), seconds, num_bytes)


def killed_at_random(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Kills runs at random moments, each time followed by the same command, until they end."""
    done = run_count = 0
    while done < kills:
        run_count += 1
        place = folder / str(run_count)
        ended = Ended(-signal.SIGKILL, "")
        while ended.code == -signal.SIGKILL:
            before = part_times(place)
            # Where all is trained, and after the last kill, the command may end.
            is_last = done == kills or "summary.json" in before
            seconds = None if is_last else rng.uniform(0, undisturbed.seconds)
            ended = run(place, FIRST_LINE, seconds)
            check_kept(place, before, ended)
            if ended.code == -signal.SIGKILL:
                done += 1
                yield f"`kill -9` {done}, after {seconds:.1f} s of run {run_count}", kept(place)
        yield f"no kill before the end of run {run_count}", check_same(place, ended, undisturbed)


def stopped(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Stops the run by SIGTERM and SIGINT."""
    for number, code in EXIT_CODES.items():
        place = folder / number.name
        ended = run(place, "training plain networks: ", rng.uniform(0, 1), number)
        check(ended.code == code, f"{number.name} gave another exit code", ended)
        last_line = ended.output.splitlines()[-1]
        check("the same command goes on from there" in last_line, "no advice", ended)
        before = part_times(place)
        ended = run(place)
        check_kept(place, before, ended)
        yield f"{number.name}", f"{last_line} Then {check_same(place, ended, undisturbed)}"


def killed_in_last_cell(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Kills the run in the last cell of the sweep; only that cell may be computed again."""
    run(folder, LAST_TRAINING, 0.0)
    before = part_times(folder)
    ended = run(folder)
    check_kept(folder, before, ended)
    lines = [line for line in ended.output.splitlines() if line.startswith("training ")]
    again = {line.partition(":")[0] for line in lines}
    check(again <= {LAST_TRAINING.partition(":")[0]}, "other cells were trained again", ended)
    yield "`kill -9` in the last cell of the sweep", check_same(folder, ended, undisturbed)


def two_runs(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Gives the command in a folder in which it is running."""
    with start(folder) as first:
        wait_for(first, folder, "training ")
        line = error_line(run_here(folder))
        check("another run is at work" in line, "no word of the other", Ended(1, line))
        line = re.sub(r" \(process .*?\)", " (process ... on ...)", line)
        check(first.poll() is None, "the first run ended too early", Ended(0, printed(folder)))
    ended = Ended(first.returncode, printed(folder))
    same = check_same(folder, ended, undisturbed)
    yield "two runs in one folder", f"the second: {line} The first: {same}"


def clock_set_back(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """All files of a run that was killed are of tomorrow, and the clock runs backwards."""
    run(folder, LAST_TRAINING, 0.0)
    tomorrow = time.time() + 86_400
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file, hour in zip(files, rng.permutation(len(files)), strict=True):
        os.utime(file, (tomorrow, tomorrow + 3600 * hour))
    before, backwards = part_times(folder), map(float, range(2**31, 0, -60))
    with mock.patch.object(time, "time", side_effect=backwards):
        ended = run_here(folder)
    check_kept(folder, before, ended)
    yield "the clock is set back", check_same(folder, ended, undisturbed)


def damages(content: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """A truncated content, and one with a flipped bit."""
    yield "truncated", content[: rng.integers(len(content) + 1)]
    if content:
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        yield "with one flipped bit", bytes(flipped)


def finished_and_damaged(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Damages each file of a run that has ended."""
    yield "each file of a finished run damaged", damage(undisturbed.folder, undisturbed, rng)


def stopped_and_damaged(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Damages each file of a run that was stopped in its last training."""
    run(folder, LAST_TRAINING, 0.0, signal.SIGTERM)
    complete = [*folder.glob("run/checkpoints/**/*.json")]
    check(bool(complete), "no checkpoint to damage", Ended(0, printed(folder)))
    yield "each file of a stopped run damaged", damage(folder, undisturbed, rng)


def damage(folder: Path, undisturbed: Undisturbed, rng: np.random.Generator) -> str:
    """Gives the command after each damage to a file of a run; says how often it led to what."""
    outcomes: dict[str, int] = {}
    for file in sorted(folder.glob("run/**/*")):
        if not file.is_file() or file.suffix in (".png", ".html", ".md", ".csv"):
            continue
        for name, content in damages(file.read_bytes(), rng):
            place = folder.with_name("damaged")
            shutil.copytree(folder, place)
            (place / file.relative_to(folder)).write_bytes(content)
            click.echo(f"{file.relative_to(folder)} {name}", err=True)
            ended = run_here(place)
            if ended.code == 0:
                outcome = check_same(place, ended, undisturbed)
            else:
                line = error_line(ended)
                check("run.json" in line or "holds another run" in line, "no name", ended)
                outcome = "refused by a sentence that names `run.json`"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            shutil.rmtree(place)
    counts = "; ".join(f"{count} times {outcome}" for outcome, count in outcomes.items())
    return f"truncated, then with one flipped bit: {counts}"


def full_disk(
    folder: Path, undisturbed: Undisturbed, rng: np.random.Generator, kills: int
) -> Iterator[Row]:
    """Runs on file systems that are too small, which are then made larger."""
    for share in FULL_SHARES:
        place = folder / str(share)
        disk = place / "run"
        disk.mkdir(parents=True)
        size = int(share * undisturbed.num_bytes)
        mount = ["mount", "-t", "tmpfs", "-o"]
        if subprocess.run([*mount, f"size={size}", "tmpfs", disk], check=False).returncode:
            yield "a full disk", "not tried: only root can mount one"
            return
        try:
            line = error_line(run(place))
            check(os.strerror(errno.ENOSPC) in line, "another error", Ended(1, line))
            before = part_times(place)
            subprocess.run([*mount, "remount,size=100m", disk], check=True)
            ended = run(place)
            check_kept(place, before, ended)
            same = check_same(place, ended, undisturbed)
        finally:
            subprocess.run(["umount", disk], check=True)
        yield f"a disk of {size / 1e3:.0f} kB is full", f"{line} After it was enlarged: {same}"


FAULTS: dict[str, Callable[[Path, Undisturbed, np.random.Generator, int], Iterator[Row]]] = {
    "kills": killed_at_random,
    "stops": stopped,
    "last-cell": killed_in_last_cell,
    "two-runs": two_runs,
    "clock": clock_set_back,
    "finished-damaged": finished_and_damaged,
    "stopped-damaged": stopped_and_damaged,
    "full-disk": full_disk,
}


@click.command()
@click.argument("faults", nargs=-1, type=click.Choice([*FAULTS]))
@click.option("--kills", default=20, show_default=True, help="How often the run is killed.")
@click.option("--seed", default=0, show_default=True, help="Chooses the moments and the damage.")
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file for the table.")
def main(faults: tuple[str, ...], kills: int, seed: int, out: Path | None) -> None:
    """Checks that FAULTS, by default all of them, change no number, and prints a table of them."""
    # As the command does, so that runs in this process have the same programs.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    command = " ".join(["python scripts/faults.py", *faults, f"--kills {kills} --seed {seed}"])
    lines = [
        "# Faults",
        "",
        f"`{command}` disturbs `jdrop {' '.join(STUDY)}`.",
        "",
        "| the run meets | what follows |",
        "|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = run_undisturbed(Path(folder, "undisturbed"))
        click.echo("\n".join(lines))
        for name in faults or FAULTS:
            place = Path(folder, name)
            place.mkdir()
            rng = np.random.default_rng([seed, [*FAULTS].index(name)])
            for fault, outcome in FAULTS[name](place, undisturbed, rng, kills):
                lines.append(f"| {fault} | {outcome.replace('|', ' ').replace(folder, '')} |")
                click.echo(lines[-1])
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
