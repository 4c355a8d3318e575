"""How many independently trained networks is one dropout network worth? Trains both and tells.

Without options it runs on scikit-learn's digits, needs no network, and takes about a minute.
"""

import math
import shlex
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jdrop.study import report
from jdrop.study.comparison import Comparison, DivergedError, Settings, compare
from jdrop.study.data import DATASETS, DataError, Dataset, load

DEFAULTS = Settings()


class Rate(click.ParamType):
    """A probability below 1, as the options for rates and label noise take it."""

    name = "rate"

    def __init__(self, *, zero: bool) -> None:
        self.zero = zero

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The rate as a float, or the error that it deserves."""
        allowed = "[0, 1)" if self.zero else "(0, 1)"
        try:
            rate = float(str(value))
        except ValueError:
            rate = math.nan
        if not ((rate >= 0 if self.zero else rate > 0) and rate < 1):
            self.fail(f"must lie in {allowed}, got {value}.", param, ctx)
        return rate


class Hidden(click.ParamType):
    """Units of the hidden layers, such as 256,256."""

    name = "units"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers of units, or the error that they deserve."""
        if isinstance(value, tuple):
            return value
        try:
            units = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            units = ()
        if not units or min(units) < 1:
            self.fail(f"must be positive numbers such as 256,256, got {value}.", param, ctx)
        return units


@click.command(context_settings={"show_default": True, "max_content_width": 100}, help=__doc__)
@click.option("--dataset", type=click.Choice(DATASETS), default="digits")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the four files of mnist or fashion-mnist; downloaded without it.",
)
@click.option(
    "--train-size", type=click.IntRange(min=1), help="Training examples; 500 of digits, else all."
)
@click.option(
    "--label-noise", type=Rate(zero=True), default=0.0, help="Share of training labels made wrong."
)
@click.option(
    "--hidden",
    type=Hidden(),
    default=DEFAULTS.hidden,
    help="Units of the hidden layers, as in 256,256.",
)
@click.option(
    "--rate", type=Rate(zero=False), default=DEFAULTS.rate, help="Dropout rate of hidden units."
)
@click.option(
    "--input-rate",
    type=Rate(zero=True),
    default=DEFAULTS.input_rate,
    help="Dropout rate of inputs.",
)
@click.option(
    "--members", type=click.IntRange(min=2), default=DEFAULTS.members, help="Networks of each kind."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=DEFAULTS.samples,
    help="Masks of Monte-Carlo dropout.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=DEFAULTS.epochs,
    help="Passes over the training examples.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=DEFAULTS.batch_size,
    help="Examples in a step.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=DEFAULTS.learning_rate,
    help="Step size of Adam.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=DEFAULTS.seed,
    help="Of all that is random.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="comparison",
    help="Folder of the results; files in it are replaced.",
)
def main(
    dataset: str,
    data_dir: Path | None,
    train_size: int | None,
    label_noise: float,
    out: Path,
    **options: object,
) -> None:
    """Runs the comparison and shows what it found."""
    settings = Settings(**options)
    if not math.isfinite(settings.learning_rate):
        raise click.UsageError(f"--learning-rate must be finite, got {settings.learning_rate}.")
    if dataset == "digits" and data_dir is not None:
        raise click.UsageError("--data-dir is for mnist and fashion-mnist; digits are embedded.")
    try:
        data = load(
            dataset,
            train_size=train_size,
            label_noise=label_noise,
            seed=settings.seed,
            data_dir=data_dir,
        )
    except DataError as error:
        raise click.UsageError(str(error)) from error
    if settings.batch_size > len(data.train_labels):
        raise click.UsageError(
            f"--batch-size must not exceed the {len(data.train_labels)} training examples, "
            f"got {settings.batch_size}."
        )
    try:
        # Before hours of work, not after them.
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise click.UsageError(f"--out {out} cannot be written: {error.strerror}.") from error

    console = Console(width=None if sys.stdout.isatty() else 80)
    try:
        comparison = run(settings, data, console)
    except DivergedError as error:
        raise click.ClickException(str(error)) from error
    console.print(report.terminal_table(comparison))
    console.print(comparison.sentence(), highlight=False, markup=False)
    console.print(report.LEGEND, highlight=False, markup=False, style="dim")
    try:
        written = report.write(comparison, out, shlex.join(["python", *sys.argv]))
    except OSError as error:
        raise click.ClickException(
            f"{out} could not be written whole: {error.strerror}. The table above is complete."
        ) from error
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def run(settings: Settings, data: Dataset, console: Console) -> Comparison:
    """Compares, with a bar that tells the time left or, where there is no terminal, with lines."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, tuple[object, float]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total), time.monotonic()
            task, start = tasks[what]
            bars.update(task, completed=done)
            if not console.is_terminal and (done == total or done % -(-total // 10) == 0):
                unit = "network" if "masks" in what else "epoch"
                line = f"{what}: {unit} {done}/{total}"
                if done > 1:  # The clock starts when the first is done.
                    left = (time.monotonic() - start) * (total - done) / (done - 1)
                    line += f", {left:.0f} s left"
                console.print(line, highlight=False)

        return compare(settings, data, progress)


def run_command(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; an error is one line on the standard error."""
    try:
        main(arguments, standalone_mode=False)
    except click.ClickException as error:
        sys.stderr.write(f"error: {' '.join(error.format_message().split())}\n")
        return error.exit_code
    except click.Abort:
        sys.stderr.write("stopped; no results were written.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
