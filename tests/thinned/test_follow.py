"""Which arrays of a network belong to units, and which networks cannot be thinned."""

from dataclasses import replace
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
from jdrop.network import DropoutSite, Network
from jdrop.thinned import ThinningError, UnitGroup, thin
from jdrop.thinned.follow import check_scales, check_zeros, follow_units
from jdrop.thinned.jaxpr import flatten_jaxpr, tag_dropout
from jdrop.thinned.units import UnitAxis

pytestmark = pytest.mark.grid

ROWS, IMAGES, TOKENS = drawn_inputs(6, 5), drawn_inputs(2, 6, 6, 3), drawn_inputs(2, 3, 5)


def linen(module, **kwargs):
    return jdrop.linen.as_network(module(**kwargs), has_dropout=kwargs.get("drops", True))


def nnx_of(module, **kwargs):
    has_dropout = kwargs.get("drops", True)
    return jdrop.nnx.as_network(partial(module, **kwargs), has_dropout=has_dropout)


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
        x = nn.silu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.max_pool(nn.silu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.silu(nn.Dense(8)(x.reshape(len(x), -1)))
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


def by_hand(f=None, transform=lambda kernel: kernel):
    """A network of functions; with `f`, a network that calls it at a dropout site named "site"."""

    def apply_fn(variables, inputs, key):
        params = variables["params"]
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", inputs, params["w"]) + params["b"][None])
        if f is not None:
            hidden = f(DropoutSite("site", 0, hidden.shape, 0.5, (), False, lambda: key), hidden)
        elif key is not None:
            hidden = jdrop.dropout(key, hidden, 0.9)
        return hidden @ transform(params["v"])

    def init_fn(key, inputs):
        shapes = {"w": (inputs.shape[1], 8), "b": (8,), "v": (8, 3)}
        return {"params": {name: jnp.zeros(shape) for name, shape in shapes.items()}}

    return Network(apply_fn, init_fn)


def by_hand_with_site(transform=lambda kernel: kernel):
    """The same network, whose dropout can be replaced."""

    def replace_fn(f, attention_dropout):
        return by_hand(f, transform)

    return replace(by_hand(transform=transform), replace_fn=replace_fn)


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
    "by hand": (by_hand(), ROWS, {"w": 0.5}, by_hand_with_site(), "site"),
    "nn.remat": (jdrop.linen.as_network(nn.remat(LinenStep)()), ROWS),
    "nn.jit": (jdrop.linen.as_network(nn.jit(LinenStep)()), ROWS),
    "nn.jit of the call, nn.remat of a layer": (linen(LinenDecorated), ROWS),
    "nn.vmap": (linen(LinenMapped), TOKENS),
    "nnx.jit": (nnx_of(NnxLifted, lift=nnx.jit), ROWS),
    "nnx.remat": (nnx_of(NnxLifted, lift=nnx.remat), ROWS),
}


def case_of(network, inputs, rates=None, reference=None, site_name=None):
    return network, inputs, {"rates": rates, "reference": reference, "site_name": site_name}


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
def test_gradient_equals_that_of_the_masked_network(case):
    network, inputs, options = case_of(*case)
    rule = assert_exact(network, inputs, **options)
    assert all(units.block_size > 1 for units in rule.units if not units.is_input)


@pytest.mark.parametrize("name", ["linen MLP", "linen convolutions", "by hand"])
def test_gradient_equals_that_of_the_masked_network_without_blocks(name):
    network, inputs, options = case_of(*NETWORKS[name])
    rule = assert_exact(network, inputs, block_size=1, **options)
    assert all(units.block_size == 1 for units in rule.units)


# Structures around the units of one layer; `drop` is a dropout layer.


class Of(nn.Module):
    body: Any

    @nn.compact
    def __call__(self, x, train):
        def drop(x, rate=0.5, name=None):
            return jdrop.linen.Dropout(rate, deterministic=not train, name=name)(x)

        return self.body(x, drop)


def of(body):
    # With a call of its own, since some bodies freeze their batch statistics.
    def call(module, inputs, *, train, key):
        return module(inputs, train)

    return jdrop.linen.as_network(Of(body), call=call)


def attention(x):
    return nn.MultiHeadDotProductAttention(1, qkv_features=4, out_features=3)(x)


def dense(x, units=8):
    return nn.Dense(units)(x)


def out(x):
    return nn.Dense(3)(x)


def general(x):
    return nn.DenseGeneral(3, (1, 2))(x)


def conv(x):
    return nn.relu(nn.Conv(8, (3, 3))(x))


def flat(x):
    return x.reshape(len(x), -1)


WORKING: dict[str, Any] = {
    "dropout, then a rectifier": (lambda x, drop: out(nn.relu(drop(dense(x)))), ROWS),
    "activations": (
        lambda x, drop: out(nn.gelu(nn.leaky_relu(nn.tanh(drop(dense(x)))))),
        ROWS,
    ),
    "casts": (lambda x, drop: out(drop(dense(x).astype("bfloat16")).astype("float32")), ROWS),
    "layers added": (lambda x, drop: out(drop(nn.elu(dense(x)) - nn.sigmoid(dense(x)))), ROWS),
    "one of two factors": (lambda x, drop: out(nn.sigmoid(dense(x)) * drop(dense(x))), ROWS),
    "mean over places": (lambda x, drop: out(drop(conv(x)).mean((1, 2))), IMAGES),
    "maximum over places": (lambda x, drop: out(drop(conv(x)).max((1, 2))), IMAGES),
    "pooling": (lambda x, drop: conv(nn.avg_pool(drop(conv(x)), (2, 2), padding="SAME")), IMAGES),
    "parts of places": (
        lambda x, drop: conv(jnp.pad(drop(conv(x))[:, ::2], PLACES)),
        IMAGES,
    ),
    "channels first, flat": (
        lambda x, drop: out(flat(jnp.moveaxis(drop(conv(x)), -1, 1))),
        IMAGES,
    ),
    "flat, then dropout": (lambda x, drop: out(nn.relu(flat(drop(conv(x))))), IMAGES),
    "places one below another": (
        lambda x, drop: out(drop(dense(x.reshape(-1, x.shape[-1]))).reshape(*x.shape[:2], -1)),
        TOKENS,
    ),
    "general product": (lambda x, drop: general(drop(dense(x))), TOKENS),
    "units of a general product": (lambda x, drop: out(drop(nn.DenseGeneral(8)(x))), TOKENS),
    "units of a transposed convolution": (
        lambda x, drop: conv(drop(nn.ConvTranspose(8, (3, 3))(x))),
        IMAGES,
    ),
    "attention to units": (
        lambda x, drop: attention(drop(dense(x))),
        TOKENS,
    ),
    "activations with bounds": (
        lambda x, drop: out(
            nn.relu6(y := drop(nn.tanh(dense(x)))) + jax.lax.clamp(-1.0, y, 2.0) + y**3.0
        ),
        ROWS,
    ),
    "an integer power": (lambda x, drop: out(drop(nn.tanh(dense(x))) ** 3), ROWS),
    "products of units": (
        lambda x, drop: general((y := drop(nn.tanh(dense(x))))[:, None] * y[..., None]),
        ROWS,
    ),
    "tied weights": (
        lambda x, drop: drop((layer := nn.Dense(8))(x)) @ layer.variables["params"]["kernel"].T,
        ROWS,
    ),
    "a layer that is off": (
        lambda x, drop: out(drop(dense(jdrop.linen.Dropout(0.5)(dense(x), deterministic=True)))),
        ROWS,
    ),
    "two layers, one of rate 0": (lambda x, drop: out(drop(drop(dense(x)), 0.0)), ROWS),
}
PLACES = ((0, 0), (1, 0), (0, 2), (0, 0))


@pytest.mark.parametrize("case", WORKING.values(), ids=WORKING)
def test_gradient_is_exact_through_each_operation(case):
    body, inputs = case
    assert_exact(of(body), inputs)


# Networks that cannot be thinned, and why.


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda step, x, _: (step(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return scan(LinenStep(name="step"), x, None)[0]


def of_functions(hidden, reader=lambda v: v):
    """A network of one's own with a kernel `w` that makes 8 units and a kernel that reads them."""

    def apply_fn(variables, inputs, key):
        params = variables["params"]
        return hidden(inputs @ params["w"]) @ reader(params["v"])

    def init_fn(key, inputs):
        return {"params": {"w": jnp.zeros((inputs.shape[1], 8)), "v": jnp.zeros((8, 3))}}

    return Network(apply_fn, init_fn)


def scanned(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x), None), x, length=2)[0]


NUMBERS = jnp.arange(8.0)[None]


def residual(x, drop):
    x = dense(x, 5) + x
    return out(drop(x))


def called_twice(x, drop):
    layer = jdrop.linen.Dropout(0.5, deterministic=False)
    return out(layer(dense(layer(dense(x)))))


def read_beside(x, drop):
    x = dense(x)
    return out(drop(x)) + out(x)


def products_over_places(one, other):
    one, other = (y[:, None].repeat(2, 1) for y in (one, other))
    return general(jnp.einsum("btc,btd->bcd", one, other))


IMPOSSIBLE: dict[str, Any] = {
    "layer normalisation": (
        of(lambda x, drop: out(drop(nn.LayerNorm()(dense(x))))),
        "Layer normalisation",
    ),
    "group normalisation": (of(lambda x, drop: out(drop(nn.GroupNorm(2)(dense(x))))), "group norm"),
    "softmax": (of(lambda x, drop: out(drop(nn.softmax(dense(x))))), "softmax go over"),
    "residual": (of(residual), "among the inputs"),
    "outputs": (of(lambda x, drop: drop(dense(x))), "among the outputs"),
    "sigmoid": (of(lambda x, drop: out(nn.sigmoid(drop(dense(x))))), "what follows"),
    "bias": (of(lambda x, drop: out(nn.BatchNorm(True)(drop(dense(x))))), "what follows"),
    "read beside": (of(read_beside), "read beside the dropout layer"),
    "added beside": (of(lambda x, drop: out((y := dense(x)) + drop(y))), "read beside"),
    "twice": (of(called_twice), "'Dropout_0' is called more than once"),
    "two of the same units": (of(lambda x, drop: out(drop(nn.relu(drop(dense(x)))))), "Dropout_1"),
    "two of one layer": (
        of(lambda x, drop: out(drop(x_ := dense(x)) * drop(x_))),
        "'Dropout_1' too",
    ),
    "torn apart": (of(lambda x, drop: out(drop(dense(x)).reshape(-1, 4))), "`reshape`"),
    "halves": (of(lambda x, drop: out(jnp.split(drop(dense(x)), 2, -1)[0])), "`split`"),
    "sorted": (of(lambda x, drop: out(jnp.sort(drop(dense(x))))), "`sort`"),
    "product with what is not dropped": (
        of(lambda x, drop: general(nn.relu(drop(y := dense(x))[:, None] * y[..., None]))),
        "read beside",
    ),
    "the same, of a product over places": (
        of(lambda x, drop: products_over_places(drop(y := dense(x)), y)),
        "read beside",
    ),
    "power of 0": (of(lambda x, drop: out(drop(dense(x)) ** 0.0)), "not known to be"),
    "bounds without 0": (of(lambda x, drop: out(jnp.clip(drop(dense(x)), 0.5, 1))), "not known"),
    "an upper and a lower bound above 0": (
        of(lambda x, drop: out(jax.lax.clamp(0.5, drop(dense(x)), 1.0))),
        "not known",
    ),
    "their number as a divisor": (
        of(lambda x, drop: out((y := drop(dense(x))) / y.shape[-1] ** 0.5)),
        r"where it takes 2.828\d+, with fewer of them it takes 2.0",
    ),
    "flat before dropout": (
        of(lambda x, drop: out(drop(flat(nn.Dense(4)(x[:, None].repeat(3, 1)))))),
        "Drop channels before",
    ),
    "no axis of examples": (of(lambda x, drop: out(drop(dense(x)[0])[None])), r"shape \(8,\)"),
    "nn.scan": (jdrop.linen.as_network(Scanned()), "within a loop"),
    "a fixed number": (of(lambda x, drop: out(drop(dense(x)) + 0 * NUMBERS)), "no variable"),
    "their number": (of(lambda x, drop: out(drop(dense(x)).reshape(-1, 8))), "fewer units"),
    "a fixed number in jit": (
        of(lambda x, drop: out(jax.jit(lambda x: x * NUMBERS)(drop(dense(x))))),
        "no variable",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_thin_raises_for_networks_that_cannot_be_thinned(case):
    network, message = case
    with pytest.raises(ThinningError, match=message):
        thin(network, ROWS)


OF_FUNCTIONS: dict[str, Any] = {
    "lax.scan": (scanned, "`scan`.*within loops"),
    "cumulative sum": (lambda x: jnp.cumsum(x, -1), "`cumsum`"),
    "numbers of the units": (lambda x: x * jnp.arange(8.0)[None], "iota"),
    "their number": (lambda x: x / x.shape[-1], r"where it takes 8.0"),
    "size of its own": (lambda x: x.reshape(-1, 2, 4).reshape(-1, 8), "`reshape`"),
}


@pytest.mark.parametrize("case", OF_FUNCTIONS.values(), ids=OF_FUNCTIONS)
def test_thin_raises_for_functions_that_cannot_be_thinned(case):
    hidden, message = case
    with pytest.raises(ThinningError, match=message):
        thin(of_functions(hidden), ROWS, {"w": 0.5})


READERS: dict[str, Any] = {
    "an exponential": jnp.exp,
    "a sum": lambda v: v + 1,
    "a square": lambda v: v * v,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_weights_that_read_units_through_a_nonlinear_function_cannot_be_scaled(reader):
    """Without a dropout layer, the arrays that read the units are scaled."""
    with pytest.raises(ThinningError, match="cannot be scaled in their place"):
        thin(of_functions(jnp.tanh, reader), ROWS, {"w": 0.5})
    thin(of_functions(jnp.tanh, reader), ROWS, {"w": 0.5}, scale=False)


def test_tied_weights_cannot_be_scaled():
    """The columns of one array make the units, and its rows read them."""

    def apply_fn(variables, inputs, key):
        w = variables["params"]["w"]
        return jnp.tanh(inputs @ w) @ w.T

    network = Network(apply_fn, lambda key, inputs: {"params": {"w": jnp.zeros((5, 8))}})
    with pytest.raises(ThinningError, match="cannot be scaled in their place"):
        thin(network, ROWS, {"w": 0.5})


def test_weights_that_read_units_through_operations_that_keep_the_scale_are_scaled():
    """Through operations that keep the scale, such as a transpose or a product with a constant."""

    def transform(kernel):
        return (0.5 * -kernel.T).T

    assert_exact(
        by_hand(transform=transform),
        ROWS,
        {"w": 0.5},
        reference=by_hand_with_site(transform),
        site_name="site",
    )


def test_a_scalar_parameter_makes_no_units():
    def apply_fn(variables, inputs, key):
        return inputs * variables["params"]["factor"]

    network = Network(apply_fn, lambda key, inputs: {"params": {"factor": jnp.zeros(())}})
    with pytest.raises(ThinningError, match="factor: it is a single number"):
        thin(network, ROWS, {"factor": 0.5})


def test_thin_raises_for_two_names_of_the_same_units():
    with pytest.raises(ThinningError, match="w and b name the same units"):
        thin(by_hand(), ROWS, {"w": 0.5, "b": 0.5})


def test_depthwise_convolutions_cannot_be_thinned():
    def depthwise(x, drop):
        return conv(drop(nn.Conv(8, (3, 3), feature_group_count=8)(conv(x))))

    with pytest.raises(ThinningError, match="`conv_general_dilated`"):
        thin(of(depthwise), IMAGES)


def test_units_of_the_example_in_the_module_lie_where_it_says():
    """Dense, rectifier, dropout, dense: the operations, and the axis of the units in each array."""

    def train(leaves, x):
        w, v = leaves
        return tag_dropout("drop", jax.nn.relu(x @ w)) @ v, leaves

    w, v, x = jnp.ones((3, 8)), jnp.ones((8, 2)), jnp.ones((4, 3))
    program = flatten_jaxpr(jax.make_jaxpr(train)([w, v], x), num_leaves=2)
    operations = program.operations
    assert [operation.primitive for operation in operations] == [
        "dot_general",
        "max",
        "name",
        "dot_general",
    ]
    product, rectifier, site, _ = operations
    (d,), (e,), (f,) = product.outputs, rectifier.outputs, site.outputs
    group = UnitGroup("drop", 8, 0.5, 1, is_input=False, has_dropout=True)
    starts = [UnitAxis(array, 1, 1, reads=False, group=group) for array in (e, f)]
    links = follow_units(program, starts)
    axes = {*starts, *(link.there for link in links)}
    weights, readers = program.leaves
    assert {(axis.array, axis.axis, axis.reads) for axis in axes} == {
        (weights, 1, False),
        (d, 1, False),
        (e, 1, False),
        (f, 1, False),
        (readers, 0, True),
    }
    assert [
        (link.here.array, link.there.array) for link in links if link.here.reads < link.there.reads
    ] == [(f, readers)]
    check_zeros(program, starts[1], links)
    check_scales(links)
