"""The comparison from Python: a model and examples in, what was found out."""

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import ArrayLike

from jdrop.study import report
from jdrop.study.data import Dataset
from jdrop.study.evaluation import evaluate
from jdrop.study.methods import Model, Settings
from jdrop.study.results import Comparison
from jdrop.study.run import Run, fingerprint
from jdrop.study.runner import Runner
from jdrop.study.tables import from_arrays
from jdrop.study.training import Progress


def compare(
    model: Any,
    inputs: ArrayLike,
    labels: ArrayLike,
    test_inputs: ArrayLike,
    test_labels: ArrayLike,
    *,
    ood_inputs: ArrayLike | None = None,
    name: str = "your data",
    out: str | Path | None = None,
    margins: Mapping[str, float] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Comparison:
    """How many independently trained networks is one dropout network worth, on your data?

    Trains plain networks, dropout networks and, at equal budget, what else the same cost could
    buy; reads them in every way; and scores them with intervals over whole repetitions.

    Args:
        model: a linen module, or a class or function that makes a linen module or, from an
            argument `rngs`, an nnx one. It draws masks in dropout layers of jdrop or Flax. If the
            function also takes `width_factor`, small and wide networks are compared too, and if it
            takes `rate`, that can be swept. Outputs are logits `[batch, class]`, in regression
            `[batch]` or `[batch, 1]`.
        inputs: training examples, `[example, ...]`, scaled as the model wants them.
        labels: integers in [0, classes), or floats for regression, `[example]`.
        test_inputs: what is scored.
        test_labels: likewise.
        ood_inputs: inputs of another kind, to be told from the test inputs by their uncertainty.
        name: of the data, for the report.
        out: folder of the results: predictions, tables, figures, `report.html`. A run that was
            stopped goes on from there. Without it nothing is kept.
        margins: by score, the difference that is held to be none; see
            `jdrop.study.evaluation.evaluate`.
        sweep: by `rate`, `train_size`, `width_factor` or `label_noise`, values of which every
            combination is compared too.
        progress: `progress(what, done, total)`, called as the work goes on.
        **settings: see `jdrop.study.methods.Settings`: `replicates`, `ensemble_size`, `epochs`, ...

    Raises:
        ValueError: a model, examples, labels or settings that do not fit; the message says which.
        jdrop.study.training.DivergedError: networks whose predictions are not numbers.
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
        >>> found = jdrop.compare(
        ...     Net(), x[:40], y[:40], x[40:], y[40:], replicates=2, ensemble_size=3, budget=2,
        ...     num_samples=4, epochs=2, batch_size=10, controls=False, theory=False,
        ... )
        >>> found.method("dropout").points[0].worth["nll"].largest
        3
    """
    data = from_arrays(name, inputs, labels, test_inputs, test_labels, ood_inputs)
    unknown = set(settings) - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise ValueError(
            f"settings must be of {', '.join(f.name for f in dataclasses.fields(Settings))}, got "
            f"{', '.join(sorted(unknown))}."
        )
    chosen = Settings(**settings)
    for name, margin in (margins or {}).items():
        if not 0 < margin < math.inf:  # Said now, not after the training.
            raise ValueError(f"the margin of {name} must be a number above 0, got {margin}.")

    def in_folder(folder: Path) -> Comparison:
        return run_comparison(
            chosen,
            Model(model),
            data,
            folder,
            progress or (lambda what, done, total: None),
            margins=margins,
            sweep=sweep,
            described=repr(model),
            command=f"jdrop.compare({type(model).__name__}, ...)",
        )

    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return in_folder(Path(folder))
    comparison = in_folder(Path(out))
    report.write(comparison, Path(out))
    return comparison


def about(
    settings: Settings,
    model: Model,
    data: Dataset,
    described: str,
    sweep: Mapping[str, Sequence[float]] | None,
) -> dict[str, Any]:
    """What makes a run the same run: all that its numbers depend on, as plain values."""
    inputs = jax.ShapeDtypeStruct((2, *data.train_inputs.shape[1:]), data.train_inputs.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.dropout.init, key, inputs)
    program = jax.jit(model.dropout.apply_fn).lower(variables, inputs, key).as_text()
    return {
        "dataset": data.name,
        "model": described,
        "program": hashlib.sha256(program.encode()).hexdigest()[:16],
        "examples": fingerprint(data),
        **dataclasses.asdict(settings),
        "sweep": {name: list(values) for name, values in (sweep or {}).items()},
    }


def default_folder(identity: Mapping[str, Any]) -> Path:
    """A folder of its own for every different run: `comparison/` and a name."""
    digest = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:8]
    return Path("comparison") / f"{identity['dataset']}-{digest}"


def run_comparison(
    settings: Settings,
    model: Model,
    data: Dataset,
    folder: Path,
    progress: Progress,
    *,
    margins: Mapping[str, float] | None,
    sweep: Mapping[str, Sequence[float]] | None,
    described: str,
    command: str,
) -> Comparison:
    """Trains what the folder does not hold yet, and scores all that it holds.

    Raises:
        jdrop.study.run.RunError: the folder holds another run.
    """
    run = Run(folder, about(settings, model, data, described, sweep))
    Runner(run, settings, model, data, progress, sweep or {}, command)()
    return evaluate(run, margins)
