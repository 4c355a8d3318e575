"""What the command `jdrop` does with its options: loads, trains, shows the results."""

import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

from jdrop.auditing import audit
from jdrop.study import evaluation, report
from jdrop.study.atlas import command as atlas
from jdrop.study.comparison import Experiment
from jdrop.study.data import (
    DATASETS,
    DataError,
    Dataset,
    Progress,
    from_arrays,
    load,
    load_predictions,
    load_table,
    no_progress,
    printable,
    subset,
    with_label_noise,
)
from jdrop.study.models import MLP, Model, ModelError
from jdrop.study.progress import with_progress
from jdrop.study.reproduce import command as reproduce
from jdrop.study.results import Comparison
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings


def run(options: Mapping[str, Any], command_line: str) -> None:
    """Compares networks that it trains, or whose predictions are given.

    Args:
        options: by name, see `jdrop.study.cli`.
        command_line: what the user typed, for the report.

    Raises:
        UserError: options that do not fit the data, the model or each other.
        click.ClickException: a file cannot be read or written.
    """
    if options["predictions"] is not None:
        console = _console()
        show(*compare_predictions(options, command_line, console), console)
        return
    # Several processes often share a terminal.
    console = _console(quiet=not options["processes"].is_first)
    results = train(options, command_line, console)
    if results is not None:
        show(*results, console)


def report_again(folder: Path, margins: Mapping[str, float]) -> None:
    """Scores a folder and writes its report again.

    Raises:
        UserError: the folder holds no complete run, or a margin is of no score.
        click.ClickException: a file cannot be read or written.
    """
    with _file_errors(f"{folder} could not be read"):
        comparison = evaluation.evaluate(RunFolder.open(folder), margins)
    show(comparison, folder, _console())


def audit_model(name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Prints the audit of a model.

    Raises:
        UserError: the model cannot be made, or takes no inputs of this shape and dtype.
    """
    network = Model(load_object(name)).network()
    try:
        audited = audit(network, jax.ShapeDtypeStruct(shape, dtype))
    except Exception as error:  # Whatever a user's module may raise.
        raise ModelError(
            f"{name} cannot be traced with {dtype} inputs of shape {shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    print(audited)


def reproduce_paper(options: Mapping[str, Any], command_line: str) -> None:
    """Runs the experiment of a paper and prints the path of its page.

    Args:
        options: by name, see `jdrop.study.cli`.
        command_line: what the user typed, for the report.

    Raises:
        UserError: data or a folder that does not fit.
        click.ClickException: a file cannot be read or written.
    """
    console = _console()
    names = [field.name for field in dataclasses.fields(reproduce.Options)]
    chosen = reproduce.Options(**{name: options[name] for name in names})
    advice = "; complete parts are kept, and the same command goes on from there"
    with _file_errors("the files could not be read or written", advice):
        page = reproduce.run(options["name"], chosen, options["out"], command_line, console)
    _say(console, str(page))


def draw_atlas(options: Mapping[str, Any], command_line: str) -> None:
    """Runs the studies of the atlas, and prints the path of its page.

    Args:
        options: by name, see `jdrop.study.cli`.
        command_line: what the user typed, for the report.

    Raises:
        UserError: studies that failed, or another atlas in the folder.
        click.ClickException: a file cannot be read or written.
    """
    advice = "; complete studies are kept, and the same command goes on from there"
    with _file_errors("the files could not be read or written", advice):
        atlas.run(**options, train=train, typed=command_line, console=_console())


def compare_predictions(
    options: Mapping[str, Any], command_line: str, console: Console
) -> tuple[Comparison, Path]:
    """Compares predictions of networks that are trained already, and chooses the folder."""
    path = options["predictions"]
    folder = _path(options["out"]) or Path("comparison") / path.stem
    predictions = load_predictions(path, _path(options["groups"]))
    _say(console, f"{path}: predictions, compared without training; folder: {folder}")
    comparison = evaluation.of_predictions(
        predictions, printable(path.stem), options["replicates"], options["margins"], command_line
    )
    return comparison, folder


def train(
    options: Mapping[str, Any], command_line: str, console: Console
) -> tuple[Comparison, Path] | None:
    """Trains and compares; returns the results and their folder, in process 0 alone."""
    return with_progress(partial(_train, options, command_line, console), console)


def _train(
    options: Mapping[str, Any], command_line: str, console: Console, progress: Progress
) -> tuple[Comparison, Path] | None:
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    with _file_errors("the data could not be read"):
        data = load_data(options, progress)
    prepare = partial(
        Experiment,
        settings,
        data=data,
        folder=_path(options["out"]),
        margins=options["margins"],
        sweep=options["sweep"],
        command=command_line,
        progress=progress,
        processes=options["processes"],
    )
    advice = "; complete parts are kept, and the same command goes on from there"
    with _file_errors("the results could not be written", advice):
        if options["model"] is None:
            name = f"MLP {options['hidden']}, rate {options['rate']}"
            if options["input_rate"]:
                name += f", input rate {options['input_rate']}"
            experiment = prepare(model=mlp_model(options, data), model_name=name)
        else:
            name = options["model"]
            try:
                experiment = prepare(model=Model(load_object(name)), model_name=name)
            except ModelError as error:
                raise ModelError(f"--model {name}: {error}") from error
        _say(
            console,
            f"{data.name}: {len(data.train_labels):,} training examples, "
            f"{len(data.test_labels):,} test examples; model: {name}",
        )
        _say(
            console,
            f"{settings.replicates} replicates of {settings.ensemble_size} plain and "
            f"{settings.budget} dropout networks, {settings.epochs} epochs; folder: "
            f"{experiment.folder}",
        )
        if not options["processes"].is_first:
            experiment.train(progress, tensorboard=options["tensorboard"])
            return None
        comparison = experiment.run(progress, tensorboard=options["tensorboard"])
        return comparison, experiment.folder


def load_data(options: Mapping[str, Any], progress: Progress = no_progress) -> Dataset:
    """Loads the data set that the options name.

    Args:
        options: by name, see `jdrop.study.cli`.
        progress: is called as inputs are read from a source.

    Raises:
        DataError: options or files that do not fit.
    """
    dataset = options["dataset"]
    shared = {name: options[name] for name in ("train_size", "label_noise", "seed")}
    if dataset in DATASETS:
        for name in ("target", "task", "test_file"):
            if options[name] is not None:
                option = name.replace("_", "-")
                raise DataError(f"--{option} is for tables, not for {dataset}.")
        if dataset == "digits" and options["data_dir"] is not None and options["ood"] is None:
            raise DataError("--data-dir has no effect on digits, which are part of scikit-learn.")
        return load(
            dataset,
            data_dir=options["data_dir"],
            ood=options["ood"],
            groups=_path(options["groups"]),
            **shared,
        )
    if options["data_dir"] is not None:
        raise DataError("--data-dir is for mnist and fashion-mnist.")
    if re.fullmatch(r"[\w.]+:\w+", dataset) and not Path(dataset).exists():
        for name in ("target", "task", "test_file", "ood", "groups"):
            if options[name] is not None:
                option = name.replace("_", "-")
                raise DataError(f"--{option} is for files, not for the object {dataset}.")
        return load_data_object(dataset, **shared, progress=progress)
    return load_table(
        Path(dataset),
        target=options["target"],
        task=options["task"],
        test_path=options["test_file"],
        ood_path=_path(options["ood"]),
        groups=options["groups"],
        as_features=options["model"] is None,
        **shared,
    )


DATA_ARGUMENTS = (
    "inputs",
    "labels",
    "test_inputs",
    "test_labels",
    "ood_inputs",
    "groups",
    "test_groups",
)
"""What a data object may hold: the arrays of `jdrop.compare`."""


def load_data_object(
    name: str,
    *,
    train_size: int | None,
    label_noise: float,
    seed: int,
    progress: Progress = no_progress,
) -> Dataset:
    """Imports a data set `module:object`.

    The object is a dictionary of the arrays and sources that `jdrop.compare` takes, by the names of
    its arguments; a tuple of the first four; or a function without arguments that returns one of
    them.

    Raises:
        DataError: the object is none of these, or its arrays do not fit.
    """
    arrays = load_object(name)
    if callable(arrays):
        arrays = arrays()
    if isinstance(arrays, tuple):
        arrays = dict(zip(DATA_ARGUMENTS, arrays, strict=False)) if len(arrays) == 4 else None
    if not isinstance(arrays, Mapping) or not {*DATA_ARGUMENTS[:4]} <= {*arrays} <= {
        *DATA_ARGUMENTS
    }:
        raise DataError(
            f"{name} (--dataset) must be a dictionary with {', '.join(DATA_ARGUMENTS[:4])}, and "
            f"maybe {', '.join(DATA_ARGUMENTS[4:])}; a tuple of the first four; or a function "
            "without arguments that returns one of them."
        )
    data = from_arrays(name.replace(":", "."), **arrays, progress=progress)
    if train_size is not None:
        data = data.train_on(subset(data, train_size, seed))
    return with_label_noise(data, label_noise, seed)


def mlp_model(options: Mapping[str, Any], data: Dataset) -> Model:
    """The MLP that is trained without --model."""

    def make_mlp(*, rate: Any = options["rate"], width_factor: float = 1.0) -> MLP:
        num_outputs = data.num_classes or 1
        return MLP(options["hidden"], num_outputs, rate, options["input_rate"], width_factor)

    return Model(make_mlp)


def load_object(name: str) -> Any:
    """Imports an object by its name `module:object`, from the current folder too.

    Raises:
        ModelError: the module cannot be imported, or has no such object.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ModelError(f"must be MODULE:OBJECT, such as my_models:MLP, got {name!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # Whatever a user's module may raise.
        raise ModelError(
            f"{module_name} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not hasattr(module, attribute):
        raise ModelError(f"{module_name} has no {attribute}.")
    return getattr(module, attribute)


def show(comparison: Comparison, folder: Path, console: Console) -> None:
    """Writes the report, prints the results, and ends with the path of the report.

    Raises:
        click.ClickException: the report cannot be written; the results are printed all the same.
    """
    failure: OSError | None = None
    try:
        report.write(comparison, folder)
    except OSError as error:
        failure = error
    console.print(report.terminal(comparison))
    first, *others = report.answer(comparison)
    for text in (first, *(f"- {item}" for item in (*others, *report.cautions(comparison)))):
        console.print(text, highlight=False, markup=False)
    if failure is not None:
        raise click.ClickException(
            f"{folder} could not be written whole: {failure.strerror}. The table above is complete."
        ) from failure
    _say(console, str(folder / "report.html"))


@contextlib.contextmanager
def _file_errors(failure: str, advice: str = "") -> Iterator[None]:
    """Turns an error of the file system into one line: the failure, its cause, and the advice."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{failure} ({error}){advice}.") from error


def _console(*, quiet: bool = False) -> Console:
    return Console(width=None if sys.stdout.isatty() else 80, quiet=quiet)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _say(console: Console, line: str) -> None:
    """Prints a line that no terminal breaks, so that its path can be copied."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
