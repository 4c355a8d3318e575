"""The random order of the examples of an epoch, as `jax.random.permutation` draws it.

The order is made by sorts, and XLA's sort for CPUs is several times as fast for one array as for
an array of keys with an array of values: https://github.com/jax-ml/jax/issues/10434. An ensemble of
small networks trains on many rows for a short time, and would pass most of it in these sorts.
`scripts/bench.py orders` measures both.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def shuffle(key: Array, rows: Array) -> Array:
    """A random order of an array: `jax.random.permutation(key, rows)`, faster on a CPU.

    The order is the same on every device, and that of JAX 0.10 to 0.12.

    Args:
        key: consumed.
        rows: `[row]`, of any dtype.

    Example:
        >>> key, rows = jax.random.key(0), jnp.arange(5)
        >>> order = shuffle(jax.random.clone(key), rows)
        >>> bool((order == jax.random.permutation(key, rows)).all())
        True
    """
    for _ in range(_num_sorts(rows.shape[0])):
        key, sort_key = jax.random.split(key)
        bits = jax.random.bits(sort_key, rows.shape, jnp.uint32)
        rows = rows[lax.platform_dependent(bits, cpu=_argsort_packed, default=_argsort)]
    return rows


def _num_sorts(num_rows: int) -> int:
    """How many sorts by 32 random bits leave a tie with a probability below 1 / `num_rows`.

    Each of the n (n - 1) / 2 pairs of rows ties in all k sorts with probability 2**(-32 k), so n**3
    possible values are enough.
    """
    return math.ceil(3 * math.log(max(1, num_rows)) / math.log(2**32 - 1))


def _argsort(bits: Array) -> Array:
    return jnp.argsort(bits).astype(jnp.int32)


def _argsort_packed(bits: Array) -> Array:
    """The same by a single array of 64-bit integers.

    The upper half of each holds the random bits. The lower half holds the position, which also
    decides ties, as in a stable sort.
    """
    with jax.enable_x64(True):
        positions = lax.iota(jnp.uint64, bits.shape[0])
        packed = lax.sort(bits.astype(jnp.uint64) << jnp.uint64(32) | positions, is_stable=False)
        return (packed & jnp.uint64(0xFFFFFFFF)).astype(jnp.int32)
