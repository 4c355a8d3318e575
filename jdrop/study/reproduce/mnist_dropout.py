"""Dropout networks on MNIST beside ensembles of the same network without dropout.

A small network by a recipe that is stated in full, and networks of Srivastava et al. 2014.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax
from jax import Array

import jdrop.linen
from jdrop.study.data import Progress, images
from jdrop.study.models import Model
from jdrop.study.reproduce import classification, published
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol
from jdrop.train import max_norm

RATE = 0.5
INPUT_RATE = 0.2
BATCH_SIZE = 100
NUM_SEEDS = 5
NUM_SAMPLES = 100

Initializer = Callable[..., Array]


@dataclass(frozen=True)
class Ramp:
    """A hyperparameter that changes linearly in the first epochs, and then stays.

    Attributes:
        start: the value in the first step.
        end: the value after the change.
        num_epochs: how many of the paper's epochs the change takes.
    """

    start: float
    end: float
    num_epochs: int


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained.

    Attributes:
        hidden: the units of each hidden layer.
        initial_kernels: for each dense layer, what draws its kernel.
        num_epochs: how many epochs the paper's networks trained.
        learning_rate: of gradient descent.
        momentum: of gradient descent.
        norm_limits: for each dense layer, the largest norm of the weights into a unit; empty
            without such limits.
    """

    hidden: tuple[int, ...]
    initial_kernels: tuple[Initializer, ...]
    num_epochs: int
    learning_rate: Ramp
    momentum: Ramp
    norm_limits: tuple[float, ...] = ()


class MLP(nn.Module):
    """Dense layers with rectifiers, dropout on the inputs and after each hidden layer.

    Unlike `jdrop.study.models.MLP`, each layer has initial weights of its own.
    """

    hidden: tuple[int, ...]
    initial_kernels: tuple[Initializer, ...]

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Logits `[batch, 10]` from images `[batch, pixel]`."""
        *of_hidden, of_last = self.initial_kernels
        x = jdrop.linen.Dropout(INPUT_RATE)(x, deterministic=deterministic)
        for units, kernel_init in zip(self.hidden, of_hidden, strict=True):
            x = nn.relu(nn.Dense(units, kernel_init=kernel_init)(x))
            x = jdrop.linen.Dropout(RATE)(x, deterministic=deterministic)
        return nn.Dense(10, kernel_init=of_last)(x)


def uniform(limit: float) -> Initializer:
    """Draws weights uniformly between minus the limit and the limit."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def srivastava(*, norm_limit: float | None) -> Recipe:
    """The recipe of three layers of 1024 rectifiers."""
    normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return Recipe(
        hidden=(1024, 1024, 1024),
        initial_kernels=(normal,) * 4,
        num_epochs=1667,  # A million steps.
        learning_rate=Ramp(0.01, 0.0, 1667),
        momentum=Ramp(0.5, 0.95, 167),
        norm_limits=() if norm_limit is None else (norm_limit,) * 4,
    )


SMALL, LARGE, LARGE_WITH_LIMIT = "898-1532", "3 x 1024", "3 x 1024, max-norm"
RECIPES = {
    SMALL: Recipe(
        hidden=(898, 1532),
        initial_kernels=(
            uniform(0.00891030471479),
            uniform(0.0575059125935),
            nn.initializers.zeros_init(),
        ),
        num_epochs=440,
        learning_rate=Ramp(0.097259, 0.097259 * 0.022292, 560),
        momentum=Ramp(0.5, 0.699217, 698),
        norm_limits=(4.378017, 2.970242, 4.626974),
    ),
    LARGE: srivastava(norm_limit=None),
    LARGE_WITH_LIMIT: srivastava(norm_limit=2.0),
}
"""By part, its recipe; the cheap one first."""

OTHER_PAPER = {
    LARGE: "3 x 1024, Ma et al.",
    LARGE_WITH_LIMIT: "3 x 1024, max-norm, Ma et al.",
}
"""By part, the row that sets the same networks beside the numbers of a second paper."""


def make_protocol() -> Protocol:
    """The protocol, on a small network and on a larger one without and with max-norm."""
    return Protocol(
        name="mnist-dropout",
        title="One dropout network on MNIST, and ensembles without dropout",
        paper="Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from "
        "overfitting; the recipe of D. Warde-Farley in pylearn2; Ma et al. 2017, Dropout with "
        "expectation-linear regularization",
        url="https://jmlr.org/papers/v15/srivastava14a.html",
        summary=(
            f"{NUM_SEEDS} networks of rectifiers train on all 60,000 images with dropout at "
            f"{INPUT_RATE:g} on inputs and {RATE:g} on hidden units. As many train without "
            f"dropout; all else is equal. Batches hold {BATCH_SIZE} images.",
            "The small network follows a file of pylearn2 that states all settings. Each layer has "
            "its own limit on the norm of the weights into a unit (max-norm). It trains for 440 "
            "epochs.",
            "The large network has three layers of 1,024 units and trains for a million steps, "
            "1,667 epochs: without max-norm, and with the limit 2 in all layers.",
            "With a part of the epochs, the schedules of learning rate and momentum are "
            "compressed by as much: the training passes through all of them.",
            f"Each dropout network is read by weight scaling and by {NUM_SAMPLES} masks.",
            "The average of all plain networks is of their probabilities. Its interval is the "
            "jackknife's: the networks are left out one by one. For an error it tends to be too "
            "wide, so such a number agrees easily.",
            "The worth is the number of plain networks whose average scores like one dropout "
            "network. Its interval is over networks and test examples.",
        ),
        leaves_open=(
            "The file gives one error for the recipe of 440 epochs, and no number of runs. There, "
            "learning rate and momentum change after each epoch; here after each step.",
            "Srivastava et al. give neither the learning rate nor the size of a batch. Here the "
            "learning rate falls linearly from 0.01 to 0. The momentum rises from 0.5 to 0.95, "
            "the paper's last value, in the first tenth of the training. The initial weights are "
            "normal with the variance 1 / inputs of a unit. None of this was tuned.",
            "The paper chose settings on 10,000 images held out, and trained again on all 60,000. "
            "Here nothing is held out.",
            "Ma et al. give means of five runs. They do not say, in what we read, whether their ± "
            "is a standard deviation or a standard error; here it is taken as a deviation.",
            "The plain networks have the settings of the dropout networks. Settings of their own, "
            "such as fewer epochs, may suit them better.",
        ),
        replicate="seed",
        spread="standard deviation",
        measures=_measures(),
        published=published.MNIST_DROPOUT,
        parts=tuple(RECIPES),
        files=tuple(f"mnist/{file}.gz" for file in images.FILES),
        run_part=_run_part,
    )


def _measures() -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    for score, unit in (("error", "in percent of the test examples"), ("nll", "in nats")):
        title = {"error": "error", "nll": "NLL"}[score]
        worth = "So many plain networks score like the row above."
        measures |= {
            f"scaling-{score}": Measure(
                f"{title} WS", f"One dropout network, by weight scaling; {unit}."
            ),
            f"scaling-worth-{score}": Measure(f"{title} worth WS", worth),
            f"masks-{score}": Measure(f"{title} MC", f"One dropout network, by masks; {unit}."),
            f"masks-worth-{score}": Measure(f"{title} worth MC", worth),
            f"difference-{score}": Measure(
                f"{title} MC − WS",
                "The paired difference; below 0, masks are better.",
                is_difference=True,
            ),
            f"one-{score}": Measure(f"{title} plain", f"One network without dropout; {unit}."),
            f"average-{score}": Measure(
                f"{title} of all plain", f"The average of all networks without dropout; {unit}."
            ),
        }
    return measures


def _run_part(part: str, options: Options, progress: Progress) -> PartResult:
    recipe = RECIPES[part]
    data = images.load("mnist", train_size=None, label_noise=0.0, seed=0, data_dir=options.data_dir)
    num_epochs = options.epochs(recipe.num_epochs)
    training = classification.Training(
        optimizer=make_optimizer(recipe, num_epochs, len(data.train_labels) // BATCH_SIZE),
        num_networks=options.count(NUM_SEEDS),
        num_epochs=num_epochs,
        batch_size=BATCH_SIZE,
        num_samples=NUM_SAMPLES,
        batching="vmap",
    )
    model = Model(partial(MLP, recipe.hidden, recipe.initial_kernels))
    key = jax.random.fold_in(jax.random.key(options.seed), list(RECIPES).index(part))
    scores = classification.compare(key, model, data, training, progress)
    rows = as_rows(part, scores.values)
    worth = {name.replace("-", "-worth-"): size for name, size in scores.worth.items()}
    return PartResult(rows, num_epochs, recipe.num_epochs, seconds=0.0, worth={part: worth})


def as_rows(part: str, values: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """The rows of a part: all measures, and the readings beside another paper's numbers."""
    differences = {
        f"difference-{score}": [
            masks - scaling
            for masks, scaling in zip(
                values[f"masks-{score}"], values[f"scaling-{score}"], strict=True
            )
        ]
        for score in classification.SCORES
    }
    rows = {part: {**values, **differences}}
    if part in OTHER_PAPER:
        readings = ("scaling-error", "masks-error")
        rows[OTHER_PAPER[part]] = {name: values[name] for name in readings}
    return rows


def make_optimizer(
    recipe: Recipe, num_epochs: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    r"""Gradient descent with momentum and schedules, and the limits of the norms.

    $$v_t = m_t v_{t-1} - \eta_t g_t, \quad w_t = w_{t-1} + v_t$$

    with the momentum $m_t$, the learning rate $\eta_t$ and the gradient $g_t$. Then the weights
    into each unit are scaled down to the limit of their layer.

    Args:
        recipe: with the schedules of the whole training.
        num_epochs: the epochs to train, into which the schedules are compressed.
        steps_per_epoch: how many steps an epoch has.
    """
    steps_per_epoch_of_paper = steps_per_epoch * num_epochs / recipe.num_epochs

    def schedule(ramp: Ramp) -> optax.Schedule:
        num_steps = max(1, round(steps_per_epoch_of_paper * ramp.num_epochs))
        return optax.linear_schedule(ramp.start, ramp.end, num_steps)

    descent = optax.inject_hyperparams(_descent)(
        learning_rate=schedule(recipe.learning_rate), momentum=schedule(recipe.momentum)
    )
    if not recipe.norm_limits:
        return descent
    limits = {f"Dense_{layer}": max_norm(c) for layer, c in enumerate(recipe.norm_limits)}
    return optax.chain(
        descent, optax.multi_transform(limits, lambda params: {name: name for name in params})
    )


def _descent(learning_rate: Any, momentum: Any) -> optax.GradientTransformation:
    # `optax.sgd` has the learning rate outside of the velocity; here an old step keeps its own.
    return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.trace(momentum))
