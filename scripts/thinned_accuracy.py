"""Measures what coarser masks cost in accuracy, and what they save in time.

Trains the same networks, from the same weights and on the same batches: without dropout, with a
mask for each example, and as thinned networks with a mask for each batch. A mask decides for single
units or for blocks of units, which are shuffled at the start of each epoch or not.

Prints the test error and the NLL with 95 % intervals over seeds, and the time of an epoch. Paired
by seed, it prints the differences from a mask per example after as many epochs, and after the same
time. With --target it prints the time to a test error. It draws error and NLL against time. If the
command is stopped, the same command resumes.
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
from jdrop.network import Network, predict
from jdrop.statistics import Interval, mean_interval
from jdrop.study.data import Dataset, load
from jdrop.study.models import MLP
from jdrop.thinned import thin
from jdrop.train import TrainState, fit

PLAIN = "no dropout"

REFERENCE = "a mask per example"

NUM_LAST_EPOCHS = 5
"""Scores after the same time are means of so many epochs, since single epochs fluctuate."""

COLOURS = {
    PLAIN: "#0072B2",
    REFERENCE: "#D55E00",
    "one mask, any units": "#8C8C8C",
    "blocks of 16, fixed": "#CC79A7",
    "blocks of 16, shuffled": "#009E73",
    "blocks of 64, shuffled": "#E69F00",
}


def make_networks(data: Dataset, config: dict[str, Any]) -> dict[str, Network]:
    """The networks to compare, by the names in the tables."""
    hidden, rate = tuple(int(units) for units in config["hidden"].split(",")), config["rate"]
    inputs, num_classes = jnp.asarray(data.train_inputs[:2]), data.num_classes
    assert num_classes is not None
    masked = jdrop.linen.as_network(MLP(hidden, num_classes, rate))
    return {
        PLAIN: jdrop.linen.as_network(MLP(hidden, num_classes, 0.0)),
        REFERENCE: masked,
        "one mask, any units": thin(masked, inputs, block_size=1),
        "blocks of 16, fixed": thin(masked, inputs, block_size=16, shuffle=False),
        "blocks of 16, shuffled": thin(masked, inputs, block_size=16),
        "blocks of 64, shuffled": thin(masked, inputs, block_size=64),
    }


class Study:
    """The scores and times of all trained networks, kept in a file.

    Args:
        path: the file; an existing file is resumed.
        config: the settings of the training. A file with other settings is an error.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.runs: dict[str, dict[str, list[float]]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["config"] != config:
                raise click.ClickException(
                    f"{path} holds a study with other settings, {content['config']}; "
                    "choose another file with --out."
                )
            self.runs = content["runs"]

    def add(self, run_name: str, run: dict[str, list[float]]) -> None:
        """Adds a run to the file, which is replaced as a whole: a kill never leaves half a file."""
        self.runs[run_name] = run
        new_file = self.path.with_suffix(".part")
        content = {"config": self.config, "runs": self.runs}
        new_file.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new_file.replace(self.path)

    def measurements(self, network_name: str, quantity: str) -> list[list[float]]:
        """For each seed, the quantity after each epoch."""
        return [
            self.runs[f"{network_name}/{seed}"][quantity]
            for seed in range(self.config["seeds"])
            if f"{network_name}/{seed}" in self.runs
        ]


@partial(jax.jit, static_argnames="network")
def score_on_test_set(
    network: Network, variables: Any, inputs: Any, labels: Any
) -> tuple[Any, Any]:
    """The test error and the test NLL."""
    log_probs = predict(None, network, variables, inputs)
    return error(log_probs, labels), nll(log_probs, labels)


def train(
    network: Network, data: Dataset, config: dict[str, Any], seed: int
) -> dict[str, list[float]]:
    """Trains a network, and returns its test scores and its seconds after each epoch."""
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    test_inputs, test_labels = jnp.asarray(data.test_inputs), jnp.asarray(data.test_labels)
    variables = network.init(init_key, inputs[:1])
    state = TrainState.create(network, variables, optax.adam(config["learning_rate"]))

    run: dict[str, list[float]] = {"seconds": [], "error": [], "nll": []}
    for _ in range(config["epochs"]):
        start = time.perf_counter()
        state, _ = fit(
            jax.random.clone(fit_key),
            state,
            inputs,
            labels,
            num_epochs=1,
            batch_size=config["batch_size"],
        )
        jax.block_until_ready(state.step)
        run["seconds"].append(round(time.perf_counter() - start, 6))
        scores = score_on_test_set(network, state.variables, test_inputs, test_labels)
        for score_name, score in zip(("error", "nll"), scores, strict=True):
            run[score_name].append(round(float(score), 6))
    return run


def format_interval(interval: Interval, scale: float, digits: int, sign: str = "") -> str:
    """The mean, and half the width of the interval."""
    half_width = math.nan if interval.high is None else scale * (interval.high - interval.mean)
    return f"{scale * interval.mean:{sign}.{digits}f} ± {half_width:.{digits}f}"


def epoch_time(study: Study, network_name: str) -> float:
    """The median time of an epoch, in epochs without dropout."""
    network_time, plain_time = (
        statistics.median(np.concatenate(study.measurements(name, "seconds")).tolist())
        for name in (network_name, PLAIN)
    )
    return network_time / plain_time


def difference_after_the_same_time(
    study: Study, network_name: str, quantity: str
) -> Interval | None:
    """The difference from a mask per example after the same time, as a mean of the last epochs.

    None if a mask per example was trained for less time.
    """
    values = np.array(study.measurements(network_name, quantity))
    reference = np.array(study.measurements(REFERENCE, quantity))
    epochs = np.arange(1, values.shape[1] + 1)
    times = epochs * epoch_time(study, network_name)
    reference_times = epochs * epoch_time(study, REFERENCE)
    if times[-1] > reference_times[-1]:
        return None
    times = times[-NUM_LAST_EPOCHS:]
    pairs = zip(values[:, -NUM_LAST_EPOCHS:], reference, strict=True)
    return mean_interval(
        [
            (seed_values - np.interp(times, reference_times, seed_reference)).mean()
            for seed_values, seed_reference in pairs
        ]
    )


def time_to_target(study: Study, network_name: str, target: float) -> str:
    """The time until the mean test error over seeds is at most the target, in %."""
    reached = 100 * np.mean(study.measurements(network_name, "error"), 0) <= target
    if not reached.any():
        return "never"
    return f"{(reached.argmax() + 1) * epoch_time(study, network_name):.1f}"


def print_table(study: Study, network_names: Sequence[str], targets: Sequence[float]) -> None:
    """Prints a row for each network."""
    table = Table(
        title=study.path.stem,
        caption=f"Same epochs, same time: the difference from {REFERENCE} after as many epochs, "
        f"and after the same time (mean of the last {NUM_LAST_EPOCHS} epochs). Times: in epochs "
        "without dropout.",
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
    formats = {"error": (100, 2), "nll": (1, 4)}
    for name in network_names:
        last = {score: np.array(study.measurements(name, score))[:, -1] for score in formats}
        cells = [
            format_interval(mean_interval(list(last[score])), *formats[score]) for score in formats
        ]
        differences: dict[str, list[Interval | None]] = {"epochs": [], "time": []}
        for score in formats:
            reference = np.array(study.measurements(REFERENCE, score))[:, -1]
            differences["epochs"].append(mean_interval(list(last[score] - reference)))
            differences["time"].append(difference_after_the_same_time(study, name, score))
        for intervals in differences.values():
            for score, interval in zip(formats, intervals, strict=True):
                empty = name == REFERENCE or interval is None
                cells.append("" if empty else format_interval(interval, *formats[score], "+"))
        times = [time_to_target(study, name, target) for target in targets]
        table.add_row(name, *cells, f"{epoch_time(study, name):.2f}", *times)
    Console(width=150).print(table)


def draw(study: Study, network_names: Sequence[str], path: Path) -> None:
    """Draws test error and NLL after each epoch against the time of training."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (score, title, scale) in zip(
        panels, (("error", "test error (%)", 100), ("nll", "test NLL (nats)", 1)), strict=True
    ):
        for name in network_names:
            mean = scale * np.mean(study.measurements(name, score), 0)
            times = np.arange(1, len(mean) + 1) * epoch_time(study, name)
            axes.plot(times, mean, color=COLOURS[name], label=name, lw=1.6)
            axes.plot(times[-1], mean[-1], "o", color=COLOURS[name], ms=4)
        axes.set(xlabel="time of training, in epochs without dropout", ylabel=title)
        curves = scale * np.array(
            [np.mean(study.measurements(name, score), 0) for name in network_names]
        )
        axes.set_ylim(curves.min() * 0.95, curves[:, -1].max() * 1.25)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@click.command(help=__doc__)
@click.option(
    "--dataset", default="digits", type=click.Choice(["digits", "mnist", "fashion-mnist"])
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the data sets.")
@click.option("--train-size", default=500, show_default=True)
@click.option("--label-noise", default=0.0, show_default=True, help="Share of wrong labels.")
@click.option("--hidden", default="256,256", show_default=True, help="Units of hidden layers.")
@click.option("--rate", default=0.5, show_default=True)
@click.option("--epochs", default=100, show_default=True)
@click.option("--batch-size", default=50, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(2))
@click.option("--leave-out", multiple=True, help="A network to leave out; may be repeated.")
@click.option("--target", type=float, multiple=True, help="A test error in %; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("thinned/digits.json"))
def main(**options: Any) -> None:
    """Trains the networks that the file does not hold yet, then prints and draws all."""
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
    networks = make_networks(data, options)
    optional = [name for name in networks if name not in (PLAIN, REFERENCE)]
    for name in left_out:
        if name not in optional:
            raise click.UsageError(f"--leave-out must be one of {optional}, got {name!r}.")
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
        study.add(f"{name}/{seed}", train(networks[name], data, options, seed))
        left = (time.perf_counter() - start) / done * (len(missing) - done)
        click.echo(f"{name}, seed {seed}; {done}/{len(missing)}, {left:.0f} s left", err=True)
    print_table(study, list(networks), targets)
    draw(study, list(networks), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
