"""The order of examples: that of `jax.random.permutation`, from another sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop import orders

# JAX sorts once up to 1,625 rows, twice above, and three times above 2,642,245.
SIZES = [0, 1, 2, 7, 500, 1625, 1626, 1627, 10_741, 70_000]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("size", SIZES)
def test_order_equals_that_of_jax(size: int, impl: str) -> None:
    key, rows = jax.random.key(3, impl=impl), 2 * jnp.arange(size)
    expected = jax.random.permutation(jax.random.clone(key), rows)
    order = jax.jit(orders.shuffle)(key, rows)
    assert order.dtype == expected.dtype
    np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("size", [7, 1626])
def test_members_have_the_orders_of_jax(size: int) -> None:
    keys, rows = jax.random.split(jax.random.key(4), 5), jnp.arange(size)
    expected = jax.vmap(jax.random.permutation, (0, None))(jax.random.clone(keys), rows)
    order = jax.vmap(orders.shuffle, (0, None))(keys, rows)
    np.testing.assert_array_equal(order, expected)


def test_old_keys_other_dtypes_and_64_bits_have_the_order_of_jax() -> None:
    rows = jnp.linspace(0, 1, 2000)
    key = jax.random.PRNGKey(5)
    np.testing.assert_array_equal(orders.shuffle(key, rows), jax.random.permutation(key, rows))
    with jax.enable_x64(True):
        wide = jnp.linspace(0, 1, 2000)
        assert wide.dtype == jnp.float64
        np.testing.assert_array_equal(orders.shuffle(key, wide), jax.random.permutation(key, wide))


def test_three_sorts_begin_where_jax_begins_them() -> None:
    assert [orders._num_sorts(size) for size in (1, 2, 1625, 1626, 2_642_245, 2_642_246)] == [
        0,
        1,
        1,
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("argsort", [orders._argsort, orders._argsort_packed])
def test_ties_keep_their_order(argsort) -> None:
    few = jax.random.randint(jax.random.key(6), (5000,), 0, 4).astype(jnp.uint32)
    bits = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)[few]
    np.testing.assert_array_equal(argsort(bits), np.argsort(np.asarray(bits), kind="stable"))
    assert argsort(bits).dtype == jnp.int32
