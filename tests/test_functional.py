"""What a user of the functions may rely on, whatever generator draws the masks."""

import contextlib
import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds, chi_square_bounds, mean_bound
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdrop
from jdrop import functional

clone = jax.random.clone

# Exact in 1, 2, 4 and 8 bits, and in none: a generator may spend fewer bits where fewer do.
RATES = [0.5, 0.25, 0.75, 0.0625, 0.30078125, 0.05, 0.1, 0.3, 0.7, 0.9, 0.95]

DTYPES = [
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest):
    """Each float and complex dtype, in a mode of JAX that has it."""
    with jax.enable_x64(request.param in ("float64", "complex128")):
        yield np.dtype(request.param)


def kept_probability(rate: Any) -> np.ndarray:
    """The probability that the bits realise, as the library itself declares it."""
    ones = np.ones(np.shape(rate), np.float32)
    return np.asarray(jdrop.scale_weights({"w": ones}, {"w": rate})["w"], np.float64)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), f"{actual} is not {expected}"


def wide(x: Any) -> np.ndarray:
    """The same values in a dtype of NumPy's own, in which one NaN equals another in a test."""
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def channel_rates(n: int) -> Array:
    return jnp.linspace(0.0, 1.0, n)


# Rates in each form in which they come: known while tracing, or data.

FORMS: dict[str, Callable[[float], Any]] = {
    "number": float,
    "NumPy scalar": np.float32,
    "NumPy array": lambda rate: np.asarray(rate, np.float64),
    "JAX array": lambda rate: jnp.asarray(rate, jnp.float32),
}

TAKES_A_RATE: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda rate: jdrop.dropout(jax.random.key(0), jnp.ones((4, 3)), rate),
    "keep_mask": lambda rate: jdrop.keep_mask(jax.random.key(0), (4, 3), rate),
    "apply_mask": lambda rate: jdrop.apply_mask(jnp.ones((4, 3), bool), jnp.ones((4, 3)), rate),
    "unscaled": lambda rate: jdrop.apply_mask(
        jnp.ones((4, 3), bool), jnp.ones((4, 3)), rate, scale=False
    ),
    "scale_weights": lambda rate: jdrop.scale_weights({"w": jnp.ones((4, 3))}, {"w": rate}),
}


@pytest.fixture(params=TAKES_A_RATE)
def takes_a_rate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return TAKES_A_RATE[request.param]


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(-0.1, "-0.1"), (1.5, "1.5"), (1, "1.0"), (2, "2.0"), (True, "1.0"), (math.nan, "nan"),
     (math.inf, "inf"), (-math.inf, "-inf"), (np.float32(-0.5), "-0.5"), (-1e-300, "-1e-300")],
)  # fmt: skip
def test_a_number_out_of_range_is_named(takes_a_rate, rate, shown):
    with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\), got {shown}\."):
        takes_a_rate(rate)


@pytest.mark.parametrize("wrong", [-0.25, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("among", [False, True])
def test_an_array_out_of_range_is_named(takes_a_rate, wrong, xp, among):
    rate = xp.asarray([0.5, wrong, 0.0] if among else wrong)
    with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\], got .* holds {wrong}\."):
        takes_a_rate(rate)


@pytest.mark.parametrize("rate", [None, "0.5", [0.5], 0.5j, jnp.ones(3, bool), jnp.arange(2)])
def test_what_is_no_float_is_no_rate(takes_a_rate, rate):
    with pytest.raises(TypeError, match="rate"):
        takes_a_rate(rate)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 4, 3), (4, 3, 1), (0,)])
def test_rates_that_do_not_fit_are_refused(takes_a_rate, shape):
    with pytest.raises(ValueError, match=r"rate must be broadcastable to the shape \(4, 3\)"):
        takes_a_rate(jnp.full(shape, 0.5))


def test_a_concrete_array_is_checked_while_other_things_are_traced():
    @jax.jit
    def run(x: Array) -> Array:
        return jdrop.dropout(jax.random.key(0), x, np.asarray(1.5))

    with pytest.raises(ValueError, match=r"1\.5"):
        run(jnp.ones(3))


@pytest.mark.parametrize("rate", [0.3, 0.95])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [True, False])
def test_a_rate_gives_the_same_in_each_form(rate, form, scale, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (32, 33))
    expected = jdrop.dropout(clone(key), x, rate, scale=scale)
    assert_same_bits(jdrop.dropout(clone(key), x, FORMS[form](rate), scale=scale), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_traced_rate_gives_what_its_value_gives(dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        key, x = getkey(), jax.random.normal(getkey(), (32, 33), jnp.float32)
        # Rates that need 16 bits in each dtype: a number that needs fewer is drawn with fewer.
        for rate in (0.01, 0.03, 0.05, 0.1):
            traced = jnp.asarray(rate, dtype)
            actual = jax.jit(jdrop.dropout)(clone(key), x, traced)
            assert_same_bits(actual, jdrop.dropout(clone(key), x, float(traced)))
            mask = jax.jit(jdrop.keep_mask, static_argnums=1)(clone(key), x.shape, traced)
            assert_same_bits(mask, jdrop.keep_mask(clone(key), x.shape, float(traced)))


def test_a_traced_rate_is_compiled_once(getkey):
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
def test_at_rate_zero_the_input_itself_returns_and_nothing_is_drawn(rate, scale, getkey):
    x = jnp.ones((4, 3))
    assert jdrop.dropout(getkey(), x, rate, scale=scale) is x
    traced = jax.make_jaxpr(lambda key, x: jdrop.dropout(key, x, rate, scale=scale))(getkey(), x)
    assert not traced.eqns
    assert jdrop.keep_mask(getkey(), (4, 3), rate).all()
    assert "random" not in str(jax.make_jaxpr(lambda k: jdrop.keep_mask(k, (4,), rate))(getkey()))


def values_of_all_kinds(dtype: Any) -> Array:
    values = np.array([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan])
    if np.issubdtype(dtype, np.complexfloating):
        values = np.array([complex(a, b) for a, b in itertools.product(values, values)])
    return jnp.asarray(values.astype(dtype))


@pytest.mark.parametrize("scale", [True, False])
def test_at_a_traced_rate_zero_the_output_is_the_input(dtype, scale, getkey):
    x = values_of_all_kinds(dtype)
    y = jax.jit(lambda key, x, rate: jdrop.dropout(key, x, rate, scale=scale))(getkey(), x, 0.0)
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


def test_at_rate_one_no_bits_whatever_keep_an_element(getkey):
    # More elements than 16 bits have values, so a comparison off by one shows.
    assert not jdrop.keep_mask(getkey(), (2**20,), jnp.float32(1)).any()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, "per channel"])
@pytest.mark.parametrize("scale", [True, False])
def test_the_gradient_with_respect_to_the_rate_is_zero(rate, scale, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (16, 5))
    rate = channel_rates(5) if rate == "per channel" else jnp.float32(rate)

    def through_dropout(rate: Array) -> Array:
        return jdrop.dropout(clone(key), x, rate, scale=scale).sum()

    def through_a_given_mask(rate: Array) -> Array:
        return jdrop.apply_mask(x > 0, x, rate, scale=scale).sum()

    for total in (through_dropout, through_a_given_mask):
        assert_same_bits(jax.grad(total)(rate), jnp.zeros_like(rate))
        assert jax.jvp(total, (rate,), (jnp.ones_like(rate),))[1] == 0


@pytest.mark.parametrize("rate", [-1e-30, 1.0000002, math.nan])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
def test_a_traced_rate_out_of_range_poisons_the_output(rate, scale, dtype, getkey):
    @jax.jit
    def run(key: Array, x: Array, rate: Array) -> Array:
        return jdrop.dropout(key, x, rate, scale=scale)

    y = run(getkey(), jnp.ones((8, 8), dtype), jnp.float32(rate))
    assert y.dtype == dtype
    assert jnp.isnan(y).all()
    # And no more than the places that it rules.
    rates = jnp.array([0.5, rate, 1.0])
    y = run(getkey(), jnp.ones((64, 3), dtype), rates)
    np.testing.assert_array_equal(jnp.isnan(y).all(axis=0), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(y).any(axis=0), [False, True, False])


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
def test_just_below_one_something_is_kept_and_the_mean_held(rate, getkey):
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


# Dtypes.


@pytest.mark.parametrize("rate", ["number", "array", "per channel"])
@pytest.mark.parametrize("scale", [True, False])
def test_the_dtype_is_kept_and_the_mask_is_the_same_in_each(dtype, rate, scale, getkey):
    rate = {"number": 0.3, "array": jnp.float32(0.3), "per channel": channel_rates(6)}[rate]
    key = getkey()
    mask = jdrop.keep_mask(clone(key), (8, 6), rate)
    y = jdrop.dropout(clone(key), jnp.ones((8, 6), dtype), rate, scale=scale)
    assert y.dtype == dtype
    assert_same_bits(y != 0, mask)
    assert jdrop.apply_mask(mask, jnp.ones((8, 6), dtype), rate, scale=scale).dtype == dtype
    assert jdrop.scale_weights({"w": jnp.ones((6, 8), dtype)}, {"w": rate})["w"].dtype == dtype


@pytest.mark.parametrize("x", [1.0, 1j, np.ones(3), np.ones((2, 2), np.float16), np.float64(2)])
def test_python_and_numpy_values_are_taken(x, getkey):
    key = getkey()
    expected = jdrop.dropout(clone(key), jnp.asarray(x), 0.3)
    assert_same_bits(jdrop.dropout(clone(key), x, 0.3), expected)


@pytest.mark.parametrize("x", [jnp.arange(3), jnp.ones(3, bool), 1, np.ones(2, np.uint8), True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_integers_and_booleans_are_refused(x, rate, getkey):
    message = "x must be a float or complex array, got u?(int|bool).*convert it first"
    with pytest.raises(TypeError, match=message):
        jdrop.dropout(getkey(), x, rate)
    with pytest.raises(TypeError, match=message):
        jdrop.apply_mask(jnp.ones(jnp.shape(x), bool), x, rate)
    with pytest.raises(TypeError, match="w must be a float or complex array"):
        jdrop.scale_weights({"w": x}, {"w": rate})


@pytest.mark.parametrize("rate", [0.5, jnp.float32(0.5)])
@pytest.mark.parametrize("scale", [True, False])
def test_infinities_and_nans_are_gone_where_dropped_and_kept_where_not(dtype, rate, scale, getkey):
    x = jnp.tile(values_of_all_kinds(dtype), 8)
    key = getkey()
    mask = np.asarray(jdrop.keep_mask(clone(key), x.shape, rate))
    y = np.asarray(jdrop.dropout(key, x, rate, scale=scale))
    assert (y[~mask] == 0).all()
    for part in (np.real, np.imag):
        expected = part(wide(x))[mask] * (2 if scale else 1)
        np.testing.assert_array_equal(part(wide(y))[mask], expected)


def test_the_gradient_is_finite_where_the_input_is_not(getkey):
    key, x = getkey(), jnp.tile(values_of_all_kinds(np.float32), 8)
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
        if np.iscomplexobj(x):
            expected = (x.real * factor + 1j * (x.imag * factor)).astype(dtype)
        else:
            with np.errstate(over="ignore"):
                expected = (x.astype(real) * factor).astype(dtype)
        rate = jnp.asarray(rate, real) if traced else rate
        assert_same_bits(run(mask, values, rate), expected)


@pytest.mark.parametrize("traced", [False, True])
def test_the_realised_probability_is_within_half_a_level_of_the_wanted_one(traced):
    rates = np.linspace(0, 1, 257, endpoint=False).astype(np.float32) + np.float32(1e-5)
    if traced:
        realised = jax.jit(kept_probability_traced)(rates)
    else:
        realised = np.array([kept_probability(float(rate)) for rate in rates])
    # Numbers of 16 bits, or fewer.
    assert_same_bits(np.asarray(realised * 2**16) % 1, np.zeros_like(np.asarray(realised)))
    np.testing.assert_allclose(realised, 1 - rates.astype(np.float64), rtol=0, atol=2**-17 + 1e-7)


def kept_probability_traced(rates: Array) -> Array:
    return jdrop.scale_weights({"w": jnp.ones(rates.shape)}, {"w": rates})["w"]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_mean_is_the_input_and_the_variance_as_it_should_be(rate, dtype, getkey):
    # Spread over a binade, for the rounding of a single x would be a bias of its own.
    x = jax.random.uniform(getkey(), (2**20,), minval=1, maxval=2).astype(dtype)
    y = np.asarray(jdrop.dropout(getkey(), x, rate), np.float64)
    x = np.asarray(x, np.float64)
    q = float(kept_probability(rate))
    p = 1 - q

    bound = mean_bound(p / q * np.mean(x**2), x.size)
    assert abs(y.mean() - x.mean()) < bound, f"mean {y.mean()}, expected {x.mean()} +- {bound}"

    squares, expected = np.mean((y - x) ** 2), p / q * np.mean(x**2)
    # (y - x)^2 is x^2 (p/q)^2 with probability q and x^2 with probability p.
    spread = np.mean(x**4) * p * q * (1 - (p / q) ** 2) ** 2
    # Rounding to 8 bits adds its own share; at rate 0.5 there is neither spread nor rounding.
    bound = mean_bound(spread, x.size) + 2**-8 * expected
    assert abs(squares - expected) <= bound, f"{squares}, expected {expected} +- {bound}"


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.5, np.array([0.0, 0.25, 0.3, 0.9])])
def test_over_all_masks_the_moments_are_exact(rate, scale):
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


# The masks, as random variables.


@pytest.mark.parametrize("rate", [*RATES, *np.linspace(0.15, 0.85, 8).round(2), 1 - 1e-6])
def test_the_kept_fraction_is_the_realised_probability(rate, getkey):
    n = 2**20
    kept = int(jdrop.keep_mask(getkey(), (1024, 1024), float(rate)).sum())
    low, high = binomial_bounds(n, float(kept_probability(float(rate))))
    assert low <= kept <= high, f"kept {kept} of {n}, expected {low} to {high}"


def correlation_bound_check(a: np.ndarray, b: np.ndarray, q: float, what: Any) -> None:
    actual = np.mean((a - q) * (b - q))
    bound = mean_bound((q * (1 - q)) ** 2, a.size)
    assert abs(actual) < bound, f"{what}: covariance {actual}, expected 0 +- {bound}"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", [(512, 512), (511, 513), (2**18,), (2**12, 8, 8)])
def test_elements_are_independent_of_their_neighbours_near_and_far(rate, shape, getkey):
    """At all lags of powers of 2, along which a generator that splits words may repeat itself."""
    mask = np.asarray(jdrop.keep_mask(getkey(), shape, rate)).astype(float)
    q = float(kept_probability(rate))
    flat = mask.ravel()
    for lag in itertools.takewhile(lambda lag: lag <= flat.size // 2, (2**i for i in range(30))):
        correlation_bound_check(flat[lag:], flat[:-lag], q, f"lag {lag}")
    for part in (2, 3, 4, 8, 16):
        lag = flat.size // part
        correlation_bound_check(flat[lag:], flat[:-lag], q, f"lag 1/{part}")
    for axis in range(mask.ndim):
        ahead, behind = np.split(mask, [1], axis)[1], np.split(mask, [-1], axis)[0]
        correlation_bound_check(ahead, behind, q, f"axis {axis}")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_vary_as_they_should(rate, axis, getkey):
    mask = np.asarray(jdrop.keep_mask(getkey(), (512, 512), rate))
    q = float(kept_probability(rate))
    counts = mask.sum(axis=axis)
    statistic = np.sum((counts - 512 * q) ** 2) / (512 * q * (1 - q))
    low, high = chi_square_bounds(512)
    assert low < statistic < high, f"chi-square {statistic}, expected {low} to {high}"


@pytest.mark.parametrize("rate", RATES)
def test_the_patterns_of_four_elements_have_their_frequencies(rate, getkey):
    """Where four elements share a word, more may be wrong than pairs can show."""
    mask = np.asarray(jdrop.keep_mask(getkey(), (2**18, 4), rate))
    q = float(kept_probability(rate))
    patterns = np.array(list(itertools.product([0, 1], repeat=4)))
    expected = len(mask) * np.where(patterns, q, 1 - q).prod(axis=1)
    observed = np.bincount(mask @ np.array([8, 4, 2, 1]), minlength=16)
    rare = expected < 20
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = np.sum((observed - expected) ** 2 / expected)
    low, high = chi_square_bounds(len(expected) - 1)
    assert low < statistic < high, f"chi-square {statistic}: {observed}, expected {expected}"


@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.parametrize("make_keys", ["split", "fold_in", "seeds"])
def test_keys_are_independent_at_each_place_and_pair_of_places(rate, make_keys, getkey):
    n, places = 2**14, 64
    keys = {
        "split": lambda: jax.random.split(getkey(), n),
        "fold_in": lambda: jax.vmap(jax.random.fold_in, (None, 0))(getkey(), jnp.arange(n)),
        "seeds": lambda: jax.vmap(jax.random.key)(jnp.arange(n)),
    }[make_keys]()
    masks = np.asarray(jax.jit(jax.vmap(lambda key: jdrop.keep_mask(key, (places,), rate)))(keys))
    q = float(kept_probability(rate))
    deviations = (masks - q) / math.sqrt(q * (1 - q))
    assert np.abs(deviations.mean(axis=0)).max() < mean_bound(1, n)
    covariances = deviations.T @ deviations / n - np.diag((deviations**2).mean(axis=0))
    assert np.abs(covariances).max() < mean_bound(1, n)
    between_keys = deviations[1:].T @ deviations[:-1] / (n - 1)
    assert np.abs(between_keys).max() < mean_bound(1, n - 1)


# The mask is the same however it is computed.


@dataclass(frozen=True)
class Case:
    """Arguments of dropout for an input of shape (8, 6)."""

    rate: float | tuple[float, ...]
    broadcast_dims: tuple[int, ...] = ()
    scale: bool = True

    def __call__(self, key: Array, x: Array) -> Array:
        rate = jnp.array(self.rate) if isinstance(self.rate, tuple) else self.rate
        options = {"broadcast_dims": self.broadcast_dims, "scale": self.scale}
        return jdrop.dropout(key, x, rate, **options)

    def multiplier(self, key: Array, dtype: Any = jnp.float32) -> Array:
        """Mask times scale: what the linear map that dropout is for one key multiplies by."""
        return self(clone(key), jnp.ones((8, 6), dtype))


@pytest.fixture(
    params=[
        Case(0.5), Case(0.3), Case(0.25, (0,)), Case(0.3, (-2, -1), False),
        Case((0.0, 0.1, 0.3, 0.5, 0.9, 1.0)), Case((0.0, 0.1, 0.3, 0.5, 0.9, 1.0), (0,)),
    ],
    ids=str,
)  # fmt: skip
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def x() -> Array:
    return jax.random.normal(jax.random.key(1202), (8, 6))


def test_dropout_is_its_two_steps(case, x, getkey):
    key = getkey()
    shape = tuple(1 if axis - 2 in case.broadcast_dims or axis in case.broadcast_dims else size
                  for axis, size in enumerate(x.shape))  # fmt: skip
    rate = jnp.array(case.rate) if isinstance(case.rate, tuple) else case.rate
    mask = jdrop.keep_mask(clone(key), shape, rate)
    assert_same_bits(jdrop.apply_mask(mask, x, rate, scale=case.scale), case(key, x))


def test_under_jit_remat_and_both(case, x, getkey):
    key = getkey()
    expected = case(clone(key), x)
    for transform in (jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))):
        assert_same_bits(transform(case)(clone(key), x), expected)


def test_under_vmap_over_keys(case, x, getkey):
    keys = jax.random.split(getkey(), 5)
    expected = jnp.stack([case(key, x) for key in clone(keys)])
    assert_same_bits(jax.vmap(case, (0, None))(clone(keys), x), expected)
    assert_same_bits(jax.jit(jax.vmap(case, (0, None)))(clone(keys), x), expected)
    with_batch = jax.vmap(case)(clone(keys), jnp.broadcast_to(x, (5, 8, 6)))
    assert_same_bits(with_batch, expected)


def test_under_vmap_over_two_axes_of_keys(case, x, getkey):
    keys = jax.random.split(getkey(), (2, 3))
    expected = jnp.stack([jnp.stack([case(key, x) for key in row]) for row in clone(keys)])
    twice = jax.vmap(jax.vmap(case, (0, None)), (0, None))
    assert_same_bits(twice(clone(keys), x), expected)


def test_under_vmap_over_inputs(case, x, getkey):
    key, xs = getkey(), jnp.stack([x, 2 * x, -x], axis=1)
    expected = jnp.stack([case(clone(key), x) for x in jnp.unstack(xs, axis=1)])
    assert_same_bits(jax.vmap(case, (None, 1))(clone(key), xs), expected)


def test_under_vmap_over_rates(x, getkey):
    key, rates = getkey(), jnp.array([0.0, 0.1, 0.3, 0.9, 1.0])
    expected = jnp.stack([jdrop.dropout(clone(key), x, rate) for rate in rates])
    actual = jax.vmap(jdrop.dropout, (None, None, 0))(clone(key), x, rates)
    assert_same_bits(actual, expected)


def test_members_with_their_own_keys_inputs_and_rates(x, getkey):
    keys, xs = jax.random.split(getkey(), 3), jnp.stack([x, 2 * x, -x])
    rates = jnp.stack([channel_rates(6), jnp.full(6, 0.3), jnp.zeros(6)])
    expected = jnp.stack(list(map(jdrop.dropout, clone(keys), xs, rates)))
    assert_same_bits(jax.vmap(jdrop.dropout)(clone(keys), xs, rates), expected)


def test_under_scan(case, x, getkey):
    keys = jax.random.split(getkey(), 4)

    def step(carry: Array, key: Array) -> tuple[Array, Array]:
        y = case(key, carry)
        return y, y

    expected = list(itertools.accumulate(clone(keys), lambda x, key: case(key, x), initial=x))
    assert_same_bits(jax.lax.scan(step, x, clone(keys))[1], jnp.stack(expected[1:]))


def test_under_scan_with_remat_the_gradient_has_the_masks_of_the_output(case, x, getkey):
    keys = jax.random.split(getkey(), 4)

    def total(x: Array, remat: bool) -> Array:
        def step(carry: Array, key: Array) -> tuple[Array, None]:
            return case(key, carry), None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, clone(keys))[0].sum()

    product = math.prod(case.multiplier(key) for key in clone(keys))
    for remat in (False, True):
        np.testing.assert_allclose(jax.grad(total)(x, remat), product, rtol=1e-6)


def test_inside_cond_and_while(case, x, getkey):
    key = getkey()
    expected = case(clone(key), x)
    run = jax.jit(lambda p, key, x: jax.lax.cond(p, case, lambda key, x: x, key, x))
    assert_same_bits(run(True, clone(key), x), expected)
    once = jax.lax.fori_loop(0, 1, lambda _, x: case(clone(key), x), x)
    assert_same_bits(once, expected)


def test_derivatives_are_mask_times_scale(case, x, getkey):
    key, direction = getkey(), jax.random.normal(getkey(), (8, 6))
    multiplier = case.multiplier(key)

    def run(x: Array) -> Array:
        return case(clone(key), x)

    y, tangent = jax.jvp(run, (x,), (direction,))
    assert_same_bits(y, case(clone(key), x))
    assert_same_bits(tangent, jdrop.apply_mask(multiplier != 0, direction * multiplier, 0.0))
    y, pull = jax.vjp(run, x)
    assert_same_bits(y, case(clone(key), x))
    np.testing.assert_array_equal(pull(direction)[0], direction * multiplier)
    np.testing.assert_array_equal(jax.linearize(run, x)[1](direction), direction * multiplier)
    np.testing.assert_array_equal(jax.linear_transpose(run, x)(direction)[0],
                                  direction * multiplier)  # fmt: skip


def test_second_derivatives(case, x, getkey):
    key, x = getkey(), x.ravel()[:48]
    square = case.multiplier(key).ravel() ** 2

    def energy(x: Array) -> Array:
        return 0.5 * (case(clone(key), x.reshape(8, 6)) ** 2).sum()

    for hessian in (
        jax.hessian(energy),
        jax.jacrev(jax.jacfwd(energy)),
        jax.jacrev(jax.jacrev(energy)),
    ):
        np.testing.assert_allclose(hessian(x), jnp.diag(square), rtol=1e-6)


def test_the_derivative_of_a_complex_input(getkey):
    key, x = getkey(), jnp.ones((8, 6), jnp.complex64)
    mask = jdrop.keep_mask(clone(key), (8, 6), 0.5)
    gradient = jax.grad(lambda x: jdrop.dropout(clone(key), x, 0.5).real.sum())(x)
    assert_same_bits(gradient, jnp.where(mask, 2 + 0j, 0j).astype(jnp.complex64))


# Sharding.

SPECS = [P("a", "b"), P(("b", "a"), None), P(None, "b")]


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))


@pytest.fixture
def wide_x() -> Array:
    return jax.random.normal(jax.random.key(1207), (16, 8))


SHARDED_CASES = [
    Case(0.3), Case(0.5, (0,)), Case(0.3, (0, 1), False),
    Case((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)),
    Case((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0), (0,)),
]  # fmt: skip


@pytest.mark.parametrize("case", SHARDED_CASES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_explicitly_sharded(case, spec, jit, wide_x, getkey):
    def output_and_gradient(key: Array, x: Array) -> tuple[Array, Array]:
        y, pull = jax.vjp(lambda x: case(key, x), x)
        return y, pull(x)[0]

    key = getkey()
    expected = case(clone(key), wide_x)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        x = jax.device_put(wide_x, spec)
        run = jax.jit(output_and_gradient) if jit else output_and_gradient
        for result in run(clone(key), x):
            assert jax.typeof(result).sharding.spec == jax.typeof(x).sharding.spec
            assert result.sharding.is_equivalent_to(x.sharding, 2)
            # The map is linear and symmetric, so what pulls x back is what pushes it on.
            assert_same_bits(result, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 1)])
def test_an_explicitly_sharded_mask_is_drawn_where_it_is_used(spec, dims, wide_x, getkey):
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        mask = functional.draw_mask_like(getkey(), jax.device_put(wide_x, spec), 0.3, dims)
        expected = P(*(None if axis in dims else name for axis, name in enumerate(spec)))
        assert jax.typeof(mask).sharding.spec == expected


@pytest.mark.parametrize("case", SHARDED_CASES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_automatically_sharded(case, spec, wide_x, getkey):
    key = getkey()
    expected = case(clone(key), wide_x)
    sharding = NamedSharding(mesh_of(AxisType.Auto), spec)
    x = jax.device_put(wide_x, sharding)
    assert_same_bits(jax.jit(case, out_shardings=sharding)(clone(key), x), expected)


ANY_SHARDING = [
    ((24, 100), P(("a", "b"))), ((8, 13), P(("a", "b"))), ((8, 1), P(("a", "b"))),
    ((40000,), P(("a", "b"))), ((64, 1000), P("a", "b")), ((8, 8, 257), P("a", "b")),
    ((16, 64, 256), P("a", "b")), ((16, 64, 256), P(None, "a", "b")), ((16, 3, 1024), P("a")),
    ((128, 1024), P("a", "b")), ((128, 1024), P(None, ("a", "b"))), ((128, 1024), P("b")),
    ((8, 24576), P(None, ("a", "b"))), ((512, 4096), P(("a", "b"))), ((512, 4096), P("b", "a")),
]  # fmt: skip
"""Parts that are whole blocks of bits and parts that are not, along each axis."""


def collectives(compiled: Any) -> set[str]:
    names = (
        r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    )
    return set(re.findall(names, compiled.as_text()))


@pytest.mark.parametrize(
    ("axis_type", "rate"),
    [(AxisType.Auto, 0.5), (AxisType.Auto, 0.1), (AxisType.Explicit, 0.1)],
)
@pytest.mark.parametrize(("shape", "spec"), ANY_SHARDING, ids=str)
def test_a_sharded_dropout_sends_nothing(shape, spec, rate, axis_type, getkey):
    key, x = getkey(), jnp.ones(shape)
    mesh = mesh_of(axis_type)
    sharding = NamedSharding(mesh, spec)

    def output_and_gradient(key: Array, x: Array) -> tuple[Array, Array]:
        y, pull = jax.vjp(lambda x: jdrop.dropout(key, jnp.sin(x), rate), x)
        return y, pull(y)[0]

    expected = jdrop.dropout(clone(key), jnp.sin(x), rate)
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext():
        sharded = jax.device_put(x, sharding)
        run = jax.jit(output_and_gradient, out_shardings=sharding)
        assert not collectives(run.lower(clone(key), sharded).compile())
        assert_same_bits(run(clone(key), sharded)[0], expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dims", [(), (0,), (1,), (2,), (0, 2)])
def test_nor_does_one_with_broadcast_dims_or_rates_of_channels(dims, axis_type, getkey):
    mesh, key = mesh_of(axis_type), getkey()
    rates = jnp.linspace(0.0, 0.9, 24)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 20, 24)), NamedSharding(mesh, P("a", "b")))
        for rate in (0.1, rates) if 2 not in dims else (0.1,):
            run = jax.jit(
                lambda key, x, rate=rate: jdrop.dropout(key, x, rate, broadcast_dims=dims),
                out_shardings=x.sharding,
            )
            assert not collectives(run.lower(clone(key), x).compile())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nor_do_members_over_the_mesh(axis_type, getkey):
    mesh, keys = mesh_of(axis_type), jax.random.split(getkey(), 8)
    with jax.set_mesh(mesh):
        keys = jax.device_put(keys, P("a"))
        xs = jax.device_put(jnp.ones((8, 50, 100)), P("a", "b"))
        run = jax.jit(
            jax.vmap(lambda key, x: jdrop.dropout(key, x, 0.1)), out_shardings=xs.sharding
        )
        assert not collectives(run.lower(keys, xs).compile())


@pytest.mark.parametrize("rates", [P("b"), P("a"), P(None)], ids=str)
def test_rates_that_are_sharded_themselves(rates, wide_x, getkey):
    key = getkey()
    expected = jdrop.dropout(clone(key), wide_x, channel_rates(8))
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        x = jax.device_put(wide_x, P(None, *rates))
        y = jdrop.dropout(clone(key), x, jax.device_put(channel_rates(8), rates))
    assert_same_bits(y, expected)


def test_members_over_an_explicit_mesh_axis(wide_x, getkey):
    keys = jax.random.split(getkey(), 4)
    xs = jnp.stack([wide_x] * 4)
    expected = jnp.stack([jdrop.dropout(key, wide_x, 0.3) for key in clone(keys)])
    for spec in (P("a"), P("a", "b"), P(None, "a", "b"), P("b", "a")):
        with jax.set_mesh(mesh_of(AxisType.Explicit)):
            sharded_keys = jax.device_put(clone(keys), P(*spec[:1]))
            sharded = jax.device_put(xs, spec)
            run = jax.jit(jax.vmap(lambda key, x: jdrop.dropout(key, x, 0.3)))
            y = run(sharded_keys, sharded)
            assert jax.typeof(y).sharding.spec == jax.typeof(sharded).sharding.spec
        assert_same_bits(y, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", SHARDED_CASES[:3], ids=str)
def test_inside_shard_map_each_shard_drops_by_its_own_key(axis_type, case, wide_x, getkey):
    key = getkey()

    def local(key: Array, x: Array) -> Array:
        return case(jax.random.fold_in(key, jax.lax.axis_index("a")), x)

    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate(
        [case(jax.random.fold_in(clone(key), i), block) for i, block in enumerate(blocks)]
    )
    with jax.set_mesh(mesh_of(axis_type)):
        run = jax.shard_map(local, in_specs=(P(), P("a")), out_specs=P("a"))
        x = jax.device_put(wide_x, P("a"))
        assert_same_bits(jax.jit(run)(clone(key), x), expected)


def test_inside_shard_map_a_shared_key_shares_the_mask(wide_x, getkey):
    key = getkey()
    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate([jdrop.dropout(clone(key), block, 0.3) for block in blocks])
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        run = jax.shard_map(
            lambda key, x: jdrop.dropout(key, x, 0.3), in_specs=(P(), P("a")), out_specs=P("a")
        )
        assert_same_bits(jax.jit(run)(clone(key), wide_x), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map_over_some_axes_only(axis_type, wide_x, getkey):
    key = getkey()
    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate([jdrop.dropout(clone(key), block, 0.3) for block in blocks])
    with jax.set_mesh(mesh_of(axis_type)):
        run = jax.shard_map(
            lambda key, x: jdrop.dropout(key, x, 0.3),
            in_specs=(P(), P("a")),
            out_specs=P("a"),
            axis_names={"a"},
        )
        x = jax.device_put(wide_x, P("a", "b"))
        assert_same_bits(jax.jit(run)(clone(key), x), expected)


# Axes and shapes.


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_one_decision_is_shared_along_the_broadcast_dims(dims, rate, getkey):
    key, shape = getkey(), (24, 25, 26)
    y = jdrop.dropout(clone(key), jnp.ones(shape), rate, broadcast_dims=dims)
    mask = np.asarray(y != 0)
    shared = mask.take([0], dims[0])
    for dim in dims[1:]:
        shared = shared.take([0], dim)
    assert_same_bits(mask, np.broadcast_to(shared, shape))
    low, high = binomial_bounds(shared.size, float(kept_probability(rate)))
    assert low <= shared.sum() <= high
    for negative in ([dim - 3 for dim in dims], [dims[0] - 3, *dims[1:]]):
        actual = jdrop.dropout(clone(key), jnp.ones(shape), rate, broadcast_dims=negative)
        assert_same_bits(actual, y)


@pytest.mark.parametrize("dims", [(3,), (-4,), (0, 3), (100,)])
@pytest.mark.parametrize("rate", [0.0, 0.5, jnp.float32(0.5)])
def test_broadcast_dims_out_of_range_are_named(dims, rate, getkey):
    with pytest.raises(ValueError, match=rf"broadcast_dims must lie in \[-3, 3\).*got {dims[-1]}"):
        jdrop.dropout(getkey(), jnp.ones((2, 3, 4)), rate, broadcast_dims=dims)


@pytest.mark.parametrize("dims", [(0, 0), (0, -3), (1, 2, -1)])
def test_broadcast_dims_given_twice_are_named(dims, getkey):
    with pytest.raises(
        ValueError, match=rf"broadcast_dims must name each axis once, got \({dims[0]}"
    ):
        jdrop.dropout(getkey(), jnp.ones((2, 3, 4)), 0.5, broadcast_dims=dims)


def test_a_scalar_has_no_broadcast_dims(getkey):
    with pytest.raises(ValueError, match=r"broadcast_dims must lie in \[0, 0\).*got 0"):
        jdrop.dropout(getkey(), 1.0, 0.5, broadcast_dims=(0,))


@pytest.mark.parametrize("jit", [False, True])
def test_rates_may_not_vary_along_a_broadcast_dim(jit, getkey):
    def run(key: Array, rates: Array) -> Array:
        return jdrop.dropout(key, jnp.ones((4, 3)), rates, broadcast_dims=(1,))

    run = jax.jit(run) if jit else run
    with pytest.raises(ValueError, match=r"rate must be broadcastable to the shape \(4, 1\)"):
        run(getkey(), channel_rates(3))
    assert run(getkey(), channel_rates(4)[:, None]).shape == (4, 3)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 1), (1, 1, 1)])
@pytest.mark.parametrize("rate", ["number", "array", "full"])
def test_small_and_empty_shapes(shape, rate, getkey):
    rate = {"number": 0.3, "array": jnp.float32(0.3), "full": jnp.full(shape, 0.3)}[rate]
    key, x = getkey(), jnp.full(shape, 2.0)
    y = jdrop.dropout(clone(key), x, rate)
    mask = jdrop.keep_mask(clone(key), shape, rate)
    assert y.shape == shape == mask.shape
    assert_same_bits(y != 0, mask)
    assert_same_bits(jax.jit(jdrop.dropout)(clone(key), x, jnp.asarray(rate)) != 0, mask)
    assert jdrop.dropout(key, x, 0.3, broadcast_dims=range(len(shape))).shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_small_shapes_are_dropped_at_the_rate(shape, getkey):
    n = 2**14
    keys = jax.random.split(getkey(), n)
    masks = jax.vmap(lambda key: jdrop.keep_mask(key, shape, 0.3))(keys)
    low, high = binomial_bounds(masks.size, float(kept_probability(0.3)))
    assert low <= masks.sum() <= high


# Given masks.


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (4, 1), (4, 3)])
def test_a_mask_is_broadcast_to_the_input(shape):
    x = jnp.arange(1.0, 13).reshape(4, 3)
    mask = np.arange(math.prod(shape)).reshape(shape) % 2 == 0
    expected = np.where(np.broadcast_to(mask, (4, 3)), 2 * x, 0)
    np.testing.assert_array_equal(jdrop.apply_mask(mask, x, 0.5), expected)
    np.testing.assert_array_equal(jdrop.apply_mask(jnp.asarray(mask), x, 0.5), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 3), (1, 4, 3), (0,)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask must be broadcastable to the shape \(4, 3\) of x"):
        jdrop.apply_mask(jnp.ones(shape, bool), jnp.ones((4, 3)), 0.5)


@pytest.mark.parametrize("mask", [jnp.ones(3), jnp.ones(3, jnp.int32), np.ones(3, np.uint8)])
def test_a_mask_that_is_not_boolean_is_refused(mask):
    with pytest.raises(TypeError):
        jdrop.apply_mask(mask, jnp.ones(3), 0.5)
    with pytest.raises(TypeError, match="mask must be Boolean"):
        inspect.unwrap(jdrop.apply_mask)(mask, jnp.ones(3), 0.5)


# Keys.


@pytest.mark.parametrize(
    "key", [None, 0, 0.5, "key", jnp.float32(0), jnp.ones(2), np.ones(2, np.int32)], ids=repr
)
@pytest.mark.parametrize("rate", [0.5, jnp.float32(0.5)])
def test_what_is_no_key_is_refused(key, rate):
    for draw, of in ((jdrop.dropout, jnp.ones(3)), (jdrop.keep_mask, (3,))):
        with pytest.raises(TypeError):
            draw(key, of, rate)
        # The same without the checks of types that only the tests have.
        with pytest.raises(
            TypeError, match=r"key must be a JAX random key, got .*jax\.random\.key"
        ):
            inspect.unwrap(draw)(key, of, rate)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)])
def test_an_array_of_keys_is_refused(make, shape):
    keys = jax.random.split(make(0), shape)
    for draw, of in ((jdrop.dropout, jnp.ones(3)), (jdrop.keep_mask, (3,))):
        with pytest.raises(TypeError, match=r"key must be a single key, got .*jax\.vmap"):
            draw(clone(keys), of, 0.5)


@pytest.mark.parametrize(
    "impl", ["threefry2x32", "rbg", "unsafe_rbg", "philox2x32", "philox4x32", "threefry4x32"]
)
def test_keys_of_each_implementation_and_their_legacy_form(impl, getkey):
    try:
        key = jax.random.key(7, impl=impl)
    except ValueError:
        pytest.skip(f"this jax has no {impl}")
    n = 2**16
    mask = jdrop.keep_mask(clone(key), (256, 256), 0.3)
    low, high = binomial_bounds(n, float(kept_probability(0.3)))
    assert low <= mask.sum() <= high
    y = jax.jit(jdrop.dropout, static_argnums=2)(clone(key), jnp.ones((256, 256)), 0.3)
    assert_same_bits(y != 0, mask)
    with jax.default_prng_impl(impl):
        assert_same_bits(jdrop.keep_mask(jax.random.PRNGKey(7), (256, 256), 0.3), mask)
        legacy = jdrop.dropout(jax.random.PRNGKey(7), jnp.ones((256, 256)), 0.3)
        assert_same_bits(legacy != 0, mask)
    other = jdrop.keep_mask(jax.random.key(8, impl=impl), (256, 256), 0.3)
    assert (mask != other).any()


def test_a_key_is_consumed(getkey):
    key = getkey()
    jdrop.dropout(key, jnp.ones(3), 0.5)
    with pytest.raises(jax.errors.KeyReuseError):
        jdrop.dropout(key, jnp.ones(3), 0.5)


# The weights of the test.


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class Block:
    inner: Any


PYTREES: dict[str, tuple[Any, str]] = {
    "dict": ({"Dense_1": {"kernel": 1, "bias": 1}, "Dense_0": 1}, "Dense_1/kernel"),
    "list": ([1, [1, 1]], "1/0"),
    "tuple": ((1, None, 1), "2"),
    "NamedTuple": (Layer(1, 1), "kernel"),
    "dataclass": (Block([Layer(1, 1), 1]), "inner/0/kernel"),
    "one leaf": (1, ""),
}


@pytest.mark.parametrize("tree", PYTREES)
def test_named_weights_are_scaled_and_the_others_are_the_same_objects(tree, getkey):
    structure, path = PYTREES[tree]
    params = jax.tree.map(lambda _: jax.random.normal(getkey(), (4, 3)), structure)
    scaled = jdrop.scale_weights(params, {path: 0.25})
    assert jax.tree.structure(scaled) == jax.tree.structure(params)
    leaves = jax.tree.leaves_with_path(params)
    for (at, leaf), result in zip(leaves, jax.tree.leaves(scaled), strict=True):
        if jax.tree_util.keystr(at, simple=True, separator="/") == path:
            assert_same_bits(result, 0.75 * leaf)
        else:
            assert result is leaf


def test_weights_under_jit_with_rates_for_each_unit(getkey):
    params = {"a": jax.random.normal(getkey(), (4, 3)), "b": jnp.arange(3)}
    rates = jnp.array([0.0, 0.25, 0.5, 1.0])[:, None]
    expected = params["a"] * (1 - rates)
    scaled = jax.jit(lambda params, rates: jdrop.scale_weights(params, {"a": rates}))(params, rates)
    assert_same_bits(scaled["a"], expected)
    assert_same_bits(scaled["b"], params["b"])
    assert jnp.isnan(jax.jit(TAKES_A_RATE["scale_weights"])(1.5)["w"]).all()


@pytest.mark.parametrize("path", ["kernel", "Dense_0", "Dense_0/kernel/", "", "Dense_0.kernel"])
def test_a_path_that_is_not_there_is_named_and_so_are_those_that_are(path):
    params = {"Dense_0": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=rf"{path!r}.*Dense_0/bias, Dense_0/kernel"):
        jdrop.scale_weights(params, {"Dense_0/kernel": 0.5, path: 0.5})


@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_both_forms_make_the_same_network(rate, getkey):
    """Scaled while training, or at the test: the weights differ by q, the outputs do not.

    Weights larger by 1 / q see gradients smaller by q, so their learning rate is lr / q^2.
    """
    with jax.enable_x64(True):
        inputs, labels = jax.random.normal(getkey(), (8, 5)), jax.random.normal(getkey(), (8, 2))
        scaled = {
            "hidden": {"kernel": jax.random.normal(getkey(), (5, 6))},
            "out": {"kernel": jax.random.normal(getkey(), (6, 2)), "bias": jnp.zeros((1, 2))},
        }
        q = float(kept_probability(rate))
        unscaled = {**scaled, "out": {**scaled["out"], "kernel": scaled["out"]["kernel"] / q}}

        def predict(params: Any, key: Array | None, scale: bool) -> Array:
            hidden = jnp.tanh(inputs @ params["hidden"]["kernel"])
            if key is not None:
                hidden = jdrop.dropout(key, hidden, rate, scale=scale)
            return hidden @ params["out"]["kernel"] + params["out"]["bias"]

        def train(params: Any, key: Array, scale: bool, out_kernel_lr: float) -> Any:
            loss = lambda params: ((predict(params, key, scale) - labels) ** 2).mean()  # noqa: E731
            lrs = jax.tree.map(lambda _: 0.1, params)
            lrs["out"]["kernel"] = out_kernel_lr
            return jax.tree.map(lambda w, g, lr: w - lr * g, params, jax.grad(loss)(params), lrs)

        start = scaled
        for _ in range(8):
            key = getkey()
            with_key = [predict(*a) for a in ((scaled, clone(key), True), (unscaled, key, False))]
            np.testing.assert_allclose(*with_key, rtol=1e-10, atol=1e-12)
            key = clone(key)
            scaled = train(scaled, clone(key), True, 0.1)
            unscaled = train(unscaled, clone(key), False, 0.1 / q**2)
            at_test = jdrop.scale_weights(unscaled, {"out/kernel": rate})
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                at_test,
                scaled,
            )
        assert not np.allclose(start["out"]["kernel"], scaled["out"]["kernel"], rtol=0.01)


# The strict modes of JAX.


MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "no jit": lambda: jax.disable_jit(),
}


@pytest.mark.parametrize(
    ("mode", "dtype"), [*((mode, "bfloat16") for mode in MODES), ("strict promotion", "complex64")]
)
def test_in_the_strict_modes(mode, dtype, getkey):
    keys, x = jax.random.split(getkey(), 8), jnp.ones((8, 6), dtype)
    rates = (0.3, jnp.float32(0.3), jnp.bfloat16(0.5), channel_rates(6))
    with MODES[mode]():
        for key, rate in zip(clone(keys), rates, strict=False):
            assert jnp.isfinite(jdrop.dropout(key, x, rate)).all()
            jdrop.scale_weights({"w": x.T}, {"w": rate})
        run = jax.jit(lambda *args: jdrop.dropout(*args, scale=False))
        assert jnp.isfinite(run(clone(keys[5]), x, jnp.float32(1.0))).all()
        gradient = jax.grad(lambda x: jdrop.dropout(clone(keys[6]), x, rates[1]).real.sum())(x)
        assert gradient.dtype == dtype


def test_one_axis_alone_is_not_a_sequence_of_axes(getkey):
    # The type checks of the tests may refuse it before the function does.
    with pytest.raises(TypeError, match="broadcast_dims"):
        jdrop.dropout(getkey(), jnp.ones((2, 3)), 0.5, broadcast_dims=0)
    with pytest.raises(TypeError, match="shape"):
        jdrop.keep_mask(getkey(), 5, 0.5)


def test_rates_of_units_scale_the_weights_that_read_them():
    weights = {"kernel": jnp.ones((2, 2)), "conv": jnp.ones((3, 3, 2, 4)), "scale": jnp.ones(2)}
    rates = jnp.array([0.0, 0.5])
    scaled = jdrop.scale_weights(weights, dict.fromkeys(weights, rates))
    assert_same_bits(scaled["kernel"], jnp.array([[1.0, 1.0], [0.5, 0.5]]))
    assert_same_bits(scaled["conv"][1, 2, :, 3], jnp.array([1.0, 0.5]))
    assert_same_bits(scaled["scale"], jnp.array([1.0, 0.5]))
