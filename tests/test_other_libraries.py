"""Where the dropout of Flax, Haiku or Equinox goes wrong today, and what jdrop does there.

Each test has two halves. The first asserts the misbehaviour of the other library, so that this
list stays honest: when a library mends its ways, its test fails and says so. The second asserts
what jdrop does in its place.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox
import flax.linen
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdrop
import jdrop.linen
import jdrop.nnx

pytestmark = pytest.mark.grid

Dropout = Callable[..., jax.Array]
"""`dropout(key, x, rate, broadcast_dims=())`."""


def of_linen(key: Any, x: Any, rate: Any, **options: Any) -> Any:
    return flax.linen.Dropout(rate, deterministic=False, **options).apply({}, x, rng=key)


def of_nnx(key: Any, x: Any, rate: Any, **options: Any) -> Any:
    return nnx.Dropout(rate, **options)(x, rngs=key)


def of_haiku(key: Any, x: Any, rate: Any, **options: Any) -> Any:
    return haiku.dropout(key, rate, x, **options)


def of_equinox(key: Any, x: Any, rate: Any) -> Any:
    return equinox.nn.Dropout(rate)(x, key=key)


def our_linen(key: Any, x: Any, rate: Any, **options: Any) -> Any:
    layer = jdrop.linen.Dropout(0.1, deterministic=False, **options)
    return layer.apply({}, x, rng=key, rate=rate)


def our_nnx(key: Any, x: Any, rate: Any, **options: Any) -> Any:
    return jdrop.nnx.Dropout(0.1, **options)(x, rngs=key, rate=rate)


def fixed_linen(key: Any, x: Any, rate: float) -> Any:
    return jdrop.linen.Dropout(rate, deterministic=False).apply({}, x, rng=key)


def fixed_nnx(key: Any, x: Any, rate: float) -> Any:
    return jdrop.nnx.Dropout(rate)(x, rngs=key)


FLAX = [of_linen, of_nnx]
OURS = [jdrop.dropout, our_linen, our_nnx]


def name(value: Any) -> str:
    return value.__name__.removeprefix("of_") if callable(value) else str(value)


@pytest.mark.parametrize("rate", [-0.5, 1.5, math.nan])
@pytest.mark.parametrize("theirs", [*FLAX, of_equinox], ids=name)
def test_flax_and_equinox_accept_rates_out_of_range(theirs, rate, getkey):
    """Taken in silence: a negative one shrinks the inputs, the others make zeros of them."""
    y = theirs(getkey(), jnp.ones(64), rate)
    np.testing.assert_allclose(y, np.full(64, 2 / 3 if rate < 0 else 0), rtol=1e-6)

    for ours in OURS:
        with pytest.raises(ValueError, match="rate must lie in"):
            ours(getkey(), jnp.ones(64), rate)


def test_haiku_accepts_nan_as_rate(getkey):
    """Haiku checks the range, and NaN passes: the output is NaN."""
    assert jnp.isnan(haiku.dropout(getkey(), math.nan, jnp.ones(64))).all()

    with pytest.raises(ValueError, match="rate must lie in"):
        jdrop.dropout(getkey(), jnp.ones(64), math.nan)


@pytest.mark.parametrize("theirs", [of_haiku, of_equinox], ids=name)
def test_haiku_and_equinox_scale_by_a_traced_negative_rate(theirs, getkey):
    """Not checked and not seen: the output is the inputs times 2/3."""
    run = jax.jit(lambda key, rate: theirs(key, jnp.ones(64), rate))
    np.testing.assert_allclose(run(getkey(), -0.5), np.full(64, 2 / 3), rtol=1e-6)

    for ours in OURS:
        run = jax.jit(lambda key, rate, ours=ours: ours(key, jnp.ones(64), rate))
        assert jnp.isnan(run(getkey(), -0.5)).all()


@pytest.mark.parametrize("theirs", FLAX, ids=name)
def test_flax_refuses_a_traced_rate(theirs, getkey):
    """An error; so a rate that is annealed, or differs by member, is a compilation each."""
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda key, rate: theirs(key, jnp.ones(64), rate))(getkey(), 0.5)

    for ours in OURS:
        run = jax.jit(lambda key, rate, ours=ours: ours(key, jnp.ones(64), rate))
        assert set(np.unique(run(getkey(), 0.5))) == {0, 2}
        run(getkey(), 0.25)
        assert run._cache_size() == 1


def test_nnx_jit_refuses_an_array_as_rate(getkey):
    """Allowed where it is marked as data, and then an error under `nnx.jit`."""
    layer = nnx.Dropout(0.1, rngs=nnx.Rngs(getkey()))
    layer.rate = nnx.data(jnp.float32(0.5))
    forward = nnx.jit(lambda layer, x: layer(x))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        forward(layer, jnp.ones(64))

    layer = jdrop.nnx.Dropout(0.1, rngs=nnx.Rngs(getkey()))
    layer.rate = nnx.data(jnp.float32(0.5))
    assert set(np.unique(forward(layer, jnp.ones(64)))) == {0, 2}


def test_nnx_compiles_again_for_each_rate_and_equinox_for_each_python_number(getkey):
    """Equinox compiles once if the rate is an array, which nnx refuses."""
    rates, traces = (0.1, 0.2, 0.3), []

    def forward(layer: Any, x: jax.Array, **options: Any) -> jax.Array:
        traces.append(layer)
        return layer(x, **options)

    in_nnx, in_equinox = nnx.jit(forward), equinox.filter_jit(forward)
    for rate in rates:
        in_nnx(nnx.Dropout(rate, rngs=nnx.Rngs(getkey())), jnp.ones(8))
    assert len(traces) == 3
    for rate in rates:
        in_equinox(equinox.nn.Dropout(rate), jnp.ones(8), key=getkey())
    assert len(traces) == 6
    for rate in rates:
        in_equinox(equinox.nn.Dropout(jnp.float32(rate)), jnp.ones(8), key=getkey())
    assert len(traces) == 7

    layer = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(getkey()))
    for rate in rates:
        in_nnx(layer, jnp.ones(8), rate=rate)
    assert len(traces) == 8


@pytest.mark.parametrize("theirs", [*FLAX, of_haiku], ids=name)
def test_flax_and_haiku_refuse_a_rate_for_each_channel(theirs, getkey):
    """An error: an array has no truth value."""
    rates = jnp.array([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="truth value of an array"):
        theirs(getkey(), jnp.ones((64, 3)), rates)

    for ours in OURS:
        y = ours(getkey(), jnp.ones((64, 3)), rates)
        assert [set(np.unique(column)) for column in y.T] == [{1}, {0, 2}, {0}]


def gradient_at_one(
    dropout: Dropout, key: jax.Array, compile_function: Any = None, compile_gradient: Any = None
) -> jax.Array:
    """The gradient by the inputs, of a rate that is traced if either is compiled."""

    def run(x: jax.Array, rate: Any) -> jax.Array:
        return dropout(key, x, rate).sum()

    gradient = jax.grad(compile_function(run) if compile_function else run)
    return (compile_gradient(gradient) if compile_gradient else gradient)(jnp.ones(64), 1.0)


COMPILED = {
    "grad(f)": (None, None),
    "grad(jit(f))": (jax.jit, None),
    "jit(grad(f))": (None, jax.jit),
}


@pytest.mark.parametrize("form", COMPILED)
def test_equinox_gives_nan_gradients_at_rate_one(form, getkey):
    """NaN: the scale is 1 / 0."""
    assert jnp.isnan(gradient_at_one(of_equinox, getkey(), *COMPILED[form])).all()

    # The function wants a rate below 1 of a number; the layers do as Flax's and give zeros.
    for ours in OURS[1:] if form == "grad(f)" else OURS:
        assert (gradient_at_one(ours, getkey(), *COMPILED[form]) == 0).all()


def test_haiku_gives_nan_gradients_at_rate_one_of_a_compiled_function_only(getkey):
    """A gradient that is compiled as a whole is zero."""
    assert jnp.isnan(gradient_at_one(of_haiku, getkey(), *COMPILED["grad(jit(f))"])).all()
    assert (gradient_at_one(of_haiku, getkey(), *COMPILED["jit(grad(f))"]) == 0).all()


@pytest.mark.parametrize("theirs", [*FLAX, of_haiku], ids=name)
def test_flax_and_haiku_give_a_nonzero_gradient_of_the_rate(theirs, getkey):
    """That of the scale alone, the mask held still: not the gradient of the mean, which is 0."""
    x = jnp.ones(4096)
    gradient = jax.grad(lambda rate, key: theirs(key, x, rate).mean())
    # It is (number kept) / n / (1 - rate)^2, about 2: eight standard errors are 0.25.
    assert gradient(0.5, getkey()) == pytest.approx(2, abs=0.25)

    for ours in OURS:
        assert jax.grad(lambda rate, key, ours=ours: ours(key, x, rate).mean())(0.5, getkey()) == 0


@pytest.mark.parametrize("dim", [2, -3])
@pytest.mark.parametrize("theirs", [*FLAX, of_haiku], ids=name)
def test_broadcast_dims_out_of_range_raise_index_error_in_flax_and_haiku(theirs, dim, getkey):
    """An IndexError of a list; Haiku has a check, and it lets 2 pass for a matrix."""
    with pytest.raises(IndexError, match="list assignment index out of range"):
        theirs(getkey(), jnp.ones((3, 4)), 0.5, broadcast_dims=(dim,))

    for ours in OURS:
        with pytest.raises(ValueError, match=rf"broadcast_dims must lie in .*got {dim}"):
            ours(getkey(), jnp.ones((3, 4)), 0.5, broadcast_dims=(dim,))


@pytest.mark.parametrize("theirs", FLAX, ids=name)
def test_flax_names_lax_select_for_integer_inputs(theirs, getkey):
    """An error that speaks of `lax.select`, which the user did not call."""
    with pytest.raises(TypeError, match=r"lax\.select requires arguments to have the same dtypes"):
        theirs(getkey(), jnp.ones(8, int), 0.5)

    for ours in OURS:
        with pytest.raises(TypeError, match="x must be a float or complex array, got int32"):
            ours(getkey(), jnp.ones(8, int), 0.5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
@pytest.mark.parametrize("theirs", [of_haiku, of_equinox], ids=name)
def test_haiku_and_equinox_turn_integer_inputs_into_floats(theirs, dtype, getkey):
    """In silence, though with rate 0 they stay integers."""
    x = jnp.ones(8, dtype)
    assert theirs(getkey(), x, 0.5).dtype == jnp.float32
    assert theirs(getkey(), x, 0.0).dtype == dtype

    with pytest.raises(TypeError, match="x must be a float or complex array"):
        jdrop.dropout(getkey(), x, 0.0)


@pytest.mark.parametrize("theirs", FLAX, ids=name)
def test_flax_refuses_a_float32_rate_for_bfloat16_inputs(theirs, getkey):
    """An error of `lax.select`."""
    x, rate = jnp.ones(8, jnp.bfloat16), jnp.float32(0.5)
    with pytest.raises(TypeError, match=r"lax\.select requires arguments to have the same dtypes"):
        theirs(getkey(), x, rate)

    for ours in OURS:
        assert ours(getkey(), x, rate).dtype == jnp.bfloat16


@pytest.mark.parametrize("theirs", [of_haiku, of_equinox], ids=name)
def test_haiku_and_equinox_make_float32_of_bfloat16_inputs(theirs, getkey):
    """Traced or as an array: twice the memory from there on."""
    x, rate = jnp.ones(8, jnp.bfloat16), jnp.float32(0.5)
    assert theirs(getkey(), x, rate).dtype == jnp.float32

    for ours in OURS:
        assert ours(getkey(), x, rate).dtype == jnp.bfloat16


def percent_too_large(dropout: Dropout, key: jax.Array, rate: float, q: float) -> float:
    """Of the mean over all masks, for all bfloat16 numbers from 1 to 2; `q` keeps an element."""
    x = jnp.linspace(1, 2, 2**7, endpoint=False).astype(jnp.bfloat16)
    run = jax.jit(jax.vmap(lambda key: dropout(key, x, rate)))
    # All 500 masks drop an element with a probability below 0.9^500, 1e-23. The conversion is not
    # compiled with the dropout: XLA would leave out the rounding to bfloat16.
    kept = run(jax.random.split(key, 500)).max(axis=0)
    mean, expected = (np.asarray(values, np.float64).mean() for values in (kept, x))
    return 100 * (q * mean / expected - 1)


SHIFTS = {
    **{0.1: 0.178, 0.2: -0.091, 0.3: 0.102, 0.4: -0.270, 0.5: 0},
    **{0.6: -0.091, 0.7: -0.270, 0.8: -0.091, 0.9: -0.091},
}


SHIFTS_OF_ARRAYS = {
    **{0.1: -0.003, 0.2: -0.052, 0.3: -0.001, 0.4: -0.041, 0.5: 0},
    **{0.6: 0.047, 0.7: -0.041, 0.8: 0.047, 0.9: -0.046},
}


@pytest.mark.parametrize(("rate", "percent"), SHIFTS.items())
def test_other_libraries_shift_the_mean_of_bfloat16_inputs(rate, percent, getkey):
    """By up to 0.27 %: they round 1 - rate to bfloat16 before the division."""
    for theirs in (*FLAX, of_haiku, of_equinox):
        found = percent_too_large(theirs, getkey(), rate, 1 - rate)
        assert found == pytest.approx(percent, abs=5e-4)

    # Of 16 random bits.
    q = round((1 - rate) * 2**16) / 2**16
    for ours in (jdrop.dropout, fixed_linen, fixed_nnx):
        assert abs(percent_too_large(ours, getkey(), rate, q)) < 0.006
    # An array is divided by `q` itself, so that ties all round to the same side.
    of_array = percent_too_large(jdrop.dropout, getkey(), jnp.float32(rate), q)
    assert of_array == pytest.approx(SHIFTS_OF_ARRAYS[rate], abs=6e-4)


def stacked_residuals(dropout: Dropout) -> list[Any]:
    """What a scan over 16 steps keeps of each step for the backward pass of dropout."""
    x, keys = jnp.ones((8, 32)), jax.random.split(jax.random.key(0), 16)

    @jax.jit
    def backward(x: jax.Array) -> Any:
        steps = lambda x: jax.lax.scan(lambda x, key: (dropout(key, x, 0.5), None), x, keys)[0]  # noqa: E731
        return jax.vjp(steps, x)[1]

    return [leaf.dtype for leaf in jax.tree.leaves(backward(x)) if leaf.shape == (16, 8, 32)]


def test_other_libraries_store_a_mask_for_each_scan_step():
    """The mask, a byte an element; Haiku keeps it as floats, four bytes."""
    assert stacked_residuals(of_haiku) == [jnp.float32]
    for theirs in (*FLAX, of_equinox):
        assert stacked_residuals(theirs) == [jnp.bool_]

    for ours in OURS:
        assert stacked_residuals(ours) == []


def on_a_mesh(dropout: Dropout, key: jax.Array, **options: Any) -> jax.Array:
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("batch", None))
        return dropout(key, jax.device_put(jnp.ones((8, 4)), sharding), 0.5, **options)


def test_linen_refuses_explicitly_sharded_inputs():
    """An error in linen: the mask is not sharded as the inputs are."""
    # The type of this error is not public in JAX.
    with pytest.raises(Exception, match="select `which` must be scalar or have the same sharding"):
        on_a_mesh(of_linen, jax.random.key(0))

    for ours in OURS:
        expected = ours(jax.random.key(0), jnp.ones((8, 4)), 0.5)
        y = on_a_mesh(ours, jax.random.key(0))
        np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


def test_nnx_refuses_a_mask_shared_along_a_sharded_axis():
    """An error in nnx: an axis of size 1 is to be sharded."""
    with pytest.raises(ValueError, match="does not evenly divide the dimension size 1"):
        on_a_mesh(of_nnx, jax.random.key(0), broadcast_dims=(0,))

    for ours in OURS:
        y = np.asarray(on_a_mesh(ours, jax.random.key(0), broadcast_dims=(0,)))
        assert (y == y[0]).all()


def test_an_nnx_view_uses_up_a_key_and_replaying_masks_does_not():
    """`nnx.view` draws a key from the `Rngs` of a model, so the model goes on with other masks."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dropout = nnx.Dropout(0.5)
            self.rngs = rngs

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(x, rngs=self.rngs)

    model = Model(nnx.Rngs(0))
    nnx.view(model, deterministic=True)
    assert model.rngs.default.count[...] == 1

    network, x = jdrop.nnx.as_network(Model), jnp.ones((4, 8))
    variables = network.init(jax.random.key(0), x)
    outputs, masks = jdrop.network.record_masks(jax.random.key(1), network, variables, x)
    replayed = jdrop.network.replay_masks(network, masks)
    for key in (None, jax.random.key(2)):
        np.testing.assert_array_equal(replayed(variables, x, key), outputs)


def attention_layers(rate: float) -> list[Callable[[jax.Array], jax.Array]]:
    """Flax's attention layers and ours, with dropout of the weights and no other option."""

    def of_linen_layer(layer: Any) -> Callable[[jax.Array], jax.Array]:
        def run(x: jax.Array) -> jax.Array:
            rngs = {"dropout": jax.random.key(1)}
            variables = layer.init(jax.random.key(0), x, deterministic=True)
            return layer.apply(variables, x, deterministic=False, rngs=rngs)

        return run

    def of_nnx_layer(make: Any) -> Callable[[jax.Array], jax.Array]:
        layer = make(2, 8, dropout_rate=rate, decode=False, rngs=nnx.Rngs(0))
        return lambda x: layer(x, deterministic=False)

    return [
        of_linen_layer(flax.linen.MultiHeadDotProductAttention(2, dropout_rate=rate)),
        of_nnx_layer(nnx.MultiHeadAttention),
        of_linen_layer(jdrop.linen.MultiHeadDotProductAttention(2, dropout_rate=rate)),
        of_nnx_layer(jdrop.nnx.MultiHeadAttention),
    ]


@pytest.mark.slow
def test_flax_attention_drops_the_same_weights_of_all_examples_and_heads(getkey):
    """Flax drops the same weights of both, and of every head."""
    x = jnp.broadcast_to(jax.random.normal(getkey(), (1, 12, 8)), (2, 12, 8))
    *theirs, ours_linen, ours_nnx = (layer(x) for layer in attention_layers(0.5))
    for y in theirs:
        np.testing.assert_allclose(y[0], y[1], atol=1e-5)
    for y in (ours_linen, ours_nnx):
        assert np.abs(y[0] - y[1]).max() > 1e-3

    # Equal heads too, seen without the layers' own weights.
    q = jnp.broadcast_to(jax.random.normal(getkey(), (1, 12, 1, 4)), (1, 12, 2, 4))
    for module in (flax.linen, nnx):
        y = module.dot_product_attention(q, q, q, dropout_rng=getkey(), dropout_rate=0.5)
        np.testing.assert_allclose(y[:, :, 0], y[:, :, 1], atol=1e-5)
    y = jdrop.dot_product_attention(getkey(), q, q, q, dropout_rate=0.5)
    assert np.abs(y[:, :, 0] - y[:, :, 1]).max() > 1e-3


def test_flax_attention_holds_all_weights_for_the_gradient(getkey):
    """In Flax more than two arrays of all the weights, here less than half of one."""
    q = k = v = jax.random.normal(getkey(), (1, 2048, 1, 8))
    weights = 2048**2 * 4

    def temporary_bytes(attention: Callable[..., jax.Array], **options: Any) -> int:
        def loss(q: jax.Array) -> jax.Array:
            return attention(q, k, v, **options).sum()

        return jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes

    flax_options = {"dropout_rng": getkey(), "dropout_rate": 0.1, "broadcast_dropout": False}
    for theirs in (flax.linen.dot_product_attention, nnx.dot_product_attention):
        without = temporary_bytes(theirs)
        assert without > 2 * weights
        assert temporary_bytes(theirs, **flax_options) > without
    ours = jax.tree_util.Partial(jdrop.dot_product_attention, getkey())
    assert temporary_bytes(ours, dropout_rate=0.1) < weights / 2
