"""Times the training steps of several networks, at once and one after another.

Each network is timed with 1, 5 and 10 members: a step in `fit_ensemble`, and a step by
`ensemble.train_step`. Ratios are to as many times the step of a single network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from timing import print_times, time_in_turn

import jdrop.linen
from jdrop import ensemble, train


class MLP(nn.Module):
    """784-512-512-10 with dropout."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns ten logits."""
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(512)(x))
            x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions with pooling, and a hidden layer with dropout."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns ten logits."""
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


class ResNet20(nn.Module):
    """The residual network of 20 layers for images of 32 x 32, with dropout before the last.

    Reference:
        He et al. 2016, arXiv:1512.03385, section 4.2.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns ten logits."""

        def convolve(x: Array, channels: int, stride: int = 1) -> Array:
            x = nn.Conv(channels, (3, 3), (stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(convolve(x, 16))
        for channels in (16, 32, 64):
            for block in range(3):
                stride = 2 if channels > 16 and block == 0 else 1
                y = nn.relu(convolve(x, channels, stride))
                y = convolve(y, channels)
                # The identity: every second pixel, and zeros for the new channels.
                x = x[:, ::stride, ::stride]
                x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])])
                x = nn.relu(x + y)
        x = x.mean((1, 2))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


@dataclass(frozen=True)
class Case:
    """A network to time.

    Attributes:
        module: the network.
        image_shape: of an example.
        batch_size: examples in a step.
        steps: of a fit.
        rounds: how often each function is timed.
    """

    module: nn.Module
    image_shape: tuple[int, ...]
    batch_size: int
    steps: int
    rounds: int


CASES = {
    "mlp": Case(MLP(), (28, 28, 1), batch_size=50, steps=10, rounds=15),
    "cnn": Case(CNN(), (28, 28, 1), batch_size=50, steps=5, rounds=5),
    "resnet": Case(ResNet20(), (32, 32, 3), batch_size=16, steps=2, rounds=3),
}

BATCHINGS = ("vmap", "scan")


def time_members(case: Case, num_members: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of a fit and of a step: of members by each batching, and of one network alone.

    The seconds of one network alone are multiplied by the number of members.
    """
    network = jdrop.linen.as_network(case.module)
    num_examples = case.steps * case.batch_size
    inputs = jax.random.normal(jax.random.key(0), (num_examples, *case.image_shape))
    labels = jax.random.randint(jax.random.key(1), (num_examples,), 0, 10)
    batch = inputs[: case.batch_size], labels[: case.batch_size]
    state = ensemble.init_ensemble(
        jax.random.key(2), network, optax.adam(1e-3), batch[0], ensemble_size=num_members
    )
    single = jax.tree.map(lambda leaf: leaf[0], state)
    key = jax.random.key(3)
    sizes = {"num_epochs": 1, "batch_size": case.batch_size}
    functions: dict[str, Callable[[], Any]] = {
        "fit, alone": partial(train.fit, key, single, inputs, labels, **sizes),
        "step, alone": partial(jax.jit(train.train_step), key, single, batch),
    }
    for batching in BATCHINGS:
        functions[f"fit, {batching}"] = partial(
            ensemble.fit_ensemble, key, state, inputs, labels, batching=batching, **sizes
        )
        functions[f"step, {batching}"] = partial(
            ensemble.train_step, key, state, batch, batching=batching
        )
    seconds = time_in_turn(functions, case.rounds)
    for alone in ("fit, alone", "step, alone"):
        seconds[alone] = [num_members * value for value in seconds[alone]]
    return {
        program: {name: values for name, values in seconds.items() if name.startswith(program)}
        for program in ("fit", "step")
    }


@click.command(help=__doc__)
@click.argument("networks", nargs=-1, type=click.Choice([*CASES]))
@click.option("--members", type=int, multiple=True, default=(1, 5, 10), show_default=True)
def main(networks: tuple[str, ...], members: tuple[int, ...]) -> None:
    """Times the named networks, or all."""
    click.echo(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jax.device_count()} device"
    )
    for name in networks or CASES:
        for num_members in members:
            seconds = time_members(CASES[name], num_members)
            title = f"{num_members} x {name}"
            print_times(f"{title}, a step in a fit", seconds["fit"], CASES[name].steps)
            print_times(f"{title}, a step", seconds["step"])


if __name__ == "__main__":
    main()
