"""Tiny networks that several tests train or evaluate."""

import flax.linen as nn
import jax
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.network import Network


class LinenMLP(nn.Module):
    """A hidden layer with batch statistics and dropout, in linen."""

    units: int = 8
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(self.units)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = jdrop.linen.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(3)(x)


class NnxMLP(nnx.Module):
    """The same network in nnx."""

    def __init__(self, rngs: nnx.Rngs, units: int = 8, rate: float = 0.5) -> None:
        self.hidden = nnx.Linear(4, units, rngs=rngs)
        self.norm = nnx.BatchNorm(units, rngs=rngs)
        self.dropout = jdrop.nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(units, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


NETWORKS: dict[str, Network] = {
    "linen": jdrop.linen.as_network(LinenMLP()),
    "nnx": jdrop.nnx.as_network(NnxMLP),
}
"""Networks with 4 inputs and 3 classes."""


def softmax_regression(rate: float) -> Network:
    """A linear layer with dropout on its inputs, for which weight scaling is exact."""

    def apply_fn(variables, inputs, key):  # type: ignore[no-untyped-def]
        x = inputs if key is None else jdrop.dropout(key, inputs, rate)
        return x @ variables["params"]["kernel"] + variables["params"]["bias"]

    def init_fn(key, inputs):  # type: ignore[no-untyped-def]
        kernel_key, bias_key = jax.random.split(key)
        return {
            "params": {
                "kernel": jax.random.normal(kernel_key, (inputs.shape[1], 3)),
                "bias": jax.random.normal(bias_key, (1, 3)),
            }
        }

    return Network(apply_fn, init_fn)
