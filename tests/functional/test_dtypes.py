"""Dtypes and the scale: the values of kept elements."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dropouts import (
    RATES,
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


@pytest.mark.parametrize("scale", [True, False])
def test_outputs_keep_the_dtype_and_the_mask_does_not_depend_on_it(dtype, scale, getkey):
    rates = (0.3, jnp.float32(0.3), channel_rates(6))

    @jax.jit
    def run(key: Array, x: Array) -> tuple[list[Array], ...]:
        masks = [jdrop.keep_mask(clone(key), (8, 6), rate) for rate in rates]
        ys = [jdrop.dropout(clone(key), x, rate, scale=scale) for rate in rates]
        applied = [
            jdrop.apply_mask(mask, x, rate, scale=scale)
            for mask, rate in zip(masks, rates, strict=True)
        ]
        weights = [jdrop.scale_weights({"w": x.T}, {"w": rate})["w"] for rate in rates]
        return masks, ys, applied, weights

    masks, ys, applied, weights = run(getkey(), jnp.ones((8, 6), dtype))
    assert {y.dtype for y in (*ys, *applied, *weights)} == {dtype}
    for y, mask in zip(ys, masks, strict=True):
        assert_same_bits(np.asarray(y) != 0, mask)


@pytest.mark.parametrize("x", [1.0, 1j, np.ones(3), np.ones((2, 2), np.float16), np.float64(2)])
def test_python_and_numpy_inputs_equal_jax_inputs(x, getkey):
    key = getkey()
    expected = jdrop.dropout(clone(key), jnp.asarray(x), 0.3)
    assert_same_bits(jdrop.dropout(clone(key), x, 0.3), expected)


@pytest.mark.parametrize("x", [jnp.arange(3), jnp.ones(3, bool), 1, np.ones(2, np.uint8), True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_integer_and_boolean_inputs_raise(x, rate, getkey):
    message = "x must be a float or complex array, got u?(int|bool).*convert it first"
    with pytest.raises(TypeError, match=message):
        jdrop.dropout(getkey(), x, rate)
    with pytest.raises(TypeError, match=message):
        jdrop.apply_mask(jnp.ones(jnp.shape(x), bool), x, rate)
    with pytest.raises(TypeError, match="w must be a float or complex array"):
        jdrop.scale_weights({"w": x}, {"w": rate})


def test_dropped_infinities_and_nans_become_zero_and_kept_ones_stay(dtype, getkey):
    x, key = jnp.asarray(np.tile(signed_infinite_and_nan_values(dtype), 8)), getkey()
    cases = list(itertools.product((0.5, jnp.float32(0.5)), (True, False)))

    @jax.jit
    def run(key: Array, x: Array) -> list[tuple[Array, Array]]:
        return [
            (
                jdrop.keep_mask(clone(key), x.shape, rate),
                jdrop.dropout(clone(key), x, rate, scale=scale),
            )
            for rate, scale in cases
        ]

    for (_, scale), (mask, y) in zip(cases, run(key, x), strict=True):
        mask, y = np.asarray(mask), np.asarray(y)
        assert (y[~mask] == 0).all()
        for component in (np.real, np.imag):
            expected = component(wide(x))[mask] * (2 if scale else 1)
            np.testing.assert_array_equal(component(wide(y))[mask], expected)


def test_the_gradient_at_infinite_and_nan_inputs_is_finite(getkey):
    key, x = getkey(), jnp.tile(signed_infinite_and_nan_values(np.float32), 8)
    gradient = jax.grad(lambda x: jdrop.dropout(clone(key), x, 0.75).sum())(x)
    assert_same_bits(gradient, 4.0 * jdrop.keep_mask(key, x.shape, 0.75))


# The scale.


@pytest.mark.parametrize("traced", [False, True])
def test_the_scale_is_one_over_the_realised_probability_rounded_once(dtype, traced, getkey):
    if dtype.itemsize == 1:
        values = jnp.arange(0.5, 2, 0.125).astype(dtype)
    else:
        values = jax.random.normal(getkey(), (64,), dtype)
    mask = jnp.ones(1, bool)
    run = jax.jit(jdrop.apply_mask) if traced else jdrop.apply_mask
    x = np.asarray(values)
    real = np.float64 if dtype.name in ("float64", "complex128") else np.float32
    for rate in [*np.linspace(0.001, 0.999, 37).tolist(), 1e-5, 1 - 1e-5, *RATES]:
        factor = (1 / kept_probability(rate)).astype(real)
        # Short numbers are divided by 1 - rate itself, unless the bits realise it too coarsely.
        is_near = abs(kept_probability(rate) / (1 - rate) - 1) < 2**-13
        if is_near and not traced and jnp.finfo(dtype).nmant < 10:
            factor = np.float32(1 / (1 - rate))
        if np.iscomplexobj(x):
            expected = (x.real * factor + 1j * (x.imag * factor)).astype(dtype)
        else:
            with np.errstate(over="ignore"):
                expected = (x.astype(real) * factor).astype(dtype)
        rate = jnp.asarray(rate, real) if traced else rate
        assert_same_bits(run(mask, values, rate), expected)


SHIFTS = {
    False: [-0.003, -0.003, -0.001, -0.002, 0, -0.005, -0.002, -0.005, 0.003],
    True: [-0.003, -0.052, -0.001, -0.041, 0, 0.047, -0.041, 0.047, -0.046],
}
"""How much the mean of bfloat16 numbers shifts at rates 0.1, ..., 0.9, in percent."""


@pytest.mark.parametrize("traced", [False, True])
def test_rounding_shifts_the_mean_of_bfloat16_numbers_by_known_amounts(traced):
    """A traced rate has the scale 1 / q, beside which the ties round in one direction."""
    x = (1 + np.arange(128) / 128).astype(jnp.bfloat16)  # All from 1 to 2.
    run = jax.jit(jdrop.apply_mask) if traced else jdrop.apply_mask
    shifts = []
    for rate in [tenths / 10 for tenths in range(1, 10)]:
        y = np.asarray(run(True, x, jnp.float32(rate) if traced else rate))
        mean = kept_probability(rate) * wide(y).mean()
        shifts.append(100 * (mean / wide(x).mean() - 1))
    np.testing.assert_allclose(shifts, SHIFTS[traced], rtol=0, atol=5.1e-4)


@pytest.mark.parametrize("traced", [False, True])
def test_the_realised_probability_is_within_half_a_level_of_one_minus_the_rate(traced):
    rates = np.linspace(0, 1, 257, endpoint=False).astype(np.float32) + np.float32(1e-5)
    if traced:
        realised = jax.jit(kept_probability_traced)(rates)
    else:
        realised = np.array([kept_probability(float(rate)) for rate in rates])
    # Realised probabilities are multiples of 2**-16.
    assert_same_bits(np.asarray(realised * 2**16) % 1, np.zeros_like(np.asarray(realised)))
    np.testing.assert_allclose(realised, 1 - rates.astype(np.float64), rtol=0, atol=2**-17 + 1e-7)


def kept_probability_traced(rates: Array) -> Array:
    return jdrop.scale_weights({"w": jnp.ones(rates.shape)}, {"w": rates})["w"]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.5, np.array([0.0, 0.25, 0.3, 0.9])])
def test_the_mean_and_second_moment_over_all_masks_are_exact(rate, scale):
    with jax.enable_x64(True):
        x = np.array([1.0, -2.0, 0.5, 3.0])
        masks = np.array(list(itertools.product([False, True], repeat=4)))
        q = np.broadcast_to(kept_probability(rate), 4)
        probabilities = np.where(masks, q, 1 - q).prod(axis=1, keepdims=True)
        y = np.asarray(
            jax.vmap(lambda mask: jdrop.apply_mask(mask, jnp.asarray(x), rate, scale=scale))(masks)
        )
        mean, second = (probabilities * y).sum(axis=0), (probabilities * y**2).sum(axis=0)
        np.testing.assert_allclose(mean, x if scale else q * x, rtol=1e-14)
        np.testing.assert_allclose(second, x**2 / q if scale else q * x**2, rtol=1e-14)
