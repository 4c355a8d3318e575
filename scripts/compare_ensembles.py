"""How many independently trained networks is one dropout network worth? Trains both and tells.

Without options it runs on scikit-learn's digits, needs no network, and takes about a minute. Give
--dataset and --model for your own, or --predictions for networks that you have trained already. A
run that was stopped goes on when the same command is given again. `report FOLDER` draws everything
again without training.
"""

import importlib
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jdrop.study import evaluation, report, tables
from jdrop.study.comparison import about, default_folder, run_comparison
from jdrop.study.data import DATASETS, DataError, Dataset, load
from jdrop.study.methods import MLP, Model, ModelError, Settings
from jdrop.study.results import Comparison
from jdrop.study.run import Run, RunError
from jdrop.study.training import DivergedError

DEFAULTS = Settings()

ERRORS = (DataError, ModelError, RunError, DivergedError, ValueError)
"""What a user can cause; the message says all."""


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


class Named(click.ParamType):
    """A name and numbers, such as rate=0.1,0.5 or nll=0.01."""

    name = "name=number"

    def __init__(self, names: tuple[str, ...], *, several: bool) -> None:
        self.names, self.several = names, several

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, list[float]]:
        """Name and numbers, or the error that they deserve."""
        name, _, text = str(value).partition("=")
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        name = name.replace("-", "_")
        if name not in self.names or not numbers or (len(numbers) > 1 and not self.several):
            names = ", ".join(self.names)
            self.fail(f"must be NAME=NUMBER, NAME one of {names}, got {value}.", param, ctx)
        if not self.several and not 0 < numbers[0] < math.inf:
            self.fail(f"must be a number above 0, got {value}.", param, ctx)
        return name, numbers


MARGINS = ("nll", "calibrated_nll", "brier", "error", "crps", "mse")
SWEEPS = ("rate", "train_size", "width_factor", "label_noise")


def _margin_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--margin",
        "margins",
        multiple=True,
        type=Named(MARGINS, several=False),
        help="Difference in a score that is held to be none, as in nll=0.02; repeat for others.",
    )(function)


@click.group(
    invoke_without_command=True,
    context_settings={"show_default": True, "max_content_width": 100},
    help=__doc__,
)
@click.option(
    "--dataset",
    default="digits",
    metavar="NAME|FILE",
    help=f"{', '.join(DATASETS)}, or a file that ends in .npz, .csv, .tsv, .txt or .data.",
)
@click.option("--target", help="Column of a table that is to be predicted: its name or number.")
@click.option(
    "--task",
    type=click.Choice(["classification", "regression"]),
    help="Of a table; told from its target without it.",
)
@click.option(
    "--test-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Table of test examples; without it a fifth of --dataset is held out.",
)
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="An .npz of log-probabilities `plain` [member, example, class] and `labels`, and of "
    "`dropout`, `monte_carlo` or others, to compare without training.",
)
@click.option(
    "--model",
    metavar="MODULE:OBJECT",
    help="Your linen module, or what makes a linen or nnx module; an MLP without it.",
)
@click.option(
    "--ood",
    metavar="NAME|FILE",
    help="Inputs of another kind: mnist, fashion-mnist, notmnist, or a table's file; shuffled "
    "pixels without it.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the files of mnist or fashion-mnist; downloaded without it.",
)
@click.option(
    "--train-size", type=click.IntRange(min=1), help="Training examples; 500 of digits, else all."
)
@click.option(
    "--label-noise", type=Rate(zero=True), default=0.0, help="Share of training labels made wrong."
)
@click.option(
    "--hidden", type=Hidden(), default=(256, 256), help="Units of the MLP's hidden layers."
)
@click.option("--rate", type=Rate(zero=False), default=0.5, help="Dropout rate of the MLP's units.")
@click.option(
    "--input-rate", type=Rate(zero=True), default=0.0, help="Dropout rate of the MLP's inputs."
)
@click.option(
    "--replicates",
    type=click.IntRange(min=2),
    default=DEFAULTS.replicates,
    help="Whole repetitions, from which intervals come.",
)
@click.option(
    "--ensemble-size",
    type=click.IntRange(min=2),
    default=DEFAULTS.ensemble_size,
    help="Plain networks of each replicate.",
)
@click.option(
    "--budget",
    type=click.IntRange(min=2),
    default=DEFAULTS.budget,
    help="Networks whose cost the methods of equal budget may have.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=2),
    default=DEFAULTS.num_samples,
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
@click.option("--controls/--no-controls", default=True, help="Train the methods of equal budget.")
@click.option("--theory/--no-theory", default=True, help="Test the claims of the theory.")
@click.option(
    "--sweep",
    multiple=True,
    type=Named(SWEEPS, several=True),
    help="Values to compare at, as in rate=0.1,0.5; repeat for a grid.",
)
@_margin_option
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=DEFAULTS.seed,
    help="Of all that is random.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results; one of its own in ./comparison without it.",
)
@click.pass_context
def main(
    context: click.Context,
    predictions: Path | None,
    margins: tuple[tuple[str, list[float]], ...],
    out: Path | None,
    **options: Any,
) -> None:
    """Runs the comparison and shows what it found."""
    if context.invoked_subcommand is not None:
        return
    console = Console(width=None if sys.stdout.isatty() else 80)
    given = {name: values[0] for name, values in margins}
    try:
        if predictions is not None:
            read = tables.load_predictions(predictions)
            comparison = evaluation.of_predictions(
                read, predictions.stem, options["replicates"], given, command_line()
            )
            folder = out or Path("comparison") / predictions.stem
        else:
            comparison, folder = train(options, out, given, console)
    except ERRORS as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"the results could not be written ({error}); what was is kept, and the same command "
            "goes on from there."
        ) from error
    show(comparison, folder, console)


@main.command("report")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_margin_option
def report_command(folder: Path, margins: tuple[tuple[str, list[float]], ...]) -> None:
    """Scores and draws everything in FOLDER again, without training."""
    console = Console(width=None if sys.stdout.isatty() else 80)
    try:
        run = Run.open(folder)
        comparison = evaluation.evaluate(run, {name: values[0] for name, values in margins})
    except ERRORS as error:
        raise click.ClickException(str(error)) from error
    show(comparison, folder, console)


def command_line() -> str:
    """The command that was given."""
    return shlex.join(["python", *sys.argv])


def show(comparison: Comparison, folder: Path, console: Console) -> None:
    """Prints what was found and writes it to the folder."""
    console.print(report.terminal(comparison))
    console.print(report.sentence(comparison), highlight=False, markup=False)
    try:
        written = report.write(comparison, folder)
    except OSError as error:
        raise click.ClickException(
            f"{folder} could not be written whole: {error.strerror}. The table above is complete."
        ) from error
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def train(
    options: dict[str, Any], out: Path | None, margins: dict[str, float], console: Console
) -> tuple[Comparison, Path]:
    """Trains and compares; the comparison, and the folder that it is in."""
    names = {"replicates", "ensemble_size", "budget", "num_samples", "epochs", "batch_size"}
    names |= {"learning_rate", "controls", "theory", "seed"}
    settings = Settings(**{name: options[name] for name in names})
    data = load_data(options)
    num_outputs = data.num_classes or 1
    if options["model"] is None:
        described = f"MLP {options['hidden']}, rate {options['rate']}"
        if options["input_rate"]:
            described += f", input rate {options['input_rate']}"
        made = partial(
            _mlp, options["hidden"], num_outputs, options["input_rate"], rate=options["rate"]
        )
        model = Model(made)
    else:
        context = click.get_current_context()
        for name in ("hidden", "rate", "input_rate"):
            if context.get_parameter_source(name) != ParameterSource.DEFAULT:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} is of the MLP that is taken without --model; make "
                    "the model as you want it, with functools.partial for instance."
                )
        described = options["model"]
        model = Model(load_object(described))
    sweep = dict(options["sweep"])
    if out is None:
        identity = about(settings, model, data, described, sweep)
        out = default_folder(identity)
    # Before hours of work, not after them.
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    comparison = with_progress(
        partial(
            run_comparison,
            settings,
            model,
            data,
            out,
            margins=margins,
            sweep=sweep,
            described=described,
            command=command_line(),
        ),
        console,
    )
    return comparison, out


def _mlp(
    hidden: tuple[int, ...],
    num_outputs: int,
    input_rate: float,
    *,
    rate: Any = 0.5,
    width_factor: float = 1.0,
) -> MLP:
    return MLP(hidden, num_outputs, rate, input_rate, width_factor)


def load_object(name: str) -> Any:
    """The object `module:object` names; modules of the working directory too."""
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ModelError(f"--model must be MODULE:OBJECT, such as my_models:MLP, got {name!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ModelError(f"--model {name}: {module_name} cannot be imported: {error}.") from error
    except AttributeError as error:
        raise ModelError(f"--model {name}: {module_name} has no {attribute}.") from error


def load_data(options: dict[str, Any]) -> Dataset:
    """The data set that the options name."""
    dataset = options["dataset"]
    shared = {name: options[name] for name in ("train_size", "label_noise", "seed")}
    if dataset in DATASETS:
        for name in ("target", "task", "test_file"):
            if options[name] is not None:
                option = name.replace("_", "-")
                raise DataError(f"--{option} is for tables, not for {dataset}.")
        return load(dataset, data_dir=options["data_dir"], ood=options["ood"], **shared)
    if options["data_dir"] is not None:
        raise DataError("--data-dir is for mnist and fashion-mnist.")
    return tables.load_table(
        Path(dataset),
        target=options["target"],
        task=options["task"],
        test_path=options["test_file"],
        ood_path=None if options["ood"] is None else Path(options["ood"]),
        **shared,
    )


def with_progress(work: Callable[..., Comparison], console: Console) -> Comparison:
    """Works with a bar that tells the time left or, where there is no terminal, with lines."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, tuple[Any, float, int]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total), time.monotonic(), done
            task, start, first = tasks[what]
            bars.update(task, completed=done)
            if not console.is_terminal and (done == total or done % -(-total // 4) == 0):
                line = f"{what}: {done}/{total}"
                if total > done > first:  # The clock starts when the first is done.
                    left = (time.monotonic() - start) * (total - done) / (done - first)
                    line += f", {left:.0f} s left"
                console.print(line, highlight=False)

        return work(progress=progress)


def run_command(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; an error is one line on the standard error."""
    try:
        main(arguments, standalone_mode=False)
    except click.ClickException as error:
        sys.stderr.write(f"error: {' '.join(error.format_message().split())}\n")
        return error.exit_code
    except click.Abort:
        sys.stderr.write("stopped; the same command goes on from here.\n")
        return 130
    return 0


if __name__ == "__main__":
    # Each core is a device, so that members train on all of them.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    sys.exit(run_command(sys.argv[1:]))
