"""Rates: their range, their types, and the rates 0 and 1."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds
from dropouts import (
    assert_same_bits,
    channel_rates,
    kept_probability,
    signed_infinite_and_nan_values,
    wide,
)
from jax import Array

import jdrop

pytestmark = pytest.mark.grid

clone = jax.random.clone


# The types of a rate.

RATE_TYPES: dict[str, Callable[[float], Any]] = {
    "Python float": float,
    "NumPy scalar": np.float32,
    "NumPy array": lambda rate: np.asarray(rate, np.float64),
    "JAX array": lambda rate: jnp.asarray(rate, jnp.float32),
}


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(-0.1, "-0.1"), (1.5, "1.5"), (1, "1.0"), (2, "2.0"), (True, "1.0"), (math.nan, "nan"),
     (math.inf, "inf"), (-math.inf, "-inf"), (np.float32(-0.5), "-0.5"), (-1e-300, "-1e-300")],
)  # fmt: skip
def test_a_scalar_rate_out_of_range_raises(takes_a_rate, rate, shown):
    with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\), got {shown}\."):
        takes_a_rate(rate)


@pytest.mark.parametrize("wrong", [-0.25, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_an_array_with_a_rate_out_of_range_raises(takes_a_rate, wrong, xp, shape):
    rate = xp.asarray([0.5, wrong, 0.0] if shape else wrong)
    with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\], got .* holds {wrong}\."):
        takes_a_rate(rate)


@pytest.mark.parametrize("rate", [None, "0.5", [0.5], 0.5j, jnp.ones(3, bool), jnp.arange(2)])
def test_a_rate_that_is_no_float_raises(takes_a_rate, rate):
    with pytest.raises(TypeError, match="rate"):
        takes_a_rate(rate)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 4, 3), (4, 3, 1), (0,)])
def test_rates_that_do_not_broadcast_to_the_input_raise(takes_a_rate, shape):
    with pytest.raises(ValueError, match=r"rate must be broadcastable to the shape \(4, 3\)"):
        takes_a_rate(jnp.full(shape, 0.5))


def test_a_concrete_rate_is_checked_inside_jit():
    @jax.jit
    def run(x: Array) -> Array:
        return jdrop.dropout(jax.random.key(0), x, np.asarray(1.5))

    with pytest.raises(ValueError, match=r"1\.5"):
        run(jnp.ones(3))


@pytest.mark.parametrize("rate", [0.3, 0.95])
@pytest.mark.parametrize("rate_type", RATE_TYPES)
@pytest.mark.parametrize("scale", [True, False])
def test_the_output_does_not_depend_on_the_type_of_the_rate(rate, rate_type, scale, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (32, 33))
    expected = jdrop.dropout(clone(key), x, rate, scale=scale)
    assert_same_bits(
        jdrop.dropout(clone(key), x, RATE_TYPES[rate_type](rate), scale=scale), expected
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_traced_rate_equals_the_same_python_float(dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        key, x = getkey(), jax.random.normal(getkey(), (32, 33), jnp.float32)
        # Rates that need 16 bits in each dtype, since a Python float that needs fewer draws fewer.
        for rate in (0.03, 0.1):
            traced = jnp.asarray(rate, dtype)
            actual = jax.jit(jdrop.dropout)(clone(key), x, traced)
            assert_same_bits(actual, jdrop.dropout(clone(key), x, float(traced)))
            mask = jax.jit(jdrop.keep_mask, static_argnums=1)(clone(key), x.shape, traced)
            assert_same_bits(mask, jdrop.keep_mask(clone(key), x.shape, float(traced)))


def test_all_values_of_a_traced_rate_share_one_compilation(getkey):
    traces = []

    @jax.jit
    def run(key: Array, x: Array, rate: Array) -> Array:
        traces.append(rate)
        return jdrop.dropout(key, x, rate)

    for rate in (0.0, 0.1, 0.5, 1.0, -3.0, math.nan):
        run(getkey(), jnp.ones((4, 3)), jnp.float32(rate))
    assert len(traces) == 1


@pytest.mark.parametrize("rate", [0, 0.0, -0.0, False, np.float32(0)])
@pytest.mark.parametrize("scale", [True, False])
def test_at_rate_zero_the_input_is_returned_and_no_bits_are_drawn(rate, scale, getkey):
    x = jnp.ones((4, 3))
    assert jdrop.dropout(getkey(), x, rate, scale=scale) is x
    traced = jax.make_jaxpr(lambda key, x: jdrop.dropout(key, x, rate, scale=scale))(getkey(), x)
    assert not traced.eqns
    assert jdrop.keep_mask(getkey(), (4, 3), rate).all()
    assert "random" not in str(jax.make_jaxpr(lambda k: jdrop.keep_mask(k, (4,), rate))(getkey()))


def test_at_a_traced_rate_zero_the_output_is_the_input(dtype, getkey):
    x = signed_infinite_and_nan_values(dtype)

    @jax.jit
    def run(key: Array, x: Array, rate: Array) -> list[Array]:
        return [jdrop.dropout(clone(key), x, rate, scale=scale) for scale in (True, False)]

    for y in run(getkey(), x, 0.0):
        assert y.dtype == dtype
        np.testing.assert_array_equal(wide(y), wide(x))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("rate", [jnp.float32(1), jnp.array([1.0, 0.5, 1.0])])
def test_at_rate_one_all_is_zero_and_the_gradient_finite(rate, scale, getkey):
    x = jnp.array([[1.0, 2.0, math.nan], [math.inf, 3.0, -1.0]])
    ones = jnp.broadcast_to(rate == 1, x.shape)

    @jax.jit
    def run(key: Array, x: Array, rate: Array) -> tuple[Array, Any]:
        y, pull = jax.vjp(lambda x, rate: jdrop.dropout(key, x, rate, scale=scale), x, rate)
        return y, pull(jnp.ones_like(y))

    y, gradients = run(getkey(), x, rate)
    assert (y[ones] == 0).all()
    assert (gradients[0][ones] == 0).all()
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_at_rate_one_no_value_of_the_random_bits_keeps_an_element(getkey):
    # With more elements than 2**16, a comparison off by one keeps some.
    assert not jdrop.keep_mask(getkey(), (2**20,), jnp.float32(1)).any()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, "per channel"])
@pytest.mark.parametrize("scale", [True, False])
def test_the_gradient_with_respect_to_the_rate_is_zero(rate, scale, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (16, 5))
    rate = channel_rates(5) if rate == "per channel" else jnp.float32(rate)

    @jax.jit
    def through_dropout(rate: Array) -> Array:
        return jdrop.dropout(clone(key), x, rate, scale=scale).sum()

    @jax.jit
    def through_a_given_mask(rate: Array) -> Array:
        return jdrop.apply_mask(x > 0, x, rate, scale=scale).sum()

    for total in (through_dropout, through_a_given_mask):
        assert_same_bits(jax.grad(total)(rate), jnp.zeros_like(rate))
        assert jax.jvp(total, (rate,), (jnp.ones_like(rate),))[1] == 0


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
def test_a_traced_rate_out_of_range_poisons_the_output(scale, dtype, getkey):
    @jax.jit
    def run(key: Array, x: Array, rate: Array) -> Array:
        return jdrop.dropout(key, x, rate, scale=scale)

    for rate in (-1e-30, 1.0000002, math.nan):
        y = run(getkey(), jnp.ones((8, 8), dtype), jnp.float32(rate))
        assert y.dtype == dtype
        assert np.isnan(wide(y)).all()
        # In an array of rates, only the elements with that rate are NaN.
        rates = jnp.array([0.5, rate, 1.0])
        poisoned = np.isnan(wide(run(getkey(), jnp.ones((64, 3), dtype), rates)))
        np.testing.assert_array_equal(poisoned.all(axis=0), [False, True, False])
        np.testing.assert_array_equal(poisoned.any(axis=0), [False, True, False])


@pytest.mark.parametrize("rate", [1 + 1e-12, -1e-12, 1 - 1e-12, 1e-12])
@pytest.mark.parametrize("scale", [True, False])
def test_a_float64_rate_is_not_judged_by_its_float32_rounding(rate, scale, getkey):
    with jax.enable_x64(True):
        y = jax.jit(lambda *args: jdrop.dropout(*args, scale=scale))(
            getkey(), jnp.ones(2**20), jnp.float64(rate)
        )
        assert jnp.isnan(y).all() == (not 0 <= rate <= 1)
        if 0 <= rate <= 1:
            assert (y != 0).any()


@pytest.mark.parametrize("rate", [1 - 2**-24, 1 - 1e-12, math.nextafter(1, 0)])
def test_a_rate_just_below_one_keeps_some_elements_and_the_mean(rate, getkey):
    keep_prob = kept_probability(rate)
    assert 0 < keep_prob <= 2**-16
    n = 2**22
    y = jdrop.dropout(getkey(), jnp.ones(n), rate)
    low, high = binomial_bounds(n, float(keep_prob))
    assert low <= int((y != 0).sum()) <= high
    assert set(np.unique(y)) == {0, 1 / keep_prob}


def test_rates_by_channel_are_independent_dropouts(getkey):
    n, rates = 2**14, channel_rates(9)
    y = np.asarray(jdrop.dropout(getkey(), jnp.ones((n, 9)), rates))
    for column, rate in zip(y.T, np.asarray(rates), strict=True):
        low, high = binomial_bounds(n, float(kept_probability(jnp.asarray(rate))))
        assert low <= np.count_nonzero(column) <= high, f"rate {rate}"
