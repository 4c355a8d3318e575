"""The comparison: plain networks, dropout networks, and every way to read them.

Numbers only: no files, no plots, no printing.
"""

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jdrop.linen
from jdrop import ensemble, inference, metrics
from jdrop.network import Network
from jdrop.statistics import Interval, mean_interval
from jdrop.study.data import Dataset
from jdrop.study.results import SCORES, Comparison, Curve, Row
from jdrop.train import TrainState

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, called as the work goes on."""

NUM_CURVE_POINTS = 25


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        hidden: units of each hidden layer.
        rate: dropout rate of hidden units, in (0, 1).
        input_rate: dropout rate of inputs, in [0, 1).
        members: networks of each kind.
        samples: masks of Monte-Carlo dropout.
        epochs: passes over the training examples.
        batch_size: examples in a step.
        learning_rate: of Adam.
        seed: of the networks; the script gives it to the choice of the data too.
    """

    hidden: tuple[int, ...] = (256, 256)
    rate: float = 0.5
    input_rate: float = 0.0
    members: int = 20
    samples: int = 50
    epochs: int = 200
    batch_size: int = 50
    learning_rate: float = 1e-3
    seed: int = 0


class DivergedError(ValueError):
    """Training gave networks whose predictions are not numbers."""


class MLP(nn.Module):
    """Dense layers with rectifiers, dropout on the inputs and after each hidden layer."""

    hidden: tuple[int, ...]
    num_classes: int
    rate: float
    input_rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Logits `[batch, class]` from inputs `[batch, feature]`."""
        x = jdrop.linen.Dropout(self.input_rate)(x, deterministic=deterministic)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
            x = jdrop.linen.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(self.num_classes)(x)


@dataclass(frozen=True)
class _Trained:
    """Trained networks of one kind and what was seen while they trained."""

    network: Network
    state: TrainState
    curve: Curve
    compile_seconds: float
    fit_seconds: float


def compare(settings: Settings, data: Dataset, progress: Progress) -> Comparison:
    """Trains networks of both kinds, reads them in every way, and scores what was read.

    A row's mean is over many groups of networks, in which each network counts alike. The width of
    its interval is that of disjoint groups, which are independent given the data: the average of 5
    out of 20 networks has 4 replicates. Where one group is all there is, there is no interval.

    Args:
        settings: what is trained, and how.
        data: training and test examples.
        progress: told how the work goes on.

    Raises:
        ValueError: settings that do not fit the data.
        DivergedError: networks whose predictions are not numbers.
    """
    if not 0 < settings.rate < 1:
        raise ValueError(
            f"rate must lie in (0, 1), got {settings.rate}: at 0 the dropout networks are plain."
        )
    start = time.perf_counter()
    key = jax.random.key(settings.seed)
    # One child for each kind of network: another kind would leave these as they are.
    plain_key, dropout_key, sample_key = (jax.random.fold_in(key, index) for index in range(3))
    plain = _train(plain_key, settings, data, "plain", 0.0, 0.0, progress)
    dropout = _train(
        dropout_key, settings, data, "dropout", settings.rate, settings.input_rate, progress
    )
    read_start = time.perf_counter()
    monte_carlo = _monte_carlo(sample_key, dropout, settings, data, progress)
    rows = [
        *_rows("plain", "weight scaling", 1, plain, data, *_predict(plain, data)),
        *_rows("dropout", "weight scaling", 1, dropout, data, *_predict(dropout, data)),
        *_rows("dropout", "Monte-Carlo", settings.samples, dropout, data, monte_carlo, None),
    ]
    end = time.perf_counter()
    return Comparison(
        settings=dataclasses.asdict(settings) | {"hidden": list(settings.hidden)},
        data={
            "name": data.name,
            "train_size": len(data.train_labels),
            "test_size": len(data.test_labels),
            "num_classes": data.num_classes,
            "label_noise": data.label_noise,
        },
        versions=_versions(),
        seconds={
            "compile": plain.compile_seconds + dropout.compile_seconds,
            "train plain": plain.fit_seconds,
            "train dropout": dropout.fit_seconds,
            "read": end - read_start,
            "all": end - start,
        },
        rows=rows,
        curves={"plain": plain.curve, "dropout": dropout.curve},
    )


def _train(
    key: Array,
    settings: Settings,
    data: Dataset,
    name: str,
    rate: float,
    input_rate: float,
    progress: Progress,
) -> _Trained:
    network = jdrop.linen.as_network(MLP(settings.hidden, data.num_classes, rate, input_rate))
    init_key, fit_key = jax.random.split(key)
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    optimizer = optax.adam(settings.learning_rate)
    state = ensemble.init_ensemble(
        init_key, network, optimizer, inputs[:1], ensemble_size=settings.members
    )
    start = time.perf_counter()
    fit_epoch = ensemble.fit_ensemble.lower(
        fit_key, state, inputs, labels, num_epochs=1, batch_size=settings.batch_size
    ).compile()
    compile_seconds = time.perf_counter() - start

    curve = Curve([], [], [])
    fit_seconds = 0.0
    interval = max(1, settings.epochs // NUM_CURVE_POINTS)
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        state, losses = jax.block_until_ready(
            fit_epoch(jax.random.clone(fit_key), state, inputs, labels)
        )
        fit_seconds += time.perf_counter() - start
        _check_finite(~jnp.isfinite(losses).all(1))
        if epoch % interval == 0 or epoch == settings.epochs or epoch == 1:
            curve.epochs.append(epoch)
            curve.train_error.append(_mean_error(network, state, inputs, labels))
            curve.test_error.append(_mean_error(network, state, data.test_inputs, data.test_labels))
        progress(f"training {settings.members} {name} networks", epoch, settings.epochs)
    return _Trained(network, state, curve, compile_seconds, fit_seconds)


def _mean_error(
    network: Network, state: TrainState, inputs: Array | np.ndarray, labels: Array | np.ndarray
) -> float:
    log_probs = ensemble.predict(network, state.variables, inputs)
    return float(jnp.mean(jax.vmap(metrics.error, in_axes=(0, None))(log_probs, labels)))


def _monte_carlo(
    key: Array, trained: _Trained, settings: Settings, data: Dataset, progress: Progress
) -> Array:
    """Log-probabilities `[member, batch, class]` of each network, averaged over its masks."""
    inputs = jnp.asarray(data.test_inputs)
    keys = ensemble.member_keys(key, settings.members)
    log_probs = []
    for member in range(settings.members):
        variables = jax.tree.map(lambda leaf, member=member: leaf[member], trained.state.variables)
        log_probs.append(
            jax.block_until_ready(
                inference.monte_carlo(
                    keys[member], trained.network, variables, inputs, num_samples=settings.samples
                )
            )
        )
        progress("sampling masks", member + 1, settings.members)
    return jnp.stack(log_probs)


def _predict(trained: _Trained, data: Dataset) -> tuple[Array, Array]:
    """Log-probabilities of every member on the test and on the training examples."""
    predict = partial(ensemble.predict, trained.network, trained.state.variables)
    test, train = predict(data.test_inputs), predict(data.train_inputs)
    _check_finite(jnp.isnan(test).any((1, 2)))
    return test, train


def _check_finite(diverged: Array) -> None:
    """Raises where a network has diverged: one Boolean for each."""
    if diverged.any():
        raise DivergedError(
            f"training diverged: {int(diverged.sum())} of {len(diverged)} networks predict no "
            "numbers; take a smaller --learning-rate."
        )


def _rows(
    networks: str,
    reading: str,
    passes: int,
    trained: _Trained,
    data: Dataset,
    test_log_probs: Array,
    train_log_probs: Array | None,
) -> list[Row]:
    """One row for every ensemble size up to all networks."""
    num_members = len(test_log_probs)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.state.variables["params"]))
    tests = _scores_by_size(test_log_probs, data.test_labels)
    trains = train_log_probs is not None and _scores_by_size(train_log_probs, data.train_labels)
    rows = []
    for size in range(1, num_members + 1):
        train = gap = None
        if trains:
            train = _intervals(trains[size])
            gap = _intervals({name: tests[size][name] - trains[size][name] for name in SCORES})
        rows.append(
            Row(
                networks=networks,
                reading=reading,
                ensemble_size=size,
                passes=size * passes,
                parameters=size * (num_parameters // num_members),
                train_seconds=size * trained.fit_seconds / num_members,
                test=_intervals(tests[size]),
                train=train,
                gap=gap,
            )
        )
    return rows


@dataclass(frozen=True)
class _Scores:
    """One score at one ensemble size.

    Attributes:
        mean: over many groups of networks, in which each network counts alike.
        replicates: of disjoint groups, `[group]`.
    """

    mean: float
    replicates: np.ndarray

    def __sub__(self, other: "_Scores") -> "_Scores":
        return _Scores(self.mean - other.mean, self.replicates - other.replicates)

    def interval(self) -> Interval:
        """The mean over many groups, with the width that disjoint groups give."""
        disjoint = mean_interval(list(self.replicates))
        if disjoint.high is None:
            return Interval(self.mean, None, None, disjoint.num_replicates)
        half_width = disjoint.high - disjoint.mean
        return Interval(
            self.mean, self.mean - half_width, self.mean + half_width, disjoint.num_replicates
        )


def _scores_by_size(log_probs: Array, labels: np.ndarray) -> dict[int, dict[str, _Scores]]:
    """By ensemble size, every score of the average of so many members.

    The groups of a size are neighbours on circles in which all members stand in random order: each
    member is in equally many. A few disjoint groups alone would leave a curve over sizes so rough
    that the first size to reach a given score is a matter of luck.
    """
    num_members = len(log_probs)
    rng = np.random.default_rng(0)
    circles = [np.arange(num_members), *(rng.permutation(num_members) for _ in range(4))]
    orders = np.stack([np.roll(circle, -i) for circle in circles for i in range(num_members)])
    scores = {
        name: np.asarray(values, np.float64)
        for name, values in _score_prefixes(
            log_probs, jnp.asarray(orders), jnp.asarray(labels)
        ).items()
    }
    # Those that begin at member 0, size, 2 size, ... of the first circle are disjoint.
    return {
        size: {
            name: _Scores(
                float(values[:, size - 1].mean()),
                values[: num_members - size + 1 : size, size - 1],
            )
            for name, values in scores.items()
        }
        for size in range(1, num_members + 1)
    }


@jax.jit
def _score_prefixes(log_probs: Array, orders: Array, labels: Array) -> dict[str, Array]:
    """Every score `[order, size]` of the average of the first members of each order."""
    pool = inference.POOLS["arithmetic"]
    sizes = jnp.arange(1, len(log_probs) + 1, dtype=log_probs.dtype)

    def add_one(carry: Any, member_and_size: tuple[Array, Array]) -> tuple[Any, dict[str, Array]]:
        member, size = member_and_size
        carry = pool.add(carry, log_probs[member], jnp.ones_like(size), size)
        pooled = pool.finish(carry, size)
        return carry, {name: getattr(metrics, name)(pooled, labels) for name in SCORES}

    def scores(order: Array) -> dict[str, Array]:
        return jax.lax.scan(add_one, pool.start(log_probs[0]), (order, sizes))[1]

    return jax.lax.map(scores, orders)


def _intervals(scores: Mapping[str, _Scores]) -> dict[str, Interval]:
    return {name: score.interval() for name, score in scores.items()}


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        **{name: version(name) for name in ("jdrop", "jax", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
