"""Which parts of a network belong to units, and which networks have no such parts."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from exactness import assert_exact, drawn_inputs
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import Network
from jdrop.thinned import ThinningError, thin

ROWS, IMAGES, TOKENS = drawn_inputs(6, 5), drawn_inputs(2, 6, 6, 3), drawn_inputs(2, 3, 5)


def linen(module, **kwargs):
    return partial(jdrop.linen.as_network, module(**kwargs))


def nnx_of(module, **kwargs):
    return partial(jdrop.nnx.as_network, partial(module, **kwargs))


# Whole networks.


class MLP(nn.Module):
    """Dropout on the inputs and on both hidden layers."""

    @nn.compact
    def __call__(self, x, train):
        x = jdrop.linen.Dropout(0.2, deterministic=not train)(x)
        for _ in range(2):
            x = nn.relu(nn.Dense(8)(x))
            x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class NormalisedMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.List([nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(2)])
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for hidden, norm, drop in zip(self.hidden, self.norms, self.drops, strict=True):
            x = drop(nnx.gelu(norm(hidden(x))))
        return self.out(x)


class ConvNet(nn.Module):
    """Channels dropped before and after pooling, the last ones flattened."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), padding="SAME")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class NnxConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.drop = jdrop.nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)
        self.hidden = nnx.Linear(3 * 3 * 8, 8, rngs=rngs)
        self.drop_hidden = jdrop.nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.avg_pool(nnx.silu(self.conv(x)), (2, 2), (2, 2)))
        return self.out(self.drop_hidden(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


class Block(nn.Module):
    """Of a transformer: its other dropout layers have a rate too small to be seen."""

    @nn.compact
    def __call__(self, x, train):
        attention = jdrop.linen.MultiHeadDotProductAttention(1, qkv_features=4)
        y = attention(nn.LayerNorm()(x), deterministic=True)
        x = x + jdrop.linen.Dropout(0.0, deterministic=not train, name="residual")(y)
        y = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm()(x)))
        y = jdrop.linen.Dropout(0.1, deterministic=not train, name="hidden")(y)
        y = nn.Dense(x.shape[-1], name="down")(y)
        return x + jdrop.linen.Dropout(0.0, deterministic=not train, name="after")(y)


class Gated(nn.Module):
    """Two layers multiplied: what belongs to a unit is a column of each."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.silu(nn.Dense(8)(x)) * nn.Dense(8)(x)
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class TwoReaders(nn.Module):
    """Units that two layers read, with dropout in one module or in none."""

    drops: bool

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, name="hidden")(x))
        if self.drops:
            x = jdrop.linen.Dropout(0.5, deterministic=False, name="site")(x)
        return nn.Dense(3, name="one")(x) * nn.Dense(3, use_bias=False, name="other")(x)


class NnxReaders(nnx.Module):
    def __init__(self, drops, rngs):
        self.hidden = nnx.Linear(5, 8, rngs=rngs)
        self.site = jdrop.nnx.Dropout(0.5, rngs=rngs) if drops else nnx.identity
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.site(nnx.tanh(self.hidden(x))))


class LinenStep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=False)(x))


class LinenDecorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.remat(nn.Dense)(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


class LinenMapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(LinenStep, variable_axes={"params": None}, split_rngs={"params": False})()(x)


class NnxStep(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(5, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.two = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.two(self.drop(nnx.relu(self.one(x))))


class NnxLifted(nnx.Module):
    def __init__(self, lift, rngs):
        self.lift, self.step = lift, NnxStep(rngs)

    def __call__(self, x):
        return self.lift(lambda step, x: step(x))(self.step, x)


def by_hand(at_dropout=None):
    """A network of functions; the masks of the reference go by way of `at_dropout`."""

    def apply_fn(variables, inputs, key):
        params = variables["params"]
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", inputs, params["w"]) + params["b"][None])
        if at_dropout is not None:
            hidden = at_dropout("site", hidden, 0.5)
        elif key is not None:
            hidden = jdrop.dropout(key, hidden, 0.9)
        return hidden @ params["v"]

    def init_fn(key, inputs):
        shapes = {"w": (inputs.shape[1], 8), "b": (8,), "v": (8, 3)}
        return {"params": {name: jnp.zeros(shape) for name, shape in shapes.items()}}

    return Network(apply_fn, init_fn)


NETWORKS: dict[str, Any] = {
    "linen MLP": (linen(MLP), ROWS),
    "nnx with batch normalisation": (nnx_of(NormalisedMLP), ROWS),
    "linen convolutions": (linen(ConvNet), IMAGES),
    "nnx convolution": (nnx_of(NnxConvNet), IMAGES),
    "feed-forward part of a transformer": (linen(Block), TOKENS, {"hidden": 0.5}),
    "gated": (linen(Gated), ROWS),
    "layer without dropout, linen": (
        linen(TwoReaders, drops=False),
        ROWS,
        {"hidden": 0.5},
        linen(TwoReaders, drops=True),
        "site",
    ),
    "layer without dropout, nnx": (
        nnx_of(NnxReaders, drops=False),
        ROWS,
        {"hidden": 0.25},
        nnx_of(NnxReaders, drops=True),
        "site",
    ),
    "by hand": (by_hand, ROWS, {"w": 0.5}, by_hand, "site"),
    "nn.remat": (partial(jdrop.linen.as_network, nn.remat(LinenStep)()), ROWS),
    "nn.jit": (partial(jdrop.linen.as_network, nn.jit(LinenStep)()), ROWS),
    "nn.jit of the call, nn.remat of a layer": (linen(LinenDecorated), ROWS),
    "nn.vmap": (linen(LinenMapped), TOKENS),
    "nnx.jit": (nnx_of(NnxLifted, lift=nnx.jit), ROWS),
    "nnx.remat": (nnx_of(NnxLifted, lift=nnx.remat), ROWS),
}


def case_of(network, inputs, rates=None, reference=None, site=None):
    return network, inputs, {"rates": rates, "reference": reference, "site": site}


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
def test_gradient_is_that_of_the_masked_network(case):
    as_network, inputs, options = case_of(*case)
    thinning = assert_exact(as_network, inputs, **options)
    assert all(units.block_size > 1 for units in thinning.units if not units.is_input)


@pytest.mark.parametrize("kind", ["linen MLP", "linen convolutions", "by hand"])
def test_gradient_with_any_units(kind):
    as_network, inputs, options = case_of(*NETWORKS[kind])
    thinning = assert_exact(as_network, inputs, block_size=1, **options)
    assert all(units.block_size == 1 for units in thinning.units)


# Structures around the units of one layer; `drop` is a dropout layer.


class Of(nn.Module):
    body: Any

    @nn.compact
    def __call__(self, x, train):
        def drop(x, rate=0.5, name=None):
            return jdrop.linen.Dropout(rate, deterministic=not train, name=name)(x)

        return self.body(x, drop)


def attention(x):
    return nn.MultiHeadDotProductAttention(1, qkv_features=4, out_features=3)(x)


def dense(x, units=8):
    return nn.Dense(units)(x)


def out(x):
    return nn.Dense(3)(x)


def conv(x):
    return nn.relu(nn.Conv(8, (3, 3))(x))


def flat(x):
    return x.reshape(len(x), -1)



WORKING: dict[str, Any] = {
    "dropout, then a rectifier": (lambda x, drop: out(nn.relu(drop(dense(x)))), ROWS),
    "activations": (lambda x, drop: out(nn.leaky_relu(nn.gelu(nn.tanh(drop(dense(x))) ** 2))), ROWS),
    "casts": (lambda x, drop: out(drop(dense(x).astype("bfloat16")).astype("float32")), ROWS),
    "layers added": (lambda x, drop: out(drop(nn.elu(dense(x)) - nn.sigmoid(dense(x)))), ROWS),
    "one of two factors": (lambda x, drop: out(nn.sigmoid(dense(x)) * drop(dense(x))), ROWS),
    "mean over places": (lambda x, drop: out(drop(conv(x)).mean((1, 2))), IMAGES),
    "maximum over places": (lambda x, drop: out(drop(conv(x)).max((1, 2))), IMAGES),
    "pooling": (lambda x, drop: conv(nn.avg_pool(drop(conv(x)), (2, 2), padding="SAME")), IMAGES),
    "parts of places": (lambda x, drop: conv(jnp.pad(drop(conv(x))[:, ::2, 1:], IN_PLACES)), IMAGES),
    "channels first, flat": (lambda x, drop: out(flat(drop(conv(x)).transpose(0, 3, 1, 2))), IMAGES),
    "flat, then dropout": (lambda x, drop: out(nn.relu(flat(drop(conv(x))))), IMAGES),
    "places one below another": (
        lambda x, drop: out(drop(dense(x.reshape(-1, x.shape[-1]))).reshape(*x.shape[:2], -1)),
        TOKENS,
    ),
    "general product": (lambda x, drop: nn.DenseGeneral(3, (1, 2))(drop(dense(x))), TOKENS),
    "units of a general product": (lambda x, drop: out(drop(nn.DenseGeneral(8)(x))), TOKENS),
    "units of a transposed convolution": (
        lambda x, drop: conv(drop(nn.ConvTranspose(8, (3, 3))(x))),
        IMAGES,
    ),
    "attention to units": (
        lambda x, drop: attention(drop(dense(x))),
        TOKENS,
    ),
    "two layers, one of rate 0": (lambda x, drop: out(drop(drop(dense(x)), 0.0)), ROWS),
}
IN_PLACES = ((0, 0), (1, 0), (0, 2), (0, 0))


@pytest.mark.parametrize("case", WORKING.values(), ids=WORKING)
def test_structures_that_can_be_thinned(case):
    body, inputs = case
    assert_exact(partial(jdrop.linen.as_network, Of(body)), inputs)
