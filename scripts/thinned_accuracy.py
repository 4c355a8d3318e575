"""What do coarser masks cost in accuracy, and what do they save in time?

Trains the same networks, from the same weights and on the same batches, without dropout, with a
mask for each example, and as thinned networks: one mask for a group or for the whole batch, of any
units or of blocks, shuffled at the beginning of each epoch or not. Prints test error and NLL with
95 % intervals over seeds, their differences from a mask per example after as many epochs and after
the same time, seed by seed, the time of an epoch and, where asked, the time to a test error; draws
both against time. Stopped, the same command goes on where it was.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jdrop.linen
from jdrop.metrics import error, nll
from jdrop.network import Network, network_log_probs
from jdrop.statistics import Interval, mean_interval
from jdrop.study.data import Dataset, load
from jdrop.study.methods import MLP
from jdrop.thinned import thin
from jdrop.train import TrainState, fit

FINE = "a mask per example"

NUM_LAST = 5
"""Epochs over which scores after the same time are averaged, since single ones go up and down."""

COLOURS = {
    "no dropout": "#0072B2",
    FINE: "#D55E00",
    "one mask, any units": "#8C8C8C",
    "blocks of 16, fixed": "#CC79A7",
    "blocks of 16, shuffled": "#009E73",
    "blocks of 64, shuffled": "#E69F00",
}


def variants(data: Dataset, about: dict[str, Any]) -> dict[str, Network]:
    """What is compared, by name."""
    hidden, rate = [int(units) for units in about["hidden"].split(",")], about["rate"]
    num_groups = about["batch_size"] // about["group_size"]
    inputs, num_classes = jnp.asarray(data.train_inputs[:2]), data.num_classes
    assert num_classes is not None
    masked = jdrop.linen.as_network(MLP(tuple(hidden), num_classes, rate))
    return {
        "no dropout": jdrop.linen.as_network(MLP(tuple(hidden), num_classes, 0.0)),
        FINE: masked,
        f"a mask per {about['group_size']} examples": thin(
            masked, inputs, block_size=1, num_groups=num_groups
        ),
        "one mask, any units": thin(masked, inputs, block_size=1),
        "blocks of 16, fixed": thin(masked, inputs, block_size=16, shuffle=False),
        "blocks of 16, shuffled": thin(masked, inputs, block_size=16),
        "blocks of 64, shuffled": thin(masked, inputs, block_size=64),
    }


class Study:
    """Networks in training, one seed and one variant at a time, and a file of what came out.

    Args:
        path: the file.
        about: what is trained; a file of something else is not gone on with.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.runs: dict[str, dict[str, list[float]]] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["about"] != about:
                raise click.ClickException(
                    f"{path} holds a study of something else, {kept['about']}; give another --out."
                )
            self.runs = kept["runs"]

    def keep(self, name: str, run: dict[str, list[float]]) -> None:
        """Adds a run; a file that is cut short by a kill is never in the place of a whole one."""
        self.runs[name] = run
        part = self.path.with_suffix(".part")
        content = {"about": self.about, "runs": self.runs}
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(self.path)

    def of(self, variant: str, what: str) -> list[list[float]]:
        """By seed, what was measured after each epoch."""
        return [
            self.runs[f"{variant}/{seed}"][what]
            for seed in range(self.about["seeds"])
            if f"{variant}/{seed}" in self.runs
        ]


@partial(jax.jit, static_argnames="network")
def scores(network: Network, variables: Any, inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Test error and NLL."""
    log_probs = network_log_probs(None, network, variables, inputs)
    return error(log_probs, labels), nll(log_probs, labels)


def train_one(
    network: Network, data: Dataset, about: dict[str, Any], seed: int
) -> dict[str, list[float]]:
    """Trains a network, with its test scores and the seconds of each epoch."""
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    test_inputs, test_labels = jnp.asarray(data.test_inputs), jnp.asarray(data.test_labels)
    variables = network.init(init_key, inputs[:1])
    state = TrainState.create(network, variables, optax.adam(about["learning_rate"]))

    run: dict[str, list[float]] = {"seconds": [], "error": [], "nll": []}
    for _ in range(about["epochs"]):
        start = time.perf_counter()
        state, _ = fit(
            jax.random.clone(fit_key),
            state,
            inputs,
            labels,
            num_epochs=1,
            batch_size=about["batch_size"],
        )
        jax.block_until_ready(state.step)
        run["seconds"].append(round(time.perf_counter() - start, 6))
        for name, value in zip(
            ("error", "nll"),
            scores(network, state.variables, test_inputs, test_labels),
            strict=True,
        ):
            run[name].append(round(float(value), 6))
    return run


def shown(interval: Interval, scale: float, digits: int, sign: str = "") -> str:
    """Mean and half the width of the interval."""
    half = math.nan if interval.high is None else scale * (interval.high - interval.mean)
    return f"{scale * interval.mean:{sign}.{digits}f} ± {half:.{digits}f}"


def epoch_time(study: Study, name: str) -> float:
    """The median time of an epoch, in epochs without dropout."""
    of_one, of_plain = (
        statistics.median(np.concatenate(study.of(variant, "seconds")).tolist())
        for variant in (name, "no dropout")
    )
    return of_one / of_plain


def after_the_same_time(study: Study, name: str, what: str) -> Interval | None:
    """The difference from a mask per example after the same time, mean of the last epochs.

    None where a mask per example was not trained for so long.
    """
    values, fine = np.array(study.of(name, what)), np.array(study.of(FINE, what))
    epochs = np.arange(1, values.shape[1] + 1)
    times, fine_times = epochs * epoch_time(study, name), epochs * epoch_time(study, FINE)
    if times[-1] > fine_times[-1]:
        return None
    times = times[-NUM_LAST:]
    pairs = zip(values[:, -NUM_LAST:], fine, strict=True)
    return mean_interval([(of - np.interp(times, fine_times, one)).mean() for of, one in pairs])


def time_to(study: Study, name: str, target: float) -> str:
    """After what time the mean test error over seeds is no more than the target, in %."""
    reached = 100 * np.mean(study.of(name, "error"), 0) <= target
    return f"{(reached.argmax() + 1) * epoch_time(study, name):.1f}" if reached.any() else "never"


def report(study: Study, names: Sequence[str], targets: Sequence[float]) -> None:
    """Prints the table."""
    table = Table(
        title=study.path.stem,
        caption=f"Same epochs, same time: the difference from {FINE} after as many epochs, and "
        f"after the same time (mean of the last {NUM_LAST} epochs). Times: in epochs without "
        "dropout.",
    )
    table.add_column()
    for title in (
        "error %",
        "NLL",
        "error,\nsame epochs",
        "NLL,\nsame epochs",
        "error,\nsame time",
        "NLL,\nsame time",
        "time of\nan epoch",
        *(f"time to\n{target:g} %" for target in targets),
    ):
        table.add_column(title, justify="right")
    digits = {"error": (100, 2), "nll": (1, 4)}
    for name in names:
        last = {what: np.array(study.of(name, what))[:, -1] for what in digits}
        cells = [shown(mean_interval(list(last[what])), *digits[what]) for what in digits]
        for what in digits:
            difference = last[what] - np.array(study.of(FINE, what))[:, -1]
            cells.append(
                "" if name == FINE else shown(mean_interval(list(difference)), *digits[what], "+")
            )
        for what in digits:
            found = None if name == FINE else after_the_same_time(study, name, what)
            cells.append("" if found is None else shown(found, *digits[what], "+"))
        cells += [f"{epoch_time(study, name):.2f}", *(time_to(study, name, t) for t in targets)]
        table.add_row(name, *cells)
    Console(width=150).print(table)


def draw(study: Study, names: Sequence[str], path: Path) -> None:
    """Test error and NLL after each epoch against the time of training, in plain epochs."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (what, title, scale) in zip(
        panels, (("error", "test error (%)", 100), ("nll", "test NLL (nats)", 1)), strict=True
    ):
        for name in (name for name in names if name in COLOURS):
            values = scale * np.array(study.of(name, what))
            at = np.arange(1, values.shape[1] + 1) * epoch_time(study, name)
            axes.plot(at, values.mean(0), color=COLOURS[name], label=name, lw=1.6)
            axes.plot(at[-1], values.mean(0)[-1], "o", color=COLOURS[name], ms=4)
        axes.set(xlabel="time of training, in epochs without dropout", ylabel=title)
        curves = scale * np.array([np.mean(study.of(name, what), 0) for name in names])
        axes.set_ylim(curves.min() * 0.95, curves[:, -1].max() * 1.25)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@click.command(help=__doc__)
@click.option(
    "--dataset", default="digits", type=click.Choice(["digits", "mnist", "fashion-mnist"])
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data sets are.")
@click.option("--train-size", default=500, show_default=True)
@click.option("--label-noise", default=0.0, show_default=True, help="Share of wrong labels.")
@click.option("--hidden", default="256,256", show_default=True, help="Units of hidden layers.")
@click.option("--rate", default=0.5, show_default=True)
@click.option("--epochs", default=100, show_default=True)
@click.option("--batch-size", default=50, show_default=True)
@click.option("--group-size", default=10, show_default=True, help="Examples that share a mask.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(2))
@click.option("--leave-out", multiple=True, help="A variant; may be repeated.")
@click.option("--target", type=float, multiple=True, help="Test error, in %, to show the time to.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("thinned/digits.json"))
def main(**options: Any) -> None:
    """Runs what the file does not hold, and shows it."""
    path, data_dir = options.pop("out"), options.pop("data_dir")
    left_out, targets = options.pop("leave_out"), options.pop("target")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = load(
        options["dataset"],
        train_size=options["train_size"],
        label_noise=options["label_noise"],
        seed=0,
        data_dir=data_dir,
    )
    if options["batch_size"] % options["group_size"]:
        raise click.UsageError("--batch-size must be a multiple of --group-size.")
    networks = variants(data, options)
    if wrong := [name for name in left_out if name not in networks or name in ("no dropout", FINE)]:
        choices = [name for name in networks if name not in ("no dropout", FINE)]
        raise click.UsageError(f"--leave-out must be one of {choices}, got {wrong[0]!r}.")
    networks = {name: network for name, network in networks.items() if name not in left_out}
    study = Study(path, options)
    missing = [
        (seed, name)
        for seed in range(options["seeds"])
        for name in networks
        if f"{name}/{seed}" not in study.runs
    ]
    start = time.perf_counter()
    for done, (seed, name) in enumerate(missing, 1):
        study.keep(f"{name}/{seed}", train_one(networks[name], data, options, seed))
        left = (time.perf_counter() - start) / done * (len(missing) - done)
        click.echo(f"{name}, seed {seed}; {done}/{len(missing)}, {left:.0f} s left", err=True)
    report(study, list(networks), targets)
    draw(study, list(networks), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
