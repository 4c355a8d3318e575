"""`compare`, and the one place where a comparison gets its folder and its identity."""

import contextlib
import dataclasses
import hashlib
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console

from jdrop.memory import machine_memory
from jdrop.network import Network
from jdrop.study import report
from jdrop.study.data import (
    Dataset,
    Progress,
    fingerprint,
    from_arrays,
    labels_of_tokens,
    no_progress,
    shapes_of,
)
from jdrop.study.data.streams import with_length
from jdrop.study.errors import UserError
from jdrop.study.evaluation import check_enough_are_left, evaluate
from jdrop.study.metric_streams import open_streams
from jdrop.study.models import Model, check_model
from jdrop.study.processes import Processes, initialised_processes
from jdrop.study.progress import with_progress
from jdrop.study.results import Comparison
from jdrop.study.run_folder import RunFolder
from jdrop.study.runner import run_parts
from jdrop.study.scores import CURVE_SCORES
from jdrop.study.settings import Settings, checked_sweep
from jdrop.study.sweeps import check_sweep


def compare(
    model: Any,
    inputs: Any,
    labels: ArrayLike,
    test_inputs: Any,
    test_labels: ArrayLike,
    *,
    ood_inputs: Any = None,
    groups: ArrayLike | Sequence[int] | Sequence[str] | None = None,
    test_groups: ArrayLike | Sequence[int] | Sequence[str] | None = None,
    name: str = "your data",
    out: str | Path | None = None,
    margins: Mapping[str, float] | None = None,
    sweep: Mapping[str, Iterable[int | float]] | None = None,
    progress: Progress | bool = True,
    tensorboard: bool = False,
    **settings: Any,
) -> Comparison:
    """How many independently trained networks is one dropout network worth, on your data?

    Trains plain networks, dropout networks, and control methods of equal cost. Scores all of them,
    with intervals over replicates and test examples.

    Args:
        model: a linen module; a network that `jdrop.linen.as_network` or `jdrop.nnx.as_network`
            has made, with `call=` and `outputs=` where the module needs them; or a class or
            function that makes one of them or, from an argument `rngs`, an nnx module. It drops by
            layers of jdrop or Flax alone. If the function takes `width_factor`, narrow and wide
            networks are compared too; if it takes `rate`, the rate can be swept. Outputs are logits
            `[batch, class]`, in regression `[batch]` or `[batch, 1]`, with labels per token
            `[batch, length, class]`.
        inputs: training examples, `[example, ...]`, scaled as the model needs them, or a pytree of
            arrays `[example, ...]`, such as a dictionary. Floats and uint8 become float32, other
            integers int32. Data larger than the memory come from a source: a memory-mapped array,
            or any object with `len(source)` and `source[index]`, the inputs of one example.
        labels: integers in [0, classes), or floats for regression, `[example]`; or integers per
            token `[example, length]`, where a number below 0, such as -1, marks positions that are
            neither trained on nor scored.
        test_inputs: test examples, as `inputs`.
        test_labels: their labels, as `labels`.
        ood_inputs: out-of-distribution inputs, as `inputs`; by default test inputs with shuffled
            features, if the inputs are one array of floats. None with labels per token.
        groups: the group of each training example, such as its patient: integers or text
            `[example]`.
        test_groups: the group of each test example, as `groups`. Intervals and tests then resample
            whole groups. By default the examples are taken as independent, but not the tokens of
            an example.
        name: of the data, for the report.
        out: folder of the results: predictions, tables, figures, `report.html`. A run that was
            stopped goes on from there. By default nothing is kept. After
            `jax.distributed.initialize` the processes share the training; they must give the same
            `out`, which all of them see.
        margins: by score, the largest difference that counts as none; see
            `jdrop.study.evaluation.evaluate`.
        sweep: by `rate`, `train_size`, `width_factor` or `label_noise`, a list of values. Every
            combination is compared too.
        progress: True shows on the standard error how far the work is and how long it still takes,
            False shows nothing. A function is called as `progress(what, done, total)` instead.
        tensorboard: whether to write the losses and scores of every epoch for TensorBoard too, into
            the folder `tensorboard` in `out`. The file `metrics.jsonl` in `out` always holds them.
        **settings: fields of `jdrop.study.Settings`: `replicates`, `ensemble_size`, `epochs`, ...

    Returns:
        All scores; `report.html` in `out` shows them.

    Raises:
        UserError: a model, examples, labels or settings that do not fit, or networks that diverge.
            It is a ValueError; the message says what to change.
        OSError: `out` cannot be written.

    Example:
        >>> import flax.linen as nn, numpy as np, jdrop, jdrop.linen
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.relu(nn.Dense(8)(x))
        ...         x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        ...         return nn.Dense(2)(x)
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(60, 3)).astype("float32")
        >>> y = (x.sum(1) > 0).astype("int32")
        >>> comparison = jdrop.compare(
        ...     Net(), x[:40], y[:40], x[40:], y[40:], replicates=2, ensemble_size=3, budget=2,
        ...     num_samples=4, epochs=2, batch_size=10, controls=False, theory=False,
        ... )
        >>> comparison.method("dropout").points[0].worth["nll"].largest
        3
    """
    arrays = (inputs, labels, test_inputs, test_labels, ood_inputs, groups, test_groups)
    processes = initialised_processes()
    if out is None and processes.count > 1:
        raise UserError(
            f"out must name a folder that all {processes.count} processes see, got None: they "
            "share their work through it."
        )
    if tensorboard and out is None:
        raise UserError("tensorboard=True needs `out`, the folder that keeps the event files.")
    checked_settings, checked_model = Settings.from_mapping(settings), Model(model)

    def run_in(folder: Path, progress: Progress) -> Comparison:
        experiment = Experiment(
            checked_settings,
            checked_model,
            from_arrays(name, *arrays, progress=progress),
            folder=folder,
            model_name=name_of(model),
            margins=margins,
            sweep=sweep,
            command=f"jdrop.compare({name_of(model)}, ...)",
            progress=progress,
            processes=processes,
        )
        return experiment.run(progress, tensorboard=tensorboard)

    def run(folder: Path) -> Comparison:
        if progress is True and processes.is_first:
            return with_progress(partial(run_in, folder), Console(stderr=True))
        return run_in(folder, no_progress if isinstance(progress, bool) else progress)

    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(Path(folder))
    comparison = run(Path(out))
    if processes.is_first:
        report.write(comparison, Path(out))
    return comparison


class Experiment:
    """A comparison whose arguments are checked and whose folder is open, ready to train.

    Args:
        settings: how many networks are trained, and how.
        model: the architecture.
        data: the examples.
        folder: of the results; by default a folder in `./comparison`, another for each identity.
        model_name: for people; part of the identity.
        margins: see `compare`.
        sweep: see `compare`.
        command: what the user called, for the report.
        progress: is called as streams are read.
        processes: that share the run; by default this one alone.

    Raises:
        UserError: arguments that do not fit each other, or a folder that holds another run.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        data: Dataset,
        *,
        folder: Path | None,
        model_name: str,
        margins: Mapping[str, float] | None,
        sweep: Mapping[str, Iterable[int | float]] | None,
        command: str,
        progress: Progress = no_progress,
        processes: Processes | None = None,
    ) -> None:
        self._settings, self._model, self._command = settings, model, command
        self._margins = checked_margins(margins, data)
        self._sweep = checked_sweep(sweep)
        if "label_noise" in self._sweep:
            _check_labels_can_be_swept(data)
        if len(data.test_labels) < 2:
            raise UserError(
                f"there must be at least 2 test examples, since calibration fits on one half and "
                f"scores the other, got {len(data.test_labels)}; give more, or train on fewer."
            )
        check_sweep(self._sweep, model, data)
        self._data = data = replace(data, num_classes=check_model(model, data))
        _check_memory(settings, data)
        _check_networks_fit(settings, model, data, self._sweep)
        config = run_config(settings, model, data, model_name, self._sweep, progress)
        self.folder = default_folder(config) if folder is None else folder
        self._run_folder = RunFolder(self.folder, config, processes)
        tempfile.TemporaryFile(dir=self.folder).close()  # Fails now, not after the training.

    def run(self, progress: Progress, *, tensorboard: bool = False) -> Comparison:
        """Trains what the folder does not hold yet, and scores all that it holds.

        Args:
            progress: is called as the work goes on; a `Display` shows losses too.
            tensorboard: see `compare`.

        Raises: as `train` does.
        """
        self.train(progress, tensorboard=tensorboard)
        progress("scoring", 0, 1)
        comparison = evaluate(self._run_folder, self._margins)
        progress("scoring", 1, 1)
        return comparison

    def train(self, progress: Progress, *, tensorboard: bool = False) -> None:
        """Trains what the folder does not hold yet; process 0 also predicts, and stores the parts.

        The other processes wait for the last part. If networks have diverged so that nothing can be
        compared, each process raises the same error.

        Args:
            progress: see `run`.
            tensorboard: see `compare`.

        Raises:
            UserError: networks that diverge; another run in the folder; a process of the run has
                ended early; no tensorboardX.
            OSError: the folder cannot be written.
            KeyboardInterrupt: the run was stopped; the message says what the folder holds.
        """
        process = self._run_folder.processes.index
        metrics = self.folder / (f"metrics-{process}.jsonl" if process else "metrics.jsonl")
        with (
            self._run_folder.locked(),
            open_streams(metrics, progress, tensorboard=tensorboard) as metric_streams,
        ):
            try:
                run_parts(
                    self._run_folder,
                    self._settings,
                    self._model,
                    self._data,
                    sweep=self._sweep,
                    progress=progress,
                    metric_streams=metric_streams,
                    command=self._command,
                )
            except KeyboardInterrupt as stop:
                raise type(stop)(
                    f"stopped; {self.folder} keeps what is done "
                    f"({self._run_folder.describe_progress()})"
                ) from stop
        if process:  # Process 0 meets the same error when it evaluates.
            check_enough_are_left(self._run_folder)


def checked_margins(margins: Mapping[str, float] | None, data: Dataset) -> dict[str, float]:
    """Converts margins to Python numbers.

    Raises:
        UserError: a name that is no score of the task, or a margin that is not above 0.
    """
    task = "regression" if data.is_regression else "classification"
    if not isinstance(margins, Mapping | None):
        raise UserError(
            f"margins must be a dict such as {{'nll': 0.02}}, got {type(margins).__name__}."
        )
    checked = {}
    for score, margin in (margins or {}).items():
        if score not in CURVE_SCORES[task]:
            raise UserError(
                f"margins must be of {', '.join(CURVE_SCORES[task])}, the scores of a {task}, got "
                f"{score}."
            )
        try:
            checked[score] = float(margin)
        except (OverflowError, TypeError, ValueError):
            checked[score] = math.nan
        if not 0 < checked[score] < math.inf:
            raise UserError(f"the margin of {score} must be a number above 0, got {margin!r}.")
    return checked


def _check_labels_can_be_swept(data: Dataset) -> None:
    """Raises if the share of wrong labels cannot be swept."""
    if data.is_regression:
        raise UserError("label_noise can be swept in classification only; sweep something else.")
    if data.is_per_token:
        raise UserError(
            "label_noise can be swept with one label per example only; sweep something else."
        )
    if data.label_noise:
        raise UserError(
            f"label_noise cannot be swept where {data.label_noise:.0%} of the labels are made "
            "wrong already; leave one of the two out."
        )


def _check_memory(settings: Settings, data: Dataset) -> None:
    """Raises if the predictions of one method do not fit in the memory of the machine."""
    num_test, num_train = (
        len(labels_of_tokens(labels)) for labels in (data.test_labels, data.train_labels)
    )
    # Cross-validation predicts the training examples.
    largest = max(
        max(settings.num_samples, settings.ensemble_size) * num_test,
        settings.ensemble_size * num_train,
    )
    num_bytes = 4 * settings.replicates * largest * (data.num_classes or 1)
    memory = machine_memory()
    if 2 * num_bytes > memory:  # Each is copied at least once.
        raise UserError(
            f"the predictions of one method take {num_bytes / 1e9:.1f} GB, twice that is more "
            f"than the {memory / 1e9:.1f} GB of this machine: {settings.replicates} replicates of "
            f"{settings.num_samples} masks or {settings.ensemble_size} networks, for {num_test:,} "
            f"test and {num_train:,} training labels of {data.num_classes or 1:,} classes. Give "
            "fewer examples, or lower num_samples and ensemble_size."
        )


def _check_networks_fit(
    settings: Settings, model: Model, data: Dataset, sweep: Mapping[str, Sequence[float]]
) -> None:
    """Raises if the networks that train together do not fit in the memory of the machine."""
    example = with_length(shapes_of(data.train_inputs), 1)
    num_parameters = model.num_parameters(example)
    for width in sweep.get("width_factor", ()):
        at_width = model.num_parameters(example, width_factor=width)
        num_parameters = max(num_parameters, at_width)
    count = settings.replicates * settings.ensemble_size
    num_bytes = 3 * 4 * count * num_parameters  # Adam keeps two moments of each parameter.
    memory = machine_memory()
    if num_bytes > memory:
        raise UserError(
            f"{count} networks of {num_parameters:,} parameters take {num_bytes / 1e9:,.1f} GB in "
            f"training, more than the {memory / 1e9:,.1f} GB of this machine; take narrower "
            "networks, or lower replicates and ensemble_size."
        )


def run_config(
    settings: Settings,
    model: Model,
    data: Dataset,
    model_name: str,
    sweep: Mapping[str, Sequence[float]],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """All that the results of a run depend on, as plain values: its identity."""
    return {
        "dataset": data.name,
        "model": model_name,
        "program": hash_program(model, data),
        "examples": fingerprint(data, progress),
        "target_mean": data.target_mean,
        "target_scale": data.target_scale,
        **dataclasses.asdict(settings),
        "sweep": {parameter: list(values) for parameter, values in sweep.items()},
    }


def hash_program(model: Model, data: Dataset) -> str:
    """Hashes what the networks compute: initialisation, training pass, and prediction."""

    def all_passes(network: Network, key: Array, inputs: Any) -> Any:
        variables = network.init(jax.random.clone(key), inputs)
        predictions = [network(variables, inputs, None)]
        predictions.append(network(variables, inputs, jax.random.clone(key)))
        trained = network.apply_train(variables, inputs, jax.random.clone(key))
        return variables, predictions, trained

    def all_networks(key: Array, inputs: Any) -> Any:
        results = [all_passes(model.dropout, key, inputs)]
        for parameter in sorted(model.changeable):
            # What the model makes of its parameters counts too. A model that fails at this value
            # may still be fine at the values that the comparison takes.
            with contextlib.suppress(Exception):
                changes: dict[str, Any] = {parameter: 0.5}
                results.append(all_passes(model.network(**changes), key, inputs))
        return results

    inputs = with_length(shapes_of(data.train_inputs), 2)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.jit(all_networks).lower(key, inputs).as_text()
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def default_folder(config: Mapping[str, Any]) -> Path:
    """The folder of a run in `./comparison`: other configurations have other folders."""
    digest = hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()[:8]
    return Path("comparison") / f"{config['dataset']}-{digest}"


def name_of(model: Any) -> str:
    """A name of a model that is the same in every process: without addresses in memory.

    Example:
        >>> import functools
        >>> name_of(functools.partial(compare, name="digits"))
        "functools.partial(jdrop.study.comparison.compare, name='digits')"
    """
    if isinstance(model, partial):
        arguments = [*map(name_of, model.args)]
        arguments += [f"{name}={name_of(value)}" for name, value in model.keywords.items()]
        return f"functools.partial({', '.join([name_of(model.func), *arguments])})"
    if isinstance(model, Network):  # Its functions have no names of their own.
        return "jdrop.network.Network"
    if callable(model) and hasattr(model, "__qualname__"):
        return f"{model.__module__}.{model.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))
