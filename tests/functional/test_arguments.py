"""Axes, shapes, given masks, keys, and the strict modes of JAX."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds
from dropouts import assert_same_bits, channel_rates, kept_probability
from jax import Array

import jdrop

pytestmark = pytest.mark.grid

clone = jax.random.clone


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
def test_small_and_empty_shapes_are_dropped_alike_with_and_without_jit(shape, getkey):
    x, given = jnp.full(shape, 2.0), (jnp.float32(0.3), jnp.full(shape, 0.3))

    @jax.jit
    def run(key: Array, x: Array, traced: tuple[Array, Array]) -> tuple[list[Array], ...]:
        rates = (0.3, *given, *traced)
        ys = [jdrop.dropout(clone(key), x, rate) for rate in rates]
        masks = [jdrop.keep_mask(clone(key), shape, rate) for rate in rates]
        return ys, masks

    key = getkey()
    ys, masks = run(clone(key), x, given)
    for y, mask in zip(ys, masks, strict=True):
        assert y.shape == shape == mask.shape
        assert_same_bits(np.asarray(y) != 0, mask)
    assert_same_bits(masks[3], masks[1])
    assert_same_bits(masks[4], masks[2])
    shared = jdrop.dropout(clone(key), x, 0.3, broadcast_dims=range(len(shape)))
    assert shared.shape == shape
    # Outside of `jit`.
    assert_same_bits(jdrop.dropout(key, x, 0.3), ys[0])


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_small_shapes_are_dropped_at_the_rate(shape, getkey):
    n = 2**14
    keys = jax.random.split(getkey(), n)
    masks = jax.vmap(lambda key: jdrop.keep_mask(key, shape, 0.3))(keys)
    low, high = binomial_bounds(masks.size, float(kept_probability(0.3)))
    assert low <= masks.sum() <= high


# Given masks.


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (4, 1), (4, 3)])
def test_a_given_mask_is_broadcast_to_the_input(shape):
    x = jnp.arange(1.0, 13).reshape(4, 3)
    mask = np.arange(math.prod(shape)).reshape(shape) % 2 == 0
    expected = np.where(np.broadcast_to(mask, (4, 3)), 2 * x, 0)
    np.testing.assert_array_equal(jdrop.apply_mask(mask, x, 0.5), expected)
    np.testing.assert_array_equal(jdrop.apply_mask(jnp.asarray(mask), x, 0.5), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 3), (1, 4, 3), (0,)])
def test_a_given_mask_that_does_not_broadcast_to_the_input_raises(shape):
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
def test_a_key_that_is_no_key_raises(key, rate):
    for draw, argument in ((jdrop.dropout, jnp.ones(3)), (jdrop.keep_mask, (3,))):
        with pytest.raises(TypeError):
            draw(key, argument, rate)
        # Without the type checks of jaxtyping, which only the tests have.
        with pytest.raises(
            TypeError, match=r"key must be a JAX random key, got .*jax\.random\.key"
        ):
            inspect.unwrap(draw)(key, argument, rate)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)])
def test_an_array_of_keys_raises(make, shape):
    keys = jax.random.split(make(0), shape)
    for draw, argument in ((jdrop.dropout, jnp.ones(3)), (jdrop.keep_mask, (3,))):
        with pytest.raises(TypeError, match=r"key must be a single key, got .*jax\.vmap"):
            draw(clone(keys), argument, 0.5)


@pytest.mark.parametrize(
    "impl", ["threefry2x32", "rbg", "unsafe_rbg", "philox2x32", "philox4x32", "threefry4x32"]
)
def test_typed_and_legacy_keys_of_each_implementation_draw_the_same_mask(impl, getkey):
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
def test_dropout_and_scale_weights_work_in_the_strict_modes_of_jax(mode, dtype, getkey):
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


def test_an_integer_instead_of_a_sequence_of_axes_or_sizes_raises(getkey):
    # In the tests jaxtyping may refuse the integer first.
    with pytest.raises(TypeError, match="broadcast_dims"):
        jdrop.dropout(getkey(), jnp.ones((2, 3)), 0.5, broadcast_dims=0)
    with pytest.raises(TypeError, match="shape"):
        jdrop.keep_mask(getkey(), 5, 0.5)


@pytest.mark.parametrize("shape", [(-1,), (2, -3)])
def test_a_shape_with_a_negative_size_raises(shape, getkey):
    with pytest.raises(ValueError, match="shape must have no negative size, got"):
        jdrop.keep_mask(getkey(), shape, 0.5)


@pytest.mark.parametrize("shape", [None, "ab", (4.5,), (2, None), (True,)])
def test_a_shape_that_is_no_sequence_of_integers_raises(shape, getkey):
    # In the tests jaxtyping may refuse the shape first.
    with pytest.raises(TypeError, match="shape"):
        jdrop.keep_mask(getkey(), shape, 0.5)


def test_a_shape_may_be_a_list(getkey):
    key = getkey()
    mask = jdrop.keep_mask(clone(key), (2, 3), 0.5)
    assert jnp.array_equal(jdrop.keep_mask(clone(key), [2, 3], 0.5), mask)
