"""The options of the command `jdrop`, and how it starts and ends.

What needs JAX at work is in `jdrop.study.command`, which is imported when the options are right.
"""

import dataclasses
import io
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
from click.core import ParameterSource

from jdrop.study.errors import UserError
from jdrop.study.processes import join_processes
from jdrop.study.reproduce import PROTOCOLS
from jdrop.study.settings import Settings

HELP = """How many independently trained networks is one dropout network worth?

Trains both and compares them. Without options it takes scikit-learn's digits, downloads nothing,
and needs one to three minutes. Give --dataset and --model for data and a model of your own, or
--predictions for networks that are trained already. A command that was stopped goes on when it is
given again. `jdrop report FOLDER` writes the report of a folder again without training. `jdrop
audit MODULE:OBJECT` lists what a model drops. `jdrop plan` works out what many members need on many
devices. `jdrop reproduce NAME` runs the experiment of a paper and sets its numbers beside ours.
`jdrop atlas` runs many studies, over data sets, sizes, widths, rates and wrong labels."""

ALLOWED_WITH_PREDICTIONS = ("predictions", "replicates", "margins", "groups", "out")
"""Options that have an effect beside --predictions."""

MLP_OPTIONS = ("hidden", "rate", "input_rate")


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which `click.FloatRange` lets pass, is refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the number, or fails with the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Hidden(click.ParamType):
    """Units of the hidden layers, such as 256,256."""

    name = "units"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Returns the units of each layer, or fails."""
        if isinstance(value, tuple):
            return value
        try:
            units = tuple(int(text) for text in str(value).split(","))
        except ValueError:
            units = ()
        if not units or min(units) < 1:
            self.fail(f"must be positive integers such as 256,256, got {value}.", param, ctx)
        return units


class Memory(click.ParamType):
    """A size of memory, such as 80GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the bytes, or fails."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", str(value))
        if match is None:
            self.fail(f"must be a size such as 80GiB or 500MB, got {value}.", param, ctx)
        number, unit, is_binary = match.groups()
        return float(number) * (1024 if is_binary else 1000) ** (1 + "KMGT".index(unit))


class Assignment(click.ParamType):
    """A name and its value, or several with `several`, such as nll=0.01 or rate=0.1,0.5."""

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.name = "name=numbers" if several else "name=number"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, list[int | float]]:
        """Returns the name, with underscores, and its values, or fails."""
        name, _, text = str(value).partition("=")
        try:
            numbers = [_number(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if not name or not numbers or (len(numbers) > 1 and not self.several):
            form = "NAME=NUMBER,NUMBER,..." if self.several else "NAME=NUMBER"
            self.fail(f"must be {form}, got {value}.", param, ctx)
        if not self.several and not 0 < numbers[0] < math.inf:
            self.fail(f"must be a number above 0, got {value}.", param, ctx)
        return name.replace("-", "_"), numbers


def _number(text: str) -> int | float:
    number = float(text)
    try:
        return int(text)
    except ValueError:
        return number


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `Settings`."""
    for field in reversed(dataclasses.fields(Settings)):
        name = field.name.replace("_", "-")
        bounds = field.metadata
        option_type: click.ParamType | None = None
        if field.type is bool:
            name = f"{name}/--no-{name}"
        elif field.type is int:
            option_type = click.IntRange(bounds["minimum"], bounds["maximum"])
        else:
            option_type = FiniteRange(bounds["above"], bounds["maximum"], min_open=True)
        add_option = click.option(
            f"--{name}", type=option_type, default=field.default, help=bounds["description"]
        )
        function = add_option(function)
    return function


margin_option = click.option(
    "--margin",
    "margins",
    multiple=True,
    type=Assignment(several=False),
    help="Largest difference in a score that counts as none, as in nll=0.02; repeat for others.",
)

existing_file = click.Path(path_type=Path, exists=True, dir_okay=False)
existing_folder = click.Path(path_type=Path, exists=True, file_okay=False)
results_folder = click.Path(path_type=Path, file_okay=False)


@click.group(
    invoke_without_command=True,
    context_settings={"show_default": True, "max_content_width": 100},
    help=HELP,
)
@click.option(
    "--dataset",
    default="digits",
    metavar="NAME|FILE|MODULE:OBJECT",
    help="digits, mnist, fashion-mnist; a file that ends in .npz, .csv, .tsv, .txt or .data; or "
    "your dictionary of the arrays that jdrop.compare takes, or a function that returns it.",
)
@click.option("--target", help="Column of a table to predict: its name or its index from 0.")
@click.option(
    "--task",
    type=click.Choice(["classification", "regression"]),
    help="What to learn from a table; by default its target tells.",
)
@click.option(
    "--test-file",
    type=existing_file,
    help="Table of test examples; by default a fifth of --dataset is held out.",
)
@click.option(
    "--groups",
    metavar="COLUMN|FILE",
    help="Which examples belong together, such as those of one patient: a column of a table, or a "
    "file with one label for each example; by default the forms of digits, and none of other "
    "data.",
)
@click.option(
    "--predictions",
    type=existing_file,
    help="An .npz to compare without training: `labels`, log-probabilities `plain` [member, "
    "example, class], and those of `dropout`, `monte_carlo` or others.",
)
@click.option(
    "--model",
    metavar="MODULE:OBJECT",
    help="Your linen module, or a function that makes a linen or nnx module; by default an MLP.",
)
@click.option(
    "--ood",
    metavar="NAME|FILE",
    help="Out-of-distribution inputs: mnist, fashion-mnist, notmnist, or a file; by default "
    "inputs with shuffled pixels.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the files of mnist, fashion-mnist or notmnist; by default they are "
    "downloaded.",
)
@click.option(
    "--train-size",
    type=click.IntRange(min=1),
    help="Training examples; by default 500 of digits, and all of other data.",
)
@click.option(
    "--label-noise",
    type=FiniteRange(0, 1, max_open=True),
    default=0.0,
    help="Share of training labels that are made wrong.",
)
@click.option(
    "--hidden", type=Hidden(), default=(256, 256), help="Units of the MLP's hidden layers."
)
@click.option(
    "--rate",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    help="Dropout rate of the MLP's hidden units.",
)
@click.option(
    "--input-rate",
    type=FiniteRange(0, 1, max_open=True),
    default=0.0,
    help="Dropout rate of the MLP's inputs.",
)
@settings_options
@click.option(
    "--sweep",
    multiple=True,
    type=Assignment(several=True),
    help="Values of rate, train-size, width-factor or label-noise to compare at, as in "
    "rate=0.1,0.5; repeat for a grid.",
)
@margin_option
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Write the losses and scores of every epoch for TensorBoard too, into the folder "
    "tensorboard of the results. Their file metrics.jsonl always holds them.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    help="Folder of the results; by default one in ./comparison, the same for the same command.",
)
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    help="Where process 0 meets the others, if several processes share the run through its folder; "
    "by default those that SLURM, Open MPI or Kubernetes has started.",
)
@click.option("--process-id", type=click.IntRange(min=0), help="Index of this process, from 0.")
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    help="How many processes share the run; 1 for a process that runs alone on a cluster.",
)
@click.pass_context
def compare_command(context: click.Context, /, **options: Any) -> None:
    """Compares, unless a subcommand was given."""
    given = [
        name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT
    ]
    if context.invoked_subcommand is not None:
        _refuse(given, f"is no option of `jdrop {context.invoked_subcommand}`; leave it out.")
        return
    if options["predictions"] is not None:
        without_effect = [name for name in given if name not in ALLOWED_WITH_PREDICTIONS]
        _refuse(without_effect, "has no effect beside --predictions, which trains nothing.")
    if options["model"] is not None:
        mlp_options = [name for name in given if name in MLP_OPTIONS]
        _refuse(
            mlp_options,
            "is for the MLP that is trained without --model; set it in the model, for instance "
            "with functools.partial.",
        )
    if options["out"] == "":
        raise click.UsageError("--out must name a folder, got an empty name.")
    options["margins"] = _margins(options["margins"])
    # Values that are given apart are swept together.
    sweep: dict[str, list[int | float]] = {}
    for name, values in options["sweep"]:
        sweep.setdefault(name, []).extend(values)
    options["sweep"] = sweep
    meeting = [options.pop(name) for name in ("coordinator", "process_id", "num_processes")]
    if options["predictions"] is None:
        options["processes"] = join_processes(*meeting)
    from jdrop.study import command

    command.run(options, context.obj)


@compare_command.command("report")
@click.argument("folder", type=existing_folder)
@margin_option
def report_command(folder: Path, margins: tuple[tuple[str, list[int | float]], ...]) -> None:
    """Scores FOLDER and writes its report again, without training."""
    from jdrop.study import command

    command.report_again(folder, _margins(margins))


@compare_command.command("audit")
@click.argument("model", metavar="MODULE:OBJECT")
@click.option(
    "--input-shape",
    type=Hidden(),
    required=True,
    help="Shape of a batch of inputs, such as 8,784.",
)
@click.option(
    "--input-dtype",
    type=click.Choice(["float32", "bfloat16", "int32"]),
    default="float32",
    help="Dtype of the inputs.",
)
def audit_command(model: str, input_shape: tuple[int, ...], input_dtype: str) -> None:
    """Lists what the model drops, and what is wrong with it; computes nothing."""
    from jdrop.study import command

    command.audit_model(model, input_shape, input_dtype)


PLAN_DATA_AND_MODEL = ("dataset", "target", "task", "test_file", "data_dir", "model", *MLP_OPTIONS)
"""Options of the comparison that say which member is planned for."""


@compare_command.command(
    "plan",
    params=[
        option
        for option in compare_command.params
        if option.name in (*PLAN_DATA_AND_MODEL, "train_size", "epochs", "batch_size")
    ],
)
@click.option("--members", type=click.IntRange(min=1), required=True, help="Networks to train.")
@click.option(
    "--devices", type=Hidden(), default=(8, 64, 512), help="Counts of devices, such as 8,64,512."
)
@click.option(
    "--device-memory", type=Memory(), required=True, help="Memory of a device, such as 80GiB."
)
@click.option(
    "--flops-per-second",
    type=FiniteRange(0, min_open=True),
    help="Floating-point operations per second that a device reaches in training, such as 1e14.",
)
@click.option(
    "--parameters",
    type=FiniteRange(1),
    help="Parameters of a model that is known by its size only, such as 1e9; needs --train-size.",
)
@click.option(
    "--activations",
    type=Memory(),
    help="With --parameters, the activations of a batch, such as 20GiB; by default none count.",
)
@click.option("--json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def plan_command(context: click.Context, /, **options: Any) -> None:
    """Works out what many members need on many devices; trains nothing.

    Compiles the training of one member of the model on the data.
    """
    given = [
        name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT
    ]
    if options["parameters"] is not None:
        data_or_model = [name for name in given if name in PLAN_DATA_AND_MODEL]
        _refuse(data_or_model, "has no effect beside --parameters, which reads no data.")
        if options["train_size"] is None:
            raise click.UsageError("--parameters needs --train-size, the training examples.")
    elif options["activations"] is not None:
        raise click.UsageError("--activations is for --parameters; of a model they are measured.")
    from jdrop.study import plan

    plan.print_plan(options)


@compare_command.command("reproduce")
@click.argument("name", type=click.Choice(list(PROTOCOLS)))
@click.option(
    "--data-dir",
    type=existing_folder,
    required=True,
    help="Folder with the data: the UCI tables lie in its folder uci, the digits in mnist.",
)
@click.option(
    "--splits",
    type=click.IntRange(min=1),
    help="Splits, or seeds, of each part; by default all of the protocol's.",
)
@click.option(
    "--fraction",
    type=FiniteRange(0, 1, min_open=True),
    default=1.0,
    help="Share of the paper's epochs, or updates, to train.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of all random numbers.")
@click.option(
    "--out",
    type=results_folder,
    help="Folder of the results; by default one in ./reproduction, the same for the same options.",
)
@click.pass_context
def reproduce_command(context: click.Context, /, **options: Any) -> None:
    """Runs the experiment of a paper, and sets its numbers beside ours."""
    from jdrop.study import command

    command.reproduce_paper(options, context.obj)


@compare_command.command("atlas")
@click.option(
    "--data-dir", type=existing_folder, help="Folder of the data; without it digits only."
)
@click.option("--studies", type=existing_folder, help="Folder of studies that are shown too.")
@click.option("--out", type=results_folder, default="atlas", help="Folder of the results.")
@click.pass_context
def atlas_command(context: click.Context, /, **options: Any) -> None:
    """Says what one dropout network is worth on many data sets, in many settings."""
    from jdrop.study import command

    command.draw_atlas(options, context.obj)


def _margins(assignments: Sequence[tuple[str, list[int | float]]]) -> dict[str, float]:
    """Margins by score, or an error if a score has two."""
    margins: dict[str, float] = {}
    for score, (margin,) in assignments:
        if score in margins:
            raise click.UsageError(f"--margin must name each score once, got {score} twice.")
        margins[score] = float(margin)
    return margins


def _refuse(names: Sequence[str], reason: str) -> None:
    """Raises if there is an option that cannot be given here."""
    if names:
        option = "margin" if names[0] == "margins" else names[0].replace("_", "-")
        raise click.UsageError(f"--{option} {reason}")


def run_command(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code; a mistake is one line on the standard error."""
    # The report holds it, and names of files that are not UTF-8 cannot be written there.
    command_line = shlex.join(["jdrop", *arguments]).encode(errors="replace").decode()
    try:
        compare_command(list(arguments), "jdrop", standalone_mode=False, obj=command_line)
    except (click.ClickException, UserError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        return error.exit_code if isinstance(error, click.ClickException) else 1
    except click.Abort as abort:
        stopped = str(abort.__cause__ or "") or "stopped"
        sys.stderr.write(f"{stopped}; the same command goes on from there.\n")
        return 143 if isinstance(abort.__cause__, _Terminated) else 130
    return 0


def _num_cores() -> int:
    """The cores that this process may use: a cluster may give it a few of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as batch systems do before they kill it."""


def _terminate(*_: object) -> None:
    raise _Terminated


def main() -> int:
    """Runs the command with the arguments of the shell."""
    # Each core is a device, so that members train on all of them. JAX must not be at work yet.
    jax.config.update("jax_num_cpu_devices", _num_cores())
    if sys.stdout is None:  # The shell closed it.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    signal.signal(signal.SIGTERM, _terminate)
    # A character that the terminal lacks must not lose the results.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return run_command(sys.argv[1:])
