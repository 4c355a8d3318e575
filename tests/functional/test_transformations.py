"""The mask is the same under all transformations of JAX."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dropouts import Case, assert_same_bits, channel_rates
from jax import Array

import jdrop

pytestmark = pytest.mark.grid

clone = jax.random.clone


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


def test_dropout_equals_keep_mask_and_apply_mask(case, x, getkey):
    key = getkey()
    shape = tuple(1 if axis - 2 in case.broadcast_dims or axis in case.broadcast_dims else size
                  for axis, size in enumerate(x.shape))  # fmt: skip
    rate = jnp.array(case.rate) if isinstance(case.rate, tuple) else case.rate
    mask = jdrop.keep_mask(clone(key), shape, rate)
    assert_same_bits(jdrop.apply_mask(mask, x, rate, scale=case.scale), case(key, x))


def test_jit_and_remat_do_not_change_the_output(case, x, getkey):
    key = getkey()
    expected = case(clone(key), x)
    for transform in (jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))):
        assert_same_bits(transform(case)(clone(key), x), expected)


def test_vmap_over_keys_equals_a_loop(case, x, getkey):
    keys = jax.random.split(getkey(), 5)
    expected = jnp.stack([case(key, x) for key in clone(keys)])
    assert_same_bits(jax.vmap(case, (0, None))(clone(keys), x), expected)
    assert_same_bits(jax.jit(jax.vmap(case, (0, None)))(clone(keys), x), expected)
    with_batch = jax.vmap(case)(clone(keys), jnp.broadcast_to(x, (5, 8, 6)))
    assert_same_bits(with_batch, expected)


def test_vmap_over_two_axes_of_keys_equals_a_loop(case, x, getkey):
    keys = jax.random.split(getkey(), (2, 3))
    expected = jnp.stack([jnp.stack([case(key, x) for key in row]) for row in clone(keys)])
    twice = jax.vmap(jax.vmap(case, (0, None)), (0, None))
    assert_same_bits(twice(clone(keys), x), expected)


def test_vmap_over_inputs_equals_a_loop(case, x, getkey):
    key, xs = getkey(), jnp.stack([x, 2 * x, -x], axis=1)
    expected = jnp.stack([case(clone(key), x) for x in jnp.unstack(xs, axis=1)])
    assert_same_bits(jax.vmap(case, (None, 1))(clone(key), xs), expected)


def test_vmap_over_rates_equals_a_loop(x, getkey):
    key, rates = getkey(), jnp.array([0.0, 0.1, 0.3, 0.9, 1.0])
    expected = jnp.stack([jdrop.dropout(clone(key), x, rate) for rate in rates])
    actual = jax.vmap(jdrop.dropout, (None, None, 0))(clone(key), x, rates)
    assert_same_bits(actual, expected)


def test_vmap_over_keys_inputs_and_rates_equals_a_loop(x, getkey):
    keys, xs = jax.random.split(getkey(), 3), jnp.stack([x, 2 * x, -x])
    rates = jnp.stack([channel_rates(6), jnp.full(6, 0.3), jnp.zeros(6)])
    expected = jnp.stack(list(map(jdrop.dropout, clone(keys), xs, rates)))
    assert_same_bits(jax.vmap(jdrop.dropout)(clone(keys), xs, rates), expected)


def test_scan_equals_a_loop(case, x, getkey):
    keys = jax.random.split(getkey(), 4)

    def step(carry: Array, key: Array) -> tuple[Array, Array]:
        y = case(key, carry)
        return y, y

    expected = list(itertools.accumulate(clone(keys), lambda x, key: case(key, x), initial=x))
    assert_same_bits(jax.lax.scan(step, x, clone(keys))[1], jnp.stack(expected[1:]))


@pytest.mark.parametrize("shape", [(8, 64, 40), (8, 50, 40)], ids=str)
def test_the_gradient_of_a_scan_keeps_no_mask_and_nothing_of_its_size(shape, getkey):
    def loss(x: Array, keys: Array) -> Array:
        def step(x: Array, key: Array) -> tuple[Array, None]:
            return x + jdrop.dropout(key, jnp.sin(x), 0.3), None

        return jax.lax.scan(step, x, keys)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones(shape), jax.random.split(getkey(), 12))
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == 2
    avals = [v.aval for scan in scans for v in (*scan.invars, *scan.outvars)]
    assert any(jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key) for aval in avals)
    other = [aval for aval in avals if aval.dtype != jnp.float32]
    assert max(aval.size for aval in other) <= math.prod(shape) / 32


def test_the_gradient_of_a_scan_uses_the_masks_of_the_output_with_and_without_remat(
    case, x, getkey
):
    keys = jax.random.split(getkey(), 4)

    def total(x: Array, remat: bool) -> Array:
        def step(carry: Array, key: Array) -> tuple[Array, None]:
            return case(key, carry), None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, clone(keys))[0].sum()

    product = math.prod(case.multiplier(key) for key in clone(keys))
    for remat in (False, True):
        gradient = jax.jit(jax.grad(total), static_argnums=1)(x, remat)
        np.testing.assert_allclose(gradient, product, rtol=1e-6)


def test_cond_and_fori_loop_do_not_change_the_output(case, x, getkey):
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


def test_second_derivatives_are_the_square_of_mask_times_scale(case, x, getkey):
    key, x = getkey(), x.ravel()[:48]
    square = case.multiplier(key).ravel() ** 2

    def energy(x: Array) -> Array:
        return 0.5 * (case(clone(key), x.reshape(8, 6)) ** 2).sum()

    @jax.jit
    def hessians(x: Array) -> list[Array]:
        outer = (
            jax.hessian(energy),
            jax.jacrev(jax.jacfwd(energy)),
            jax.jacrev(jax.jacrev(energy)),
        )
        return [hessian(x) for hessian in outer]

    for hessian in hessians(x):
        np.testing.assert_allclose(hessian, np.diag(square), rtol=1e-6)


def test_the_derivative_for_a_complex_input_is_mask_times_scale(getkey):
    key, x = getkey(), jnp.ones((8, 6), jnp.complex64)
    mask = jdrop.keep_mask(clone(key), (8, 6), 0.5)
    gradient = jax.grad(lambda x: jdrop.dropout(clone(key), x, 0.5).real.sum())(x)
    assert_same_bits(gradient, jnp.where(mask, 2 + 0j, 0j).astype(jnp.complex64))
